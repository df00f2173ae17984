"""`search_kernels`: every candidate scored, the best ones with standard errors, and where the published ones stand."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from design_lightning._names import did_you_mean, in_a_line
from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.published import PUBLISHED
from design_lightning.kernels.search.alphabet import Alphabet, Codes, LevelsName
from design_lightning.kernels.search.candidates import DEPTHS, Candidates, Family
from design_lightning.kernels.search.images import ImageFolder, ImageTensor
from design_lightning.kernels.search.maps import Maps, Reference, SimulatedMaps
from design_lightning.kernels.search.moments import Moments, collect_moments
from design_lightning.kernels.search.result import Candidate, SearchResult
from design_lightning.kernels.search.scores import SCORES, ScoreName, Scorer

Progress = Callable[[str, int, int], None]
Source = str | Path | Tensor | ImageFolder | ImageTensor | Maps
CHUNK = 1 << 16
"""How many candidates are scored in one go."""


@dataclass(frozen=True)
class SearchConfig:
    """How to search; every field has a default, which is SPEC's procedure.

    Args:
        size: rows and columns of the kernels, such as `2x2` or `3x3`; up to 6^9 candidates.
        score: what ranks them; see `SCORES`. The others are computed, too.
        levels: `codes`, `published`, `exact`, or thresholds of one's own; see `Alphabet.of`.
        reference: of the scores that compare with a full-precision map: `relu`, the map after ReLU, or `grey`, the image.
        symmetric: of 3x3, only kernels with corners alike and edges alike.
        family: `none`, or 3-D kernels that follow from their first slice: `complement` or `shift`; see `Candidates`.
        ties: what a value equal to its threshold gives: `on`, as DeSign's >=, or `off`, as the authors' TensorFlow code. With
            `codes` it decides much: a ReLU's 0 reaches the code 0, or does not.
        min_share: a candidate is excluded if an entry of it gives either bit on less than this share of its pixels, over all
            images and units: it hardly ever switches. 0 excludes none.
        filters: random filters a seed; only of simulated maps.
        seeds: how many seeds of filters, from `seed` on.
        seed: of the filters, the order of the images, and the bootstrap.
        groups: of images, for the bootstrap.
        resamples: of the bootstrap.
        keep: how many of the best are reported.
        device: where maps and scores are computed, such as `cpu` or `cuda`.

    Raises:
        ValueError: if a value is unknown or out of range; names it.
    """

    size: str = "2x2"
    score: ScoreName = "tv"
    levels: LevelsName | tuple[float, ...] = "codes"
    reference: Reference = "relu"
    symmetric: bool = False
    family: Family = "none"
    ties: str = "on"
    min_share: float = 0.01
    filters: int = 16
    seeds: int = 1
    seed: int = 0
    groups: int = 20
    resamples: int = 200
    keep: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size):
            raise ValueError(f"size {self.size!r}: give rows and columns, such as 2x2 or 3x3")
        for name, choices in (
            ("score", tuple(SCORES)),
            ("reference", get_args(Reference)),
            ("family", get_args(Family)),
            ("ties", ("on", "off")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), choices)}"
                )
        if not 0 <= self.min_share < 0.5:
            raise ValueError(f"min_share is {self.min_share}, but must be at least 0 (excludes none) and below 0.5")
        for name, least in (("filters", 1), ("seeds", 1), ("groups", 1), ("resamples", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        _ = self.candidates
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device!r} is not to be had here: {in_a_line(error)}") from error

    @property
    def rows(self) -> int:
        """h."""
        return int(self.size.partition("x")[0])

    @property
    def columns(self) -> int:
        """w."""
        return int(self.size.partition("x")[2])

    @property
    def alphabet(self) -> Alphabet:
        """The levels, and behind them those of published kernels of this shape that it lacks."""
        return Alphabet.of(self.levels).with_levels_of(self.published)

    @property
    def candidates(self) -> Candidates:
        """What is searched."""
        return Candidates(self.rows, self.columns, Alphabet.of(self.levels).size, self.symmetric, self.family)

    @property
    def published(self) -> list[ThresholdKernel]:
        """The published kernels of this shape."""
        shape = (DEPTHS[self.family], self.rows, self.columns)
        return [kernel for kernel in map(ThresholdKernel.named, PUBLISHED) if kernel.shape == shape]


def search_kernels(
    images: Source, config: SearchConfig | None = None, progress: Progress | None = None
) -> SearchResult:
    """Searches for the threshold kernel that scores best on images, as the authors of DeSign designed theirs.

    Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.

    Args:
        images: a folder; images [N, H, W], [N, 1, H, W] or [N, 3, H, W] (uint8, or real numbers in [0, 1]); or `Maps` in
            place of simulated ones, such as `Preactivations` of a model.
        config: how to search.
        progress: called with a stage (`deviation`, `images`, `candidates`), how much of it is done, and how much there is.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if the images do not serve, or every candidate has an entry that never switches.

    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = torch.rand(8, 16, 16, generator=generator)
    >>> search_kernels(noise, SearchConfig(ties="off", filters=4)).best.pattern
    '0 5; 5 0'
    """
    config = config or SearchConfig()
    moments, maps = _gather(images, config, progress)
    return rank_candidates(moments, config, maps.units, maps.image_count, progress)


def search_per_unit(
    images: Source, config: SearchConfig | None = None, progress: Progress | None = None
) -> dict[str, SearchResult]:
    """A search for each unit by itself, such as each layer of a model, after one pass over the images; as `search_kernels`."""
    config = config or SearchConfig()
    moments, maps = _gather(images, config, progress)
    return {
        unit: rank_candidates(moments.unit(number), config, [unit], maps.image_count, progress)
        for number, unit in enumerate(maps.units)
    }


def _gather(images: Source, config: SearchConfig, progress: Progress | None) -> tuple[Moments, Maps]:
    """The moments of all maps, and where they came from."""
    if isinstance(images, str | Path):
        images = ImageFolder(images, seed=config.seed)
    if isinstance(images, Tensor):
        images = ImageTensor(images)
    alphabet = config.alphabet
    maps: Maps
    if isinstance(images, ImageFolder | ImageTensor):
        seeds = range(config.seed, config.seed + config.seeds)
        maps = SimulatedMaps(
            images, alphabet, config.reference, config.filters, seeds, config.device, _stage(progress, "deviation")
        )
    else:
        maps = images
        if config.reference != "relu" or not alphabet.standardised:
            raise ValueError(
                f"reference {config.reference!r} and levels {config.levels!r}: maps of a model go with the reference 'relu' "
                "and with levels in standard deviations, 'published' or 'exact'"
            )
    moments = collect_moments(
        maps,
        config.rows,
        config.columns,
        alphabet.values,
        ties=config.ties == "on",
        groups=config.groups,
        exact_bins=config.reference == "relu",
        progress=_stage(progress, "images"),
    )
    return moments, maps


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(stage, done, total)) if progress else None


def rank_candidates(
    moments: Moments,
    config: SearchConfig,
    units: Sequence[str],
    image_count: int,
    progress: Progress | None = None,
) -> SearchResult:
    """The search itself, from moments alone; `search_kernels` gathers them."""
    scorer = Scorer(moments, config.alphabet, config.rows, config.columns, config.device)
    values, kept = _score_all(scorer, config, progress)
    ranking = _Ranking(moments, scorer, config, values, kept)
    if not bool(kept.any()):
        raise ValueError(
            f"each of the {len(kept):,} candidates has an entry that gives one bit on all but {config.min_share:.2%} of its "
            "pixels; use a smaller min_share (0 excludes none), other levels ('published'), or other images"
        )
    top = ranking.describe([ranking.codes(number) for number in ranking.top(config.score, config.keep)])
    best = ranking.describe([ranking.codes(ranking.top(name, 1)[0]) for name in SCORES])
    codes = {kernel.name: config.alphabet.codes_of(kernel) for kernel in config.published}
    known = {name: found for name, found in codes.items() if found is not None}
    published = ranking.describe(list(known.values()), list(known))
    return SearchResult(
        config=config,
        images=image_count,
        units=tuple(units),
        candidates=len(kept),
        kept=int(kept.sum()),
        shares=tuple(map(tuple, scorer.shares[:, : config.candidates.levels].tolist())),
        top=tuple(top),
        best_by=dict(zip(SCORES, best, strict=True)),
        published=tuple(published),
        unscored=tuple(name for name, found in codes.items() if found is None),
        values=values,
        is_kept=kept,
    )


def _score_all(scorer: Scorer, config: SearchConfig, progress: Progress | None) -> tuple[Tensor, Tensor]:
    """The scores [S, n] of all candidates, float32, and which are kept [n], on the CPU."""
    space = config.candidates
    values = torch.empty(len(SCORES), len(space))
    kept = torch.empty(len(space), dtype=torch.bool)
    for numbers in space.chunks(CHUNK, config.device):
        codes = space.codes(numbers)
        here = slice(int(numbers[0]), int(numbers[-1]) + 1)
        values[:, here] = scorer(codes).t().float().cpu()
        kept[here] = switches(scorer.shares, codes, config.min_share).cpu()
        if progress is not None:
            progress("candidates", here.stop, len(space))
    return values, kept


def switches(shares: Tensor, codes: Tensor, min_share: float) -> Tensor:
    """Whether every entry of kernels [n, D, P] gives either bit on at least `min_share` of its pixels; shares: [P, L]."""
    at_entries = shares[torch.arange(codes.shape[-1], device=codes.device), codes]
    return ((at_entries >= min_share) & (at_entries <= 1 - min_share)).flatten(1).all(1)


class _Ranking:
    """Finds and describes candidates among the scores of all."""

    def __init__(self, moments: Moments, scorer: Scorer, config: SearchConfig, values: Tensor, kept: Tensor) -> None:
        self.config, self.scorer, self.values, self.kept = config, scorer, values, kept
        self.names = list(SCORES)
        self.signs = torch.tensor([1.0 if score.highest else -1.0 for score in SCORES.values()])
        self.alphabet, self.space = config.alphabet, config.candidates
        self.resampled = [
            Scorer(moments.total(weights), self.alphabet, config.rows, config.columns, config.device)
            for weights in _bootstrap(len(moments.cells), config)
        ]
        count = moments.cells.shape[1]
        self.by_unit = [
            Scorer(moments.unit(u), self.alphabet, config.rows, config.columns, config.device)
            for u in (range(count) if count > 1 else ())
        ]

    def codes(self, number: int) -> Codes:
        """The levels of a candidate."""
        return tuple(map(tuple, self.space.codes(torch.tensor([number]))[0].tolist()))

    def top(self, score: str, count: int) -> list[int]:
        """The numbers of the best candidates kept, one for each kernel whatever its phase; of equal ones the first."""
        s = self.names.index(score)
        goodness = torch.where(self.kept, self.values[s] * self.signs[s], float("-inf"))
        take = min(4 * count * self.space.places, int(self.kept.sum()))
        least = goodness.topk(take).values[-1]
        numbers = (goodness >= least).nonzero().flatten()
        order = goodness[numbers].sort(descending=True, stable=True).indices
        found: list[int] = []
        seen: set[tuple[int, ...]] = set()
        for number in numbers[order].tolist():
            first = self.codes(number)[0]
            if first not in seen:
                found.append(number)
                seen |= self.space.translations(first)
            if len(found) == count:
                break
        return found

    def describe(self, kernels: list[Codes], names: list[str] | None = None) -> list[Candidate]:
        """Scores, standard errors and ranks of kernels."""
        if not kernels:
            return []
        codes = torch.tensor(kernels, device=self.config.device)
        scores = self.scorer(codes).cpu()
        errors = _spread([scorer(codes).cpu() for scorer in self.resampled])
        unit_errors = _spread([scorer(codes).cpu() for scorer in self.by_unit]) / max(1, len(self.by_unit)) ** 0.5
        kept = switches(self.scorer.shares, codes, self.config.min_share).tolist()
        return [
            Candidate(
                kernel=self._kernel(codes_of_one, names[i] if names else None),
                pattern=" | ".join(self.alphabet.pattern(plane, self.config.columns) for plane in codes_of_one),
                scores=dict(zip(self.names, scores[i].tolist(), strict=True)),
                errors=dict(zip(self.names, errors[i].tolist(), strict=True)) if len(errors) else {},
                unit_errors=dict(zip(self.names, unit_errors[i].tolist(), strict=True)) if len(unit_errors) else {},
                ranks=self._ranks(scores[i], self.kept if kept[i] else None),
                excluded="" if kept[i] else self._reason(codes_of_one),
            )
            for i, codes_of_one in enumerate(kernels)
        ]

    def _kernel(self, codes: Codes, published: str | None) -> ThresholdKernel:
        if published is not None:
            return ThresholdKernel.named(published)
        config = self.config
        text = ".".join("_".join(self.alphabet.labels[i] for i in plane) for plane in codes)
        provenance = (
            f"design_lightning.kernels.search: {config.score}, reference {config.reference}, levels {self.alphabet.name}, "
            f"ties {config.ties}, min_share {config.min_share:g}, seed {config.seed}"
        )
        return self.alphabet.kernel(codes, config.columns, f"designed_{config.size}_{text}", provenance)

    def _ranks(self, scores: Tensor, among: Tensor | None) -> dict[str, int]:
        """1 and the number of better candidates, under each score; among all where the kernel is not kept itself."""
        ranks = {}
        for s, name in enumerate(self.names):
            better = self.values[s] * self.signs[s] > scores[s].float() * self.signs[s]
            ranks[name] = 1 + int((better if among is None else better & among).sum())
        return ranks

    def _reason(self, codes: Codes) -> str:
        """Which entry never switches, and how often it is on."""
        for plane in codes:
            for place, level in enumerate(plane):
                share = float(self.scorer.shares[place, level])
                if not self.config.min_share <= share <= 1 - self.config.min_share:
                    row, column = divmod(place, self.config.columns)
                    where = f"level {self.alphabet.labels[level]} at row {row + 1}, column {column + 1}"
                    return f"{where} is on in {share:.2%} of its pixels"
        return ""


def _bootstrap(groups: int, config: SearchConfig) -> list[Tensor]:
    """How often each resample holds each group: none where there is one group."""
    if groups < 2:
        return []
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randint(0, groups, (config.resamples, groups), generator=generator)
    return [torch.bincount(row, minlength=groups).double() for row in drawn]


def _spread(samples: list[Tensor]) -> Tensor:
    """The standard deviation over samples; empty where there are fewer than two."""
    return torch.stack(samples).std(0) if len(samples) > 1 else torch.empty(0)
