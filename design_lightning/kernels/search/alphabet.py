"""The levels that a search puts at a kernel's places, in the domain of the maps that it looks at."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.published import PUBLISHED_LEVELS
from design_lightning.kernels.quantizer import lloyd_max_half_normal

LevelsName = Literal["codes", "published", "exact"]
Codes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Alphabet:
    """Levels in increasing order.

    Args:
        name: `codes`, `published`, `exact` or `custom`; see `of`.
        labels: what tables call each level.
        values: what a map is compared with.
        thresholds: what a kernel that is written holds, in standard deviations of a batch-normalised input.
        size: how many of the levels the search may use; those behind are of published kernels alone, to score them.
    """

    name: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    thresholds: tuple[float, ...]
    size: int

    @classmethod
    def of(cls, levels: LevelsName | Sequence[float]) -> Self:
        """An alphabet by name, or of thresholds of one's own.

        `codes`: 0, 1, 3, 5, 7, 9, the outputs of a ReLU behind a 3x3 convolution of +-1 by +-1, on such maps as they are; a
        kernel is written with the published threshold of each code. `published`: those thresholds ("entry scaling"), on
        standardised maps. `exact`: those of `lloyd_max_half_normal(7)`, the same.

        Raises:
            ValueError: if the name is unknown, or the numbers are fewer than two, not finite, not increasing or not above 0
                at the end.
        """
        codes = tuple(map(str, PUBLISHED_LEVELS))
        published = tuple(PUBLISHED_LEVELS.values())
        if levels == "codes":
            return cls("codes", codes, tuple(map(float, PUBLISHED_LEVELS)), published, len(codes))
        if levels == "published":
            return cls("published", codes, published, published, len(codes))
        if levels == "exact":
            exact = lloyd_max_half_normal(len(codes) + 1)
            return cls("exact", codes, exact, exact, len(codes))
        if isinstance(levels, str):
            raise ValueError(f"unknown levels {levels!r}: use one of {', '.join(get_args(LevelsName))}, or numbers")
        values = tuple(map(float, levels))
        increasing = all(a < b for a, b in itertools.pairwise(values))
        if len(values) < 2 or not all(map(math.isfinite, values)) or not increasing or values[-1] <= 0:
            raise ValueError(
                f"levels {list(levels)}: give at least two finite numbers in increasing order, the last above 0"
            )
        return cls("custom", tuple(f"{v:g}" for v in values), values, values, len(values))

    @property
    def standardised(self) -> bool:
        """Whether the values are in standard deviations of the map, rather than in its own unit."""
        return self.name != "codes"

    @property
    def peak(self) -> float:
        """The highest level of the search: what counts as 1 in scores that compare a map with bits."""
        return self.values[self.size - 1]

    def with_levels_of(self, kernels: Iterable[ThresholdKernel]) -> Self:
        """The alphabet, and behind it those levels of the kernels that it lacks. Codes gain none: a threshold has no code."""
        if self.name == "codes":
            return self
        known = self
        for kernel in kernels:
            for level in (level for plane in kernel.levels for row in plane for level in row):
                if known._index(level) is None:
                    known = replace(
                        known,
                        labels=(*known.labels, f"{level:.2f}"),
                        values=(*known.values, level),
                        thresholds=(*known.thresholds, level),
                    )
        return known

    def codes_of(self, kernel: ThresholdKernel) -> Codes | None:
        """The index of the level at each place [D][h w] of a kernel, or None if one of them is not here."""
        found = [[self._index(level) for row in plane for level in row] for plane in kernel.levels]
        if any(index is None for plane in found for index in plane):
            return None
        return tuple(tuple(index for index in plane if index is not None) for plane in found)

    def _index(self, level: float) -> int | None:
        """A published threshold stands for its code, whatever this alphabet has in its place."""
        codes = {threshold: str(code) for code, threshold in PUBLISHED_LEVELS.items()}
        if self.name != "custom" and level in codes:
            return self.labels.index(codes[level])
        return self.thresholds.index(level) if level in self.thresholds else None

    def kernel(self, codes: Sequence[Sequence[int]], columns: int, name: str, provenance: str) -> ThresholdKernel:
        """The kernel of such indices [D][h w], with `columns` = w."""
        planes = [
            [[self.thresholds[i] for i in plane[row : row + columns]] for row in range(0, len(plane), columns)]
            for plane in codes
        ]
        return ThresholdKernel(planes, name=name, provenance=provenance)

    def pattern(self, codes: Sequence[int], columns: int) -> str:
        """One slice as its labels: `1 1; 0 3`."""
        labels = [self.labels[i] for i in codes]
        return "; ".join(" ".join(labels[row : row + columns]) for row in range(0, len(labels), columns))
