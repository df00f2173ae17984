"""The elementwise work of the binary layers, between floats and bits.

In eager mode on a CPU it goes through the batch sample by sample, so that what one operation leaves in the cache is there for
the next, and a chain of them costs about one pass over memory. Compilers fuse the same operations by themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from design_lightning.binary._indicator import indicator, is_eager_on_cpu
from design_lightning.binary.derivatives import Code, decode, encode
from design_lightning.binary.estimators import Estimator
from design_lightning.binary.packing import pack_bits, packed_shape, packing_axis, unpack_bits
from design_lightning.binary.plain import distance, sign


def signs_and_derivative(
    x: Tensor, threshold: Tensor, estimator: Estimator, code: Code, with_bits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The signs of x - threshold, what is kept of the derivative, and the signs as bits if asked for."""
    if not _goes_by_sample(x):
        y = sign(x, threshold)
        return y, encode(distance(x, threshold), estimator, code), bits_of(y) if with_bits else None
    y = torch.empty_like(x)
    axis = packing_axis(x.shape)
    bits = torch.empty(packed_shape(x.shape, axis, 8), dtype=torch.uint8) if with_bits else None
    kept = None
    one_for_all = threshold.dim() < x.dim() or threshold.shape[0] == 1
    for i in range(x.shape[0]):
        sample, its_threshold = x[i : i + 1], threshold if one_for_all else threshold[i : i + 1]
        above = indicator(torch.ge, sample.float(), its_threshold)
        y[i : i + 1] = above.mul(2).sub_(1)
        if bits is not None:
            pack_bits(above, axis, out=bits[i : i + 1])
        part = encode(distance(sample, its_threshold), estimator, code)
        if kept is None:
            kept = part.new_empty(x.shape[0], *part.shape[1:])
        kept[i : i + 1] = part
    assert kept is not None
    return y, kept, bits


def bits_of(signs: Tensor) -> Tensor:
    """+-1 as bits."""
    axis = packing_axis(signs.shape)
    if not _goes_by_sample(signs):
        return pack_bits(indicator(torch.gt, signs, 0), axis)
    bits = torch.empty(packed_shape(signs.shape, axis, 8), dtype=torch.uint8)
    for i in range(signs.shape[0]):
        pack_bits(indicator(torch.gt, signs[i : i + 1], 0), axis, out=bits[i : i + 1])
    return bits


def signs_of(bits: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """The +-1 again, of a shape and type, in one of torch's memory formats."""
    axis = packing_axis(shape)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if not _goes_by_sample(bits):
        signs = unpack_bits(bits, axis, shape[axis]).to(dtype).mul_(2).sub_(1)
        return signs.contiguous(memory_format=memory_format)
    signs = torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format)
    for i in range(shape[0]):
        signs[i : i + 1] = unpack_bits(bits[i : i + 1], axis, shape[axis]).to(dtype).mul_(2).sub_(1)
    return signs


def through_derivative(gradient: Tensor, kept: Tensor, step: Tensor, estimator: Estimator, code: Code) -> Tensor:
    """A gradient times the derivative that was kept: float32, or the gradient's type where no bit is lost by it."""
    if not _goes_by_sample(gradient):
        return gradient * decode(kept, step, estimator, code, gradient.shape, gradient.dtype)
    flow = None
    for i in range(gradient.shape[0]):
        part = gradient[i : i + 1]
        product = part * decode(kept[i : i + 1], step, estimator, code, part.shape, part.dtype)
        if flow is None:
            flow = torch.empty_like(gradient, dtype=product.dtype)
        flow[i : i + 1] = product
    assert flow is not None
    return flow


def _goes_by_sample(x: Tensor) -> bool:
    return is_eager_on_cpu(x) and x.dim() > 1 and x.shape[0] > 1 and x[0].numel() >= _LEAST


_LEAST = 1 << 14
"""Elements of a sample from which on a step for each of them costs less than it saves."""
