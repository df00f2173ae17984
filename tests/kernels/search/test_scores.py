"""Scores from pooled moments equal those of the loop-written reference, to 1e-6."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from design_lightning.binary import Sign
from design_lightning.kernels import PUBLISHED_LEVELS, lloyd_max_half_normal
from design_lightning.kernels.search import (
    SCORES,
    Alphabet,
    ImageTensor,
    Scorer,
    SearchConfig,
    SimulatedMaps,
    collect_moments,
    search_kernels,
)
from design_lightning.kernels.search.maps import random_filters

CODES = tuple(map(float, PUBLISHED_LEVELS))
LEVELS = {"codes": CODES, "published": tuple(PUBLISHED_LEVELS.values()), "exact": lloyd_max_half_normal(7)}


def simulated(images: torch.Tensor, filters: int, seed: int) -> np.ndarray:
    """Convolutions [N, F, H - 2, W - 2] of binarized grey images [N, H, W] by the search's random filters."""
    grey = images.double().numpy()
    kernels = random_filters(filters, seed)[:, 0].numpy()
    count, height, width = grey.shape
    found = np.zeros((count, filters, height - 2, width - 2))
    for n in range(count):
        bits = [[1 if value >= grey[n].mean() else -1 for value in row] for row in grey[n]]
        for f, i, j in product(range(filters), range(height - 2), range(width - 2)):
            found[n, f, i, j] = sum(kernels[f, a, b] * bits[i + a][j + b] for a in range(3) for b in range(3))
    return found


def standardised(maps: np.ndarray) -> np.ndarray:
    """Each filter's maps with mean 0 and standard deviation 1 over all images; in float32, as a network compares."""
    found = np.zeros(maps.shape, np.float32)
    for f in range(maps.shape[1]):
        mean, deviation = np.float32(maps[:, f].mean()), np.float32(maps[:, f].std())
        found[:, f] = (maps[:, f].astype(np.float32) - mean) / deviation
    return found


def scores(
    maps: np.ndarray,
    references: np.ndarray,
    kernel: Sequence[Sequence[float]],
    peak: float,
    ties: bool = True,
    bins: int | None = 32,
) -> dict[str, float]:
    """Every score of one kernel [h][w], averaged over filters.

    Args:
        maps: [N, F, H, W].
        references: [N, F, H, W], 1 for the highest level.
        kernel: thresholds.
        peak: the highest level.
        ties: whether a value equal to its threshold reaches it.
        bins: of the reference, for mutual information; None takes each of its values as a bin.
    """
    units = [_scores_of_unit(maps[:, f], references[:, f], kernel, peak, ties, bins) for f in range(maps.shape[1])]
    return {name: math.fsum(unit[name] for unit in units) / len(units) for name in units[0]}


def _scores_of_unit(
    maps: np.ndarray,
    references: np.ndarray,
    kernel: Sequence[Sequence[float]],
    peak: float,
    ties: bool,
    bins: int | None,
) -> dict[str, float]:
    rows, columns = len(kernel), len(kernel[0])
    count, height, width = maps.shape
    pixels: dict[tuple[int, int], list[tuple[float, int, float]]] = {}  # by phase: reference, bit, weighted bit
    variation: dict[tuple[int, int, str], list[tuple[int, float]]] = {}  # by phase and direction: plain, weighted
    for n in range(count):
        bits = [[0] * width for _ in range(height)]
        weighted = [[0.0] * width for _ in range(height)]
        for i, j in product(range(height), range(width)):
            threshold = np.float32(kernel[i % rows][j % columns])
            value, reference = np.float32(maps[n, i, j]), float(references[n, i, j])
            bits[i][j] = int(value >= threshold if ties else value > threshold)
            weighted[i][j] = bits[i][j] * kernel[i % rows][j % columns] / peak
            pixels.setdefault((i % rows, j % columns), []).append((reference, bits[i][j], weighted[i][j]))
        for i, j in product(range(height), range(width)):
            for k, m, way in ((i, j + 1, "right"), (i + 1, j, "down")):
                if k < height and m < width:
                    change = abs(bits[i][j] - bits[k][m]), abs(weighted[i][j] - weighted[k][m])
                    variation.setdefault((i % rows, j % columns, way), []).append(change)
    # Each phase counts alike, and so does each pair of phases.
    error = np.mean([np.mean([(r - o) ** 2 for r, o, _ in phase]) for phase in pixels.values()])
    weighted_error = np.mean([np.mean([(r - w) ** 2 for r, _, w in phase]) for phase in pixels.values()])
    residual = np.array([r - o for phase in pixels.values() for r, o, _ in phase])
    signal = np.array([r for phase in pixels.values() for r, _, _ in phase])
    importance = np.array([1 / len(phase) for phase in pixels.values() for _ in phase])
    spread = np.cov(residual, signal, aweights=importance, ddof=0)
    constant = spread[0, 0] < 1e-16 or spread[1, 1] < 1e-16
    return {
        "tv": float(np.mean([np.mean([plain for plain, _ in pairs]) for pairs in variation.values()])),
        "weighted_tv": float(np.mean([np.mean([weighted for _, weighted in pairs]) for pairs in variation.values()])),
        "mse": float(error),
        "psnr": 10 * math.log10(1 / error),
        "weighted_psnr": 10 * math.log10(1 / weighted_error),
        "residual_correlation": 0.0 if constant else abs(spread[0, 1]) / math.sqrt(spread[0, 0] * spread[1, 1]),
        "mutual_information": float(
            np.mean([_information([(_bin(r, bins), o) for r, o, _ in phase]) for phase in pixels.values()])
        ),
    }


