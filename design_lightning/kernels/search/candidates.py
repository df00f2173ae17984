"""What a search looks through: every assignment of levels to the places of a kernel, or those with a symmetry."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Family = Literal["none", "complement", "shift"]
DEPTHS: dict[str, int] = {"none": 1, "complement": 2, "shift": 4}
"""The channels of a family's kernels: those of the published ones."""

MOST = 6**9
"""All kernels of 3x3 places and six levels; more would not fit into memory."""


@dataclass(frozen=True)
class Candidates:
    """Kernels of h x w places, numbered: the first place is the highest digit of a number whose base is the levels.

    Args:
        rows: h.
        columns: w.
        levels: how many levels a place can take.
        symmetric: corners alike, edges alike; only 3x3.
        family: `none` for kernels of one channel. `complement` is a kernel and its complement (level i of L becomes
            L - 1 - i), `shift` a kernel and three more, each a level further up, circularly.

    Raises:
        ValueError: if there are more than `MOST`, or the symmetry is asked of another size, or the family is unknown.
    """

    rows: int
    columns: int
    levels: int = 6
    symmetric: bool = False
    family: Family = "none"

    def __post_init__(self) -> None:
        size = f"{self.rows}x{self.columns}"
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"size {size}: a kernel has at least one row and one column")
        if self.family not in get_args(Family):
            raise ValueError(f"unknown family {self.family!r}: use one of {', '.join(get_args(Family))}")
        if self.symmetric and (self.rows, self.columns) != (3, 3):
            raise ValueError(f"size {size}: only 3x3 has the symmetry corner, edge, centre; leave `symmetric` out")
        if self.count > MOST:
            raise ValueError(
                f"size {size} with {self.levels} levels has {self.count:,} candidates, more than {MOST:,}: use a smaller size "
                "(3x3, 2x4, ...) or fewer levels"
            )

    def __len__(self) -> int:
        return self.count

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.levels ** (3 if self.symmetric else self.places))

    @property
    def places(self) -> int:
        """P = h w, row by row."""
        return self.rows * self.columns

    @property
    def depth(self) -> int:
        """D: how many channels a kernel of the family has."""
        return DEPTHS[self.family]

    def codes(self, numbers: Tensor) -> Tensor:
        """The level [n, D, P] at each place of the candidates with these numbers [n]."""
        digits = 3 if self.symmetric else self.places
        powers = self.levels ** torch.arange(digits - 1, -1, -1, device=numbers.device)
        base = numbers[:, None] // powers % self.levels
        if self.symmetric:  # digits: corner, edge, centre
            base = base[:, [0, 1, 0, 1, 2, 1, 0, 1, 0]]
        return self.with_family(base)

    def with_family(self, base: Tensor) -> Tensor:
        """The slices [n, D, P] that follow from the first [n, P]."""
        if self.family == "complement":
            return torch.stack([base, self.levels - 1 - base], 1)
        return torch.stack([(base + step) % self.levels for step in range(self.depth)], 1)

    def chunks(self, size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """The numbers of all candidates, `size` at a time."""
        for start in range(0, len(self), size):
            yield torch.arange(start, min(start + size, len(self)), device=device)

    def translations(self, codes: Sequence[int]) -> set[tuple[int, ...]]:
        """A slice in each of its phases: rows and columns rotated."""
        grid = [tuple(codes[r * self.columns : (r + 1) * self.columns]) for r in range(self.rows)]
        return {
            tuple(
                grid[(r + i) % self.rows][(c + j) % self.columns] for r in range(self.rows) for c in range(self.columns)
            )
            for i in range(self.rows)
            for j in range(self.columns)
        }
