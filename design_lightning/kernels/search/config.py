"""`SearchConfig`: everything that decides how kernels are searched, as one immutable value."""

import re
from dataclasses import dataclass
from typing import get_args

import torch

from design_lightning._names import did_you_mean, in_a_line
from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.published import PUBLISHED
from design_lightning.kernels.search.alphabet import Alphabet, LevelsName
from design_lightning.kernels.search.candidates import DEPTHS, Candidates, Family
from design_lightning.kernels.search.maps import Reference
from design_lightning.kernels.search.scores import SCORES, ScoreName


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
        seed: of the filters, the order of the images, and the bootstrap; from 0 to 2^32 - 1.
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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, but must be at least 0 and below 2^32")
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
        """The levels, and behind them those of published kernels that it lacks."""
        return Alphabet.of(self.levels).with_levels_of([*self.published, *self.others])

    @property
    def candidates(self) -> Candidates:
        """What is searched."""
        return Candidates(self.rows, self.columns, Alphabet.of(self.levels).size, self.symmetric, self.family)

    @property
    def published(self) -> list[ThresholdKernel]:
        """The published kernels of this shape."""
        return [kernel for kernel in map(ThresholdKernel.named, PUBLISHED) if kernel.shape == self._shape]

    @property
    def others(self) -> list[ThresholdKernel]:
        """The published kernels of other shapes: they have scores on the same maps, but no ranks."""
        return [kernel for kernel in map(ThresholdKernel.named, PUBLISHED) if kernel.shape != self._shape]

    @property
    def _shape(self) -> tuple[int, int, int]:
        return DEPTHS[self.family], self.rows, self.columns