def _bin(reference: float, bins: int | None) -> float:
    return reference if bins is None else min(max(int(reference * bins), 0), bins - 1)


def _information(pairs: list[tuple[float, int]]) -> float:
    """I(reference; bit) in bits, from counts."""
    total = len(pairs)
    found = 0.0
    for both in set(pairs):
        joint = pairs.count(both) / total
        first = sum(p[0] == both[0] for p in pairs) / total
        second = sum(p[1] == both[1] for p in pairs) / total
        found += joint * math.log2(joint / (first * second))
    return found


def reference_of(images: torch.Tensor, levels: str, reference: str, filters: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps and references [N, F, H, W], by loops."""
    maps = simulated(images, filters, seed=0)
    maps = np.maximum(maps, 0) if levels == "codes" else standardised(maps)
    grey = images[:, None, 1:-1, 1:-1].double().numpy()
    if reference == "grey":
        return maps, np.broadcast_to(grey, maps.shape)
    return maps, np.maximum(maps.astype(float), 0) / LEVELS[levels][-1]


def cells_of(maps: np.ndarray, values: tuple[float, ...], ties: bool) -> np.ndarray:
    """How many levels each value reaches: the bins of the reference `relu`."""
    return sum((np.float32(maps) >= np.float32(v) if ties else np.float32(maps) > np.float32(v)) * 1 for v in values)


def check(images: torch.Tensor, config: SearchConfig, kernels: list[tuple[int, ...]]) -> None:
    """Compares the scores of some kernels [h w] with the reference's."""
    filters = config.filters
    values = LEVELS[config.levels]
    maps, references = reference_of(images, config.levels, config.reference, filters)
    found = search_kernels(images, config)
    powers = [6**i for i in reversed(range(len(kernels[0])))]
    for codes in kernels:
        number = sum(p * c for p, c in zip(powers, codes, strict=True))
        kernel = np.array([values[c] for c in codes]).reshape(config.rows, config.columns)
        ties = config.ties == "on"
        expected = scores(maps, references, kernel.tolist(), values[-1], ties)
        if config.reference == "relu":  # whose bins are the levels that a value reaches
            cells = cells_of(maps, config.alphabet.values, ties) / 100
            expected["mutual_information"] = scores(maps, cells, kernel.tolist(), values[-1], ties, None)[
                "mutual_information"
            ]
        for s, name in enumerate(SCORES):
            assert found.values[s, number].item() == pytest.approx(expected[name], abs=1e-6, rel=1e-6), (codes, name)


@pytest.mark.parametrize("ties", ["on", "off"])
@pytest.mark.parametrize(
    "levels", [pytest.param(name, marks=[pytest.mark.slow] if name == "exact" else []) for name in LEVELS]
)
@pytest.mark.parametrize("reference", ["relu", "grey"])
def test_scores_equal_those_of_loops(blobs: torch.Tensor, reference: str, levels: str, ties: str) -> None:
    config = SearchConfig("2x2", reference=reference, levels=levels, ties=ties, filters=2, min_share=0, groups=3)
    check(blobs, config, [(1, 1, 0, 2), (5, 0, 0, 5), (2, 4, 4, 2), (3, 3, 3, 3), (0, 1, 2, 5)])


@pytest.mark.parametrize("reference", ["relu", "grey"])
@pytest.mark.parametrize(
    "size", ["1x2", "3x2", *(pytest.param(size, marks=pytest.mark.slow) for size in ("1x1", "2x1", "2x3", "1x5"))]
)
def test_scores_of_every_size_equal_those_of_loops(blobs: torch.Tensor, size: str, reference: str) -> None:
    config = SearchConfig(size, reference=reference, levels="published", filters=2, min_share=0)
    kernels = [tuple((a + 2 * i) % 6 for i in range(config.rows * config.columns)) for a in (0, 3)]
    check(blobs, config, kernels)


@given(st.lists(st.integers(0, 5), min_size=9, max_size=9), st.sampled_from(["relu", "grey"]))
@settings(max_examples=8, deadline=None)
def test_scores_of_3x3_equal_those_of_loops(codes: list[int], reference: str) -> None:
    noise = torch.rand(2, 1, 10, 9, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)[:, 0]
    alphabet = Alphabet.of("codes")
    maps = SimulatedMaps(ImageTensor(images), alphabet, reference, filters=2)  # type: ignore[arg-type]
    moments = collect_moments(maps, 3, 3, alphabet.values, exact_bins=reference == "relu")
    found = Scorer(moments, alphabet, 3, 3)(torch.tensor([[codes]]))[0]
    by_loops, references = reference_of(images, "codes", reference, 2)
    kernel = np.array([CODES[c] for c in codes]).reshape(3, 3).tolist()
    expected = scores(by_loops, references, kernel, 9.0, bins=None if reference == "relu" else 32)
    assert dict(zip(SCORES, found.tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reference", ["relu", "grey"])
def test_symmetric_3x3_equals_the_same_kernels_among_all(blobs: torch.Tensor, reference: str) -> None:
    config = SearchConfig("3x3", symmetric=True, reference=reference, filters=2, min_share=0)
    found = search_kernels(blobs, config)
    maps, references = reference_of(blobs, "codes", reference, 2)
    for corner, edge, centre in [(2, 1, 0), (2, 0, 1), (5, 0, 3)]:
        a, b, c = CODES[corner], CODES[edge], CODES[centre]
        kernel = [[a, b, a], [b, c, b], [a, b, a]]
        expected = scores(maps, references, kernel, 9.0, bins=None if reference == "relu" else 32)
        number = corner * 36 + edge * 6 + centre
        assert dict(zip(SCORES, found.values[:, number].tolist(), strict=True)) == pytest.approx(
            expected, rel=1e-6, abs=1e-6
        )


@pytest.mark.parametrize("code", range(6))
@pytest.mark.parametrize("size", ["1x1", "2x2", "3x2"])
@pytest.mark.slow
def test_a_constant_kernel_scores_as_sign_with_that_shift(blobs: torch.Tensor, size: str, code: int) -> None:
    config = SearchConfig(size, levels="published", filters=2, min_share=0)
    constant = code * sum(6**i for i in range(config.candidates.places))
    found = dict(zip(SCORES, search_kernels(blobs, config).values[:, constant].tolist(), strict=True))
    maps = standardised(simulated(blobs, 2, 0))
    threshold = LEVELS["published"][code]
    sign = (Sign()(torch.from_numpy(maps - np.float32(threshold))).numpy() + 1) / 2
    error = (np.maximum(maps, 0) / LEVELS["published"][-1] - sign) ** 2
    phases = list(product(range(config.rows), range(config.columns)))
    places = [(..., slice(i, None, config.rows), slice(j, None, config.columns)) for i, j in phases]
    changes = [np.abs(np.diff(sign, axis=axis))[place].mean() for place in places for axis in (-1, -2)]
    assert found["tv"] == pytest.approx(np.mean(changes), abs=1e-6)
    assert found["weighted_tv"] == pytest.approx(np.mean(changes) * threshold / LEVELS["published"][-1], abs=1e-6)
    assert found["mse"] == pytest.approx(np.mean([error[place].mean() for place in places]), abs=1e-6)


def test_the_share_of_ones_is_that_of_the_maps(blobs: torch.Tensor) -> None:
    found = search_kernels(blobs, SearchConfig("2x2", filters=3, min_share=0))
    maps = np.maximum(simulated(blobs, 3, 0), 0)
    for place, (i, j) in enumerate(product(range(2), range(2))):
        for code, value in enumerate(CODES):
            assert found.shares[place][code] == pytest.approx((maps[:, :, i::2, j::2] >= value).mean())
