"""The scores of a threshold kernel, from pooled moments.

With o = 1 where the map reaches the threshold of its phase, else 0, and r the full-precision reference:

    tv                    mean of |o - o'| over all pairs of horizontal and vertical neighbours: the paper's choice
    weighted_tv           the same of t o, the output weighted by its threshold t, divided by the highest level
    mse                   mean of (r - o)^2
    psnr                  10 log10(1 / mse), in dB
    weighted_psnr         the same of the output weighted by its threshold, divided by the highest level
    residual_correlation  |corr(r - o, r)|: how much of the signal the residual holds; 0 is a pure dither
    mutual_information    I(r; o | phase) in bits: what a bit says of the reference to one who knows the kernel

Each is of a unit (a filter of a seed, or a layer of a network), over the pixels of all images alike, and then averaged over
units. Each place of the kernel counts alike, and so does each pair of places, however many pixels they meet: a mean over pixels
would prefer the phase in which a kernel meets the edge of the map well. What this makes of each:

    tv, weighted_tv            sums over the kernel's neighbouring places of one table of two levels
    mse, mutual_information    sums over the kernel's places of one table of one level
    the others                 functions of such sums, unit by unit: mse; weighted mse; share of ones and sum of r over them

Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from design_lightning.kernels.search.alphabet import Alphabet
from design_lightning.kernels.search.moments import Moments

ScoreName = Literal["tv", "weighted_tv", "mse", "psnr", "weighted_psnr", "residual_correlation", "mutual_information"]


@dataclass(frozen=True)
class Score:
    """What a score is called in tables, what it is, and which end of it is good."""

    short: str
    title: str
    highest: bool


SCORES: dict[str, Score] = {
    "tv": Score("tv", "total variation", True),
    "weighted_tv": Score("wtv", "weighted total variation", True),
    "mse": Score("mse", "mean squared error", False),
    "psnr": Score("psnr", "PSNR (dB)", True),
    "weighted_psnr": Score("wpsnr", "weighted PSNR (dB)", True),
    "residual_correlation": Score("rcorr", "residual correlation", False),
    "mutual_information": Score("mi", "mutual information (bits)", True),
}


class Scorer:
    """Scores kernels by the moments of all groups together.

    Args:
        moments: of maps, with cells of the alphabet's values.
        alphabet: which values the codes of a kernel stand for.
        rows: h of the kernels.
        columns: w.
        device: where to compute; float64 in any case.
        levels: how many of the alphabet's levels the kernels have, all if not given: fewer are looked up faster.
    """

    def __init__(
        self,
        moments: Moments,
        alphabet: Alphabet,
        rows: int,
        columns: int,
        device: torch.device | str = "cpu",
        levels: int | None = None,
    ) -> None:
        pooled = moments.total()
        cells, sums, pairs = (part[0].to(device) for part in (pooled.cells, pooled.sums, pooled.pairs))
        squares = pooled.squares[0].to(device)
        ordered = sorted({_float32(v) for v in alphabet.values})
        values = alphabet.values[:levels]
        cut = torch.tensor([ordered.index(_float32(v)) + 1 for v in values], device=device)
        weight = torch.tensor(values, dtype=torch.float64, device=device) / alphabet.peak
        self._levels = len(values)
        self._neighbours = _neighbours(rows, columns)
        pixels = cells.sum((2, 3))[:, :, None]  # [U, P, 1]
        whole = pixels * pixels.shape[1]  # by which a place's sums are divided, so that the places' sum is their mean
        joint = _from(cells, 2)[:, :, cut]  # [U, P, L, B]: pixels at or above a level
        self.shares: Tensor = joint.sum((0, 3)) / pixels.sum(0)
        """[P, L]: the share of ones at each place with each level, over all units."""
        ones, sums_on = joint.sum(3) / whole, _from(sums, 2)[:, :, cut] / whole  # [U, P, L]
        self._mean = (sums / whole).sum((1, 2))
        everywhere = squares[:, :, None] / whole
        self._square = everywhere.sum((1, 2))
        error = everywhere - 2 * sums_on + ones
        weighted = everywhere - 2 * weight * sums_on + weight.square() * ones
        information = _information(joint, cells.sum(2)[:, :, None]) / whole
        # [P L, 2] and [P L, U, 4]: looked up by products with the one-hot codes, which is a sum over places.
        self._linear = torch.stack([error.mean(0), information.mean(0)], -1).flatten(0, 1)
        self._by_unit = torch.stack([error, weighted, ones, sums_on], -1).movedim(0, 2).flatten(0, 1)
        self._by_pair = _variation(pairs, cut, weight).mean(0).flatten(0, 1).flatten(1, 2)  # [P 2, L L, 2]

    def __call__(self, codes: Tensor) -> Tensor:
        """The scores [n, S] of kernels [n, D, P], in the order of `SCORES`; of D slices, the mean of theirs."""
        count, depth, places = codes.shape
        flat = codes.reshape(count * depth, places)
        onehot = torch.nn.functional.one_hot(flat, self._levels).flatten(1).double()
        linear = onehot @ self._linear
        units = self._by_unit.shape[1]
        error, weighted, ones, sums_on = (onehot @ self._by_unit.flatten(1)).view(-1, units, 4).unbind(-1)
        variation = torch.zeros(len(flat), 2, dtype=torch.float64, device=flat.device)
        for table, (place, other) in zip(self._by_pair, self._neighbours, strict=True):
            variation += table[flat[:, place] * self._levels + flat[:, other]]
        scores = torch.stack(
            [
                variation[:, 0],
                variation[:, 1],
                linear[:, 0],
                _decibels(error).mean(1),
                _decibels(weighted).mean(1),
                self._correlation(ones, sums_on).mean(1),
                linear[:, 1],
            ],
            1,
        )
        return scores.view(count, depth, -1).mean(1)

    def _correlation(self, ones: Tensor, sums_on: Tensor) -> Tensor:
        """|corr(r - o, r)|; 0 where the residual is constant."""
        variance = self._square - self._mean.square()
        covariance = sums_on - self._mean * ones
        residual = variance + ones * (1 - ones) - 2 * covariance
        spread = (variance * residual).clamp_min(0).sqrt()
        return torch.where(spread > 1e-12, (variance - covariance).abs() / spread.clamp_min(1e-12), 0.0)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _neighbours(rows: int, columns: int) -> list[tuple[int, int]]:
    """The place of each place's right and lower neighbour, in the order of `Moments.pairs`."""
    return [
        (r * columns + c, other)
        for r in range(rows)
        for c in range(columns)
        for other in (r * columns + (c + 1) % columns, (r + 1) % rows * columns + c)
    ]


