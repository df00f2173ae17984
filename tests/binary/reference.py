"""SPEC sections 1, 2 and 3 written out element by element: slow, plain, and independent of the library's code."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

F32 = np.float32


def places(shape: tuple[int, ...], layout: str, grid: tuple[int, int] | None, prefix: int) -> Iterator:
    """Of each element: its index, and (channel, row, column, rows, columns) of it, or None for a token before the grid."""
    for index in np.ndindex(*shape):
        if len(shape) == 2:
            yield index, (index[1], 0, 0, 1, 1)
        elif layout == "NCHW":
            yield index, (index[-3], index[-2], index[-1], shape[-2], shape[-1])
        elif len(shape) > 3:
            yield index, (index[-1], index[-3], index[-2], shape[-3], shape[-2])
        elif grid is None:
            yield index, (index[2], 0, index[1], 1, shape[1])
        elif index[1] < prefix:
            yield index, None
        else:
            place = index[1] - prefix
            yield index, (index[2], place // grid[1], place % grid[1], *grid)


def design_thresholds(
    levels: np.ndarray,
    shape: tuple[int, ...],
    layout: str = "NCHW",
    scale: float = 1.0,
    gamma: np.ndarray | None = None,
    align: str = "topleft",
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
) -> np.ndarray:
    """t[b, c, i, j] = (s g[c]) K[c mod D, (i + oi) mod h, (j + oj) mod w] in float32, for an input of any layout."""
    kernel = np.asarray(levels, dtype=F32)
    if layout == "NHWC" and len(shape) == 3 and grid is None:
        kernel = kernel.reshape(kernel.shape[0], 1, -1)  # along the tokens, the kernel is read row by row
    depth, h, w = kernel.shape
    thresholds = np.zeros(shape, dtype=F32)
    for index, place in places(shape, layout, grid, prefix):
        if place is None:
            continue
        c, i, j, rows, columns = place
        oi = (math.ceil(rows / h) * h - rows) // 2 if align == "center" else 0
        oj = (math.ceil(columns / w) * w - columns) // 2 if align == "center" else 0
        factor = F32(scale) * (F32(1) if gamma is None else F32(gamma[c]))
        thresholds[index] = factor * kernel[c % depth, (i + oi) % h, (j + oj) % w]
    return thresholds


def shifted_sign(x: torch.Tensor, thresholds: np.ndarray) -> torch.Tensor:
    """+1 where x.float() >= t, else -1: element by element, of the type of x."""
    values = x.detach().float().numpy()
    signs = np.empty(values.shape, dtype=F32)
    for index in np.ndindex(*values.shape):
        signs[index] = 1 if values[index] >= thresholds[index] else -1
    return torch.from_numpy(signs).to(x.dtype)


def ste(u: float, clip: float = 1.0) -> float:
    return 1.0 if abs(u) <= clip else 0.0


def approx_sign(u: float) -> float:
    return max(0.0, 2 - 2 * abs(u))


def swish_sign(u: float, beta: float = 5.0) -> float:
    b = beta
    return b * (2 - b * u * math.tanh(b * u / 2)) / (1 + math.cosh(b * u)) if abs(b * u) < 300 else 0.0


def ede(u: float, temperature: float = 0.1) -> float:
    t = temperature
    return max(1 / t, 1) * t * (1 - math.tanh(t * u) ** 2)


def reste(u: float, temperature: float = 1.0) -> float:
    o = temperature
    if abs(u) > 1.5:
        return 0.0
    if abs(u) < 0.1:
        return 0.1 ** (1 / o) / 0.1
    return (1 / o) * abs(u) ** ((1 - o) / o)


ESTIMATORS: dict[str, Callable[..., float]] = {
    "ste": ste,
    "approx_sign": approx_sign,
    "swish_sign": swish_sign,
    "ede": ede,
    "reste": reste,
}


def rows_of(w: torch.Tensor) -> list[list[float]]:
    return w.detach().double().flatten(1).tolist()


def mean_abs(row: list[float]) -> float:
    return math.fsum(abs(v) for v in row) / len(row)


def standardised(row: list[float], epsilon: float) -> list[float]:
    mean = math.fsum(row) / len(row)
    variance = math.fsum((v - mean) ** 2 for v in row) / (len(row) - 1)
    return [(v - mean) / math.sqrt(variance + epsilon) for v in row]


def bit(value: float) -> float:
    return 1.0 if value >= 0 else -1.0


def weight_rows(name: str, w: torch.Tensor, alpha: list[float] | None = None) -> tuple[list[list[float]], list[float]]:
    """The signs [O, fan-in] and the scale [O] of a weight binarizer; `alpha` is the learned scale, mean |w| at first."""
    rows = rows_of(w)
    means = [mean_abs(row) for row in rows]
    if name == "recu":
        # (w - mean) / (sqrt(var + 1e-5) / (2 sqrt 2)); a clamp to [-Q, Q] with Q > 0 changes no sign.
        rows = [[2 * math.sqrt(2) * v for v in standardised(row, 1e-5)] for row in rows]
    if name == "irnet":
        rows = [standardised(row, 0.0) for row in rows]
    scale = {
        "sign": [1.0] * len(rows),
        "xnor": means,
        "learned": alpha or means,
        "recu": alpha or means,
        "irnet": [2.0 ** round(math.log2(mean_abs(row))) for row in rows],
    }[name]
    return [[bit(v) for v in row] for row in rows], scale


def binary_weight(name: str, w: torch.Tensor, alpha: list[float] | None = None) -> torch.Tensor:
    signs, scale = weight_rows(name, w, alpha)
    values = [[sign * factor for sign in row] for row, factor in zip(signs, scale, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view(w.shape).to(w.dtype)
