"""Pooled moments: the small tables from which every candidate is scored, gathered in one pass over the maps.

A pixel's bit depends on one entry of the kernel: that of its phase p, the place of the kernel that lies on it. A pair of
neighbours depends on two entries, always the same two. So a candidate needs no pass over the images: all it needs is, for
each phase, how many pixels reach each level, and for each phase and its neighbour, how many pairs reach each two levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from design_lightning.kernels.search.maps import MapBatch, Maps, Progress

BINS = 32
"""Bins of the reference in [0, 1] for its mutual information with the bits."""

_UNIT = 2.0**30
"""The reference is rounded to multiples of its inverse: the sums of a batch are exact, in any order and on any device."""


@dataclass(frozen=True)
class Moments:
    """Sums over the pixels of all maps, float64, on the CPU.

    A cell k of K is the number of thresholds that a value reaches. G groups of images, U units, P = h w phases, B bins.

    Args:
        cells: [G, U, P, K, B] pixels of each phase in each cell, by the bin of the reference.
        sums: [G, U, P, K] sum of the reference over them.
        squares: [G, U, P] sum of the squared reference over the pixels of each phase.
        pairs: [G, U, P, 2, K, K] pairs of a pixel and its right (0) or lower (1) neighbour, by both cells.
    """

    cells: Tensor
    sums: Tensor
    squares: Tensor
    pairs: Tensor

    def total(self, weights: Tensor | None = None) -> Self:
        """The sum over groups, each counted `weights[g]` times (once if not given), as a single group."""
        if weights is None:
            weights = torch.ones(len(self.cells), dtype=torch.float64)
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: torch.tensordot(weights, part, 1).unsqueeze(0) for name, part in parts.items()})

    def unit(self, number: int) -> Self:
        """The moments of one unit alone."""
        return type(self)(**{f.name: getattr(self, f.name)[:, number : number + 1] for f in fields(self)})


def collect_moments(
    maps: Maps,
    rows: int,
    columns: int,
    thresholds: Sequence[float],
    ties: bool = True,
    groups: int = 20,
    exact_bins: bool = False,
    progress: Progress | None = None,
) -> Moments:
    """Goes through the maps once; the memory needed does not depend on how many there are.

    Args:
        maps: what is thresholded.
        rows: h of the kernels.
        columns: w.
        thresholds: of which cells are made; any order.
        ties: whether a value equal to a threshold reaches it.
        groups: image i belongs to group i mod groups.
        exact_bins: the bin of the reference is the cell of the value, rather than one of `BINS`.
        progress: called with the number of images done and of all.

    Raises:
        ValueError: if a map is smaller than the kernel, or not finite, or there are none.
    """
    shape = (rows, columns)
    return collect_moments_of_shapes(maps, [shape], thresholds, ties, groups, exact_bins, progress)[shape]


def collect_moments_of_shapes(
    maps: Maps,
    shapes: Sequence[tuple[int, int]],
    thresholds: Sequence[float],
    ties: bool = True,
    groups: int = 20,
    exact_bins: bool = False,
    progress: Progress | None = None,
) -> dict[tuple[int, int], Moments]:
    """As `collect_moments`, of kernels of several (rows, columns) in the same pass over the maps.

    The first shape must fit into every map. Of the others, those that do not are left out.
    """
    groups = max(1, min(groups, maps.image_count))
    tables = {shape: _Tables(maps, *shape, thresholds, ties, groups, exact_bins) for shape in dict.fromkeys(shapes)}
    for batch in maps:
        for shape in list(tables):
            if shape == shapes[0] or tables[shape].fit(batch):
                tables[shape].add(batch)
            else:
                del tables[shape]
        if progress is not None:
            progress(int(batch.images[-1]) + 1, maps.image_count)
    empty = (tables[shapes[0]].pixels() == 0).nonzero().tolist()
    if empty:
        raise ValueError(
            f"{maps.units[empty[0][1]]} has no maps of group {empty[0][0]} of the images; give more images"
        )
    return {shape: table.moments() for shape, table in tables.items()}


class _Tables:
    """The tables while they grow."""

    def __init__(
        self,
        maps: Maps,
        rows: int,
        columns: int,
        thresholds: Sequence[float],
        ties: bool,
        groups: int,
        exact_bins: bool,
    ) -> None:
        self.names, self.rows, self.columns, self.ties = maps.units, rows, columns, ties
        self.groups, self.units, self.exact_bins = groups, len(maps.units), exact_bins
        self.thresholds = torch.tensor(sorted(set(thresholds)), dtype=torch.float32)
        self.kinds = len(self.thresholds) + 1
        self.bins = self.kinds if exact_bins else BINS
        places = groups * self.units * rows * columns
        self.cells = torch.zeros(places * self.kinds * self.bins, dtype=torch.float64)
        self.sums = torch.zeros(places * self.kinds, dtype=torch.float64)
        self.pairs = torch.zeros(places * 2 * self.kinds**2, dtype=torch.float64)
        self.squares = torch.zeros(places, dtype=torch.float64)

    def fit(self, batch: MapBatch) -> bool:
        """Whether the kernels fit into a batch's maps."""
        return batch.values.shape[-2] >= self.rows and batch.values.shape[-1] >= self.columns

    def add(self, batch: MapBatch) -> None:
        """Counts the pixels of a batch."""
        values, device = batch.values.float(), batch.values.device
        height, width = values.shape[-2:]
        names = sorted({self.names[u] for u in batch.units.tolist()})
        if not self.fit(batch):
            raise ValueError(
                f"{names[0]}: its maps of {height}x{width} pixels are smaller than a kernel of {self.rows}x{self.columns}; "
                "leave it out, or use a smaller size"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{names[0]}: a map of image {int(batch.images[0])} or one after it is not finite")
        kinds = self.kinds
        cell = torch.bucketize(values, self.thresholds.to(device), right=self.ties)
        reference = (batch.reference.double() * _UNIT).round() / _UNIT
        reference = reference.expand_as(cell)
        unit = (batch.images % self.groups)[:, None] * self.units + batch.units
        row = torch.arange(height, device=device) % self.rows
        column = torch.arange(width, device=device) % self.columns
        phase = row[:, None] * self.columns + column
        place = unit.to(device)[:, :, None, None] * (self.rows * self.columns) + phase
        bins = cell if self.exact_bins else (reference * BINS).long().clamp(0, BINS - 1)
        self.cells += _count((place * kinds + cell) * self.bins + bins, len(self.cells))
        self.sums += _count(place * kinds + cell, len(self.sums), reference)
        self.squares += _count(place, len(self.squares), reference.square())
        first = place * (2 * kinds * kinds) + cell * kinds
        self.pairs += _count(first[..., :-1] + cell[..., 1:], len(self.pairs))
        self.pairs += _count(first[..., :-1, :] + kinds * kinds + cell[..., 1:, :], len(self.pairs))

    def pixels(self) -> Tensor:
        """[G, U] how many there are."""
        return self.cells.view(self.groups, self.units, -1).sum(-1)

    def moments(self) -> Moments:
        """The tables as they stand."""
        places = (self.groups, self.units, self.rows * self.columns)
        return Moments(
            self.cells.view(*places, self.kinds, self.bins),
            self.sums.view(*places, self.kinds),
            self.squares.view(places),
            self.pairs.view(*places, 2, self.kinds, self.kinds),
        )


def _count(index: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    flat = None if weights is None else weights.flatten()
    return torch.bincount(index.flatten(), flat, minlength=size).double().cpu()