def _from(counts: Tensor, dim: int) -> Tensor:
    """Sums over index >= k along a dimension."""
    return counts.flip(dim).cumsum(dim).flip(dim)


def _decibels(error: Tensor) -> Tensor:
    """PSNR; an error below 1e-12 counts as that: 120 dB."""
    return -10 * error.clamp_min(1e-12).log10()


def _information(on: Tensor, all_bits: Tensor) -> Tensor:
    """Mutual information in bits of the reference's bins and the bit, times the pixels: [..., B] twice to [...]."""
    total = all_bits.sum(-1, keepdim=True).clamp_min(1)
    bits = torch.zeros_like(on[..., 0])
    for joint in (on, all_bits - on):
        ratio = joint * total / (joint.sum(-1, keepdim=True) * all_bits).clamp_min(1)
        bits += torch.special.xlogy(joint, ratio).sum(-1)
    return bits / torch.log(torch.tensor(2.0, dtype=torch.float64))


def _variation(pairs: Tensor, cut: Tensor, weight: Tensor) -> Tensor:
    """Variation, and weighted variation, of pairs [U, P, 2, K, K]: [U, P, 2, L, L, 2], whose sum over P and 2 is a mean."""
    reaching = _from(_from(pairs, 3), 4)
    both = reaching[..., cut, :][..., cut]
    first = reaching[..., cut, 0][..., :, None] - both
    second = reaching[..., 0, cut][..., None, :] - both
    first_weight, second_weight = weight[:, None], weight[None, :]
    weighted = first_weight.abs() * first + second_weight.abs() * second + (first_weight - second_weight).abs() * both
    count = pairs.sum((3, 4))  # none where the map is no larger than the kernel
    whole = count.clamp_min(1) * (count > 0).sum((1, 2)).view(-1, 1, 1)
    return torch.stack([first + second, weighted], -1) / whole[..., None, None, None]
