"""What a search looks through: numbers and kernels, each once."""

import itertools
from typing import Any

import pytest
import torch

from design_lightning.kernels import PUBLISHED_LEVELS, ThresholdKernel, lloyd_max_half_normal
from design_lightning.kernels.search import Alphabet, Candidates


@pytest.mark.parametrize(("size", "count"), [((2, 2), 1296), ((1, 3), 216), ((3, 1), 216), ((2, 3), 46656)])
def test_every_assignment_is_there_once(size: tuple[int, int], count: int) -> None:
    space = Candidates(*size)
    codes = torch.cat([space.codes(numbers) for numbers in space.chunks(1000)])[:, 0]
    assert len(space) == len(codes) == count
    expected = list(itertools.product(range(6), repeat=space.places))
    assert [tuple(row) for row in codes.tolist()] == expected


def test_3x3_has_ten_million() -> None:
    space = Candidates(3, 3)
    assert len(space) == 10_077_696
    assert space.codes(torch.tensor([0, 10_077_695, 1])).flatten(1).tolist() == [[0] * 9, [5] * 9, [0] * 8 + [1]]


def test_the_symmetric_ones_have_corners_and_edges_alike() -> None:
    space = Candidates(3, 3, symmetric=True)
    codes = space.codes(torch.arange(216))[:, 0].view(216, 3, 3)
    assert len({tuple(c.flatten().tolist()) for c in codes}) == 216
    for turned in (codes.flip(1), codes.flip(2), codes.transpose(1, 2)):
        assert turned.equal(codes)


@pytest.mark.parametrize("family", ["complement", "shift"])
def test_families_are_those_of_the_kernel(family: Any) -> None:
    space, alphabet = Candidates(2, 2, family=family), Alphabet.of("published")
    for codes in space.codes(torch.arange(0, 1296, 97)).tolist():
        kernel = alphabet.kernel(codes, 2, "deep", "")
        first = ThresholdKernel(kernel.levels[:1])
        others = [first.complement()] if family == "complement" else [first.shift(i) for i in (1, 2, 3)]
        assert kernel.levels[1:] == tuple(other.levels[0] for other in others)


def test_a_kernel_has_as_many_phases_as_places_or_fewer() -> None:
    space = Candidates(2, 3)
    assert len(space.translations([0, 1, 2, 3, 4, 5])) == 6
    assert len(space.translations([0, 1, 2, 0, 1, 2])) == 3
    assert len(space.translations([4] * 6)) == 1


def test_an_alphabet_has_its_levels() -> None:
    assert Alphabet.of("codes").values == (0, 1, 3, 5, 7, 9)
    assert Alphabet.of("codes").thresholds == tuple(PUBLISHED_LEVELS.values())
    assert Alphabet.of("published").values == tuple(PUBLISHED_LEVELS.values())
    assert Alphabet.of("exact").values == lloyd_max_half_normal(7)
    assert [Alphabet.of(name).peak for name in ("codes", "published")] == [9, PUBLISHED_LEVELS[9]]


@pytest.mark.parametrize("levels", ["codes", "published", "exact"])
def test_a_published_kernel_has_its_codes_in_each_alphabet(levels: Any) -> None:
    alphabet = Alphabet.of(levels)
    codes = alphabet.codes_of(ThresholdKernel.named("3x3_symmetric_v2"))
    assert codes is not None
    assert alphabet.pattern(codes[0], 3) == "5 1 3; 1 0 1; 3 1 5"
    written = alphabet.kernel(codes, 3, "again", "")
    assert (written.levels == ThresholdKernel.named("3x3_symmetric_v2").levels) == (levels != "exact")
    assert alphabet.codes_of(ThresholdKernel.named("2x2x4_baseline")) is None
    known = alphabet.with_levels_of([ThresholdKernel.named("2x2x4_baseline")])
    assert (known.codes_of(ThresholdKernel.named("2x2x4_baseline")) is None) == (levels == "codes")
    assert known.size == 6
