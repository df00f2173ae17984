"""The elementwise work of the binary layers, between floats and bits.

In eager mode on a CPU it goes through the batch in pieces, so that what one operation leaves in the cache is there for the
next, and a chain of them costs about one pass over memory. On a GPU `binary.triton_kernels` does the same in one kernel.
Compilers fuse the operations by themselves.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from design_lightning.binary._indicator import indicator, is_eager_on_cpu
from design_lightning.binary.derivatives import Code, decode, encode
from design_lightning.binary.estimators import Estimator
from design_lightning.binary.packing import pack_bits, packed_axis, packed_shape, packing_axis, unpack_bits
from design_lightning.binary.plain import distance, sign


def signs_and_derivative(
    x: Tensor, threshold: Tensor, estimator: Estimator, code: Code, with_bits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The signs of x - threshold, what is kept of the derivative, and the signs as bits if asked for."""
    if kernels := _kernels_for(x, x.shape, x.dtype):
        signs, kept, bits = kernels.signs_and_derivative(x, threshold, estimator, code, with_bits)
        return signs, kept, bits
    if not goes_in_pieces(x):
        y = sign(x, threshold)
        return y, encode(distance(x, threshold), estimator, code), bits_of(y) if with_bits else None
    y, axis, kept = torch.empty_like(x), packing_axis(x.shape), None
    bits = torch.empty(packed_shape(x.shape, axis, 8), dtype=torch.uint8) if with_bits else None
    one_for_all = threshold.dim() < x.dim() or threshold.shape[0] == 1
    # Two pieces of memory, which stay in the cache from the first part of the batch to the last.
    dtype = torch.promote_types(x.dtype, torch.float32)
    first = x[next(pieces(x))]
    distances, indicators = (torch.empty_like(first, dtype=dtype) for _ in range(2))
    for rows in pieces(x):
        piece, its_threshold = x[rows], threshold if one_for_all else threshold[rows]
        u = torch.sub(piece, its_threshold, out=distances[: len(piece)])
        if dtype == torch.float64:  # the sign compares in float32
            above = torch.ge(piece.float(), its_threshold, out=indicators[: len(piece)])
        else:
            above = torch.ge(u, 0, out=indicators[: len(piece)])
        _write_signs(above, y[rows])
        if bits is not None:
            pack_bits(above, axis, out=bits[rows])
        part = encode(u, estimator, code)
        if kept is None:
            kept = part.new_empty(x.shape[0], *part.shape[1:])
        kept[rows] = part
    assert kept is not None
    return y, kept, bits


def _write_signs(above: Tensor, out: Tensor) -> None:
    """1 and 0 as +1 and -1."""
    if out.dtype == above.dtype:
        torch.add(_MINUS_ONE.to(above.dtype), above, alpha=2, out=out)
    else:
        out.copy_(above.mul(2).sub_(1))


def bits_of(signs: Tensor) -> Tensor:
    """+-1 as bits."""
    axis = packing_axis(signs.shape)
    if not goes_in_pieces(signs):
        return pack_bits(indicator(torch.gt, signs, 0), axis)
    bits = torch.empty(packed_shape(signs.shape, axis, 8), dtype=torch.uint8)
    for rows in pieces(signs):
        pack_bits(indicator(torch.gt, signs[rows], 0), axis, out=bits[rows])
    return bits


def signs_of(bits: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """The +-1 again, of a shape and type, in one of torch's memory formats."""
    axis = packed_axis(bits.shape, shape)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if kernels := _kernels_for(bits, shape, dtype):
        return cast(Tensor, kernels.signs_of(bits, shape, dtype, memory_format))
    if not is_eager_on_cpu(bits) or bits.dim() < 2:
        signs = unpack_bits(bits, axis, shape[axis]).to(dtype).mul_(2).sub_(1)
        return signs.contiguous(memory_format=memory_format)
    signs = torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format)
    for rows in pieces(signs):
        _write_signs(unpack_bits(bits[rows], axis, shape[axis]).to(dtype), signs[rows])
    return signs


def through_derivative(gradient: Tensor, kept: Tensor, step: Tensor, estimator: Estimator, code: Code) -> Tensor:
    """A gradient times the derivative that was kept: float32, or the gradient's type where no bit is lost by it."""
    if code != "float" and (kernels := _kernels_for(gradient, gradient.shape, gradient.dtype)):
        return cast(Tensor, kernels.through_derivative(gradient, kept, step, estimator, code))
    if not goes_in_pieces(gradient):
        return gradient * decode(kept, step, estimator, code, gradient.shape, gradient.dtype)
    flow = None
    for rows in pieces(gradient):
        part = gradient[rows]
        derivative = decode(kept[rows], step, estimator, code, part.shape, part.dtype)
        if flow is None:
            flow = torch.empty_like(gradient, dtype=torch.promote_types(part.dtype, derivative.dtype))
        torch.mul(part, derivative, out=flow[rows])
    assert flow is not None
    return flow


def clamped_and_inside(x: Tensor, lowest: float, highest: float) -> tuple[Tensor, Tensor]:
    """x between two bounds, and a bit for each element: whether it lies strictly between them."""
    axis = packing_axis(x.shape)
    if not goes_in_pieces(x):
        return x.clamp(lowest, highest), pack_bits(_inside(x, lowest, highest), axis)
    y, bits = torch.empty_like(x), torch.empty(packed_shape(x.shape, axis, 8), dtype=torch.uint8)
    for rows in pieces(x):
        torch.clamp(x[rows], lowest, highest, out=y[rows])
        pack_bits(_inside(x[rows], lowest, highest), axis, out=bits[rows])
    return y, bits


def where_inside(gradient: Tensor, bits: Tensor) -> Tensor:
    """A gradient, and 0 where the bit of `clamped_and_inside` is 0."""
    axis = packed_axis(bits.shape, gradient.shape)
    size = gradient.shape[axis]
    if not goes_in_pieces(gradient):
        return gradient * unpack_bits(bits, axis, size).to(gradient.dtype)
    flow = torch.empty_like(gradient)
    for rows in pieces(gradient):
        torch.mul(gradient[rows], unpack_bits(bits[rows], axis, size).to(gradient.dtype), out=flow[rows])
    return flow


def _inside(x: Tensor, lowest: float, highest: float) -> Tensor:
    return indicator(torch.gt, x, lowest).mul_(indicator(torch.lt, x, highest))


def _kernels_for(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> ModuleType | None:
    """The Triton kernels, if they are there and take a tensor of this shape and type, which lies where x does."""
    if torch.compiler.is_compiling() or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    if not _has_triton():
        return None
    from design_lightning.binary import triton_kernels

    return triton_kernels if triton_kernels.serve(x, shape, dtype) else None


@cache
def _has_triton() -> bool:
    """Not for every platform is there one."""
    return importlib.util.find_spec("triton") is not None


def pieces(x: Tensor) -> Iterator[slice]:
    """Parts of the batch that stay in a CPU's cache while a chain of operations goes over them."""
    rows = max(1, PIECE * x.shape[0] // max(x.numel(), 1))
    return (slice(start, start + rows) for start in range(0, x.shape[0], rows))


def goes_in_pieces(x: Tensor) -> bool:
    """Whether work on x is done piece by piece."""
    return is_eager_on_cpu(x) and x.dim() > 1 and x.numel() > PIECE


_MINUS_ONE = torch.tensor(-1.0)

PIECE = 1 << 20
"""Elements: 4 MB of float32. Smaller pieces are a little faster on an idle machine, and far slower on a busy one."""
