"""Bits and small numbers, several to a byte: what the backward pass keeps of a tensor of +-1, or of a derivative.

They are packed along one axis, the k-th eighth (or half) of it into the k-th bits of a byte. So every step reads and writes
runs of memory whatever the layout is, and a compiler makes one loop of it. Plain operations of torch throughout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packing_axis(shape: Sequence[int]) -> int:
    """The axis to pack along: the first behind the batch whose size is a multiple of 8, else the last (which is filled up).

    For a compiler it is the batch, if that is a multiple of 8: it may lay out the others as it likes, and its loops over them
    remain vector code.
    """
    if torch.compiler.is_compiling() and shape[0] % 8 == 0 and shape[0]:
        return 0
    for axis in range(1, len(shape)):
        if shape[axis] % 8 == 0 and shape[axis]:
            return axis
    return len(shape) - 1


def packed_axis(packed: Sequence[int], shape: Sequence[int]) -> int:
    """The axis along which a tensor of a shape was packed, from the shape that it got: whoever unpacks need not be who packed."""
    shorter = (axis for axis, (kept, size) in enumerate(zip(packed, shape, strict=True)) if kept != size)
    return next(shorter, len(shape) - 1)


def pack_bits(bits: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """Eight zeros and ones, of any type, to a byte: uint8, with an eighth of the size along `axis`, rounded up."""
    parts = _parts(bits, 8, axis)
    packed = parts[-1]
    for part in reversed(parts[:-1]):
        packed = torch.add(part, packed, alpha=2)
    return packed.to(torch.uint8) if out is None else out.copy_(packed)


def unpack_bits(packed: Tensor, axis: int, size: int) -> Tensor:
    """The 0 and 1 of `pack_bits`, uint8, `size` of them along `axis`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return _joined((packed.unsqueeze(axis) >> _along(shifts, axis, packed.dim() + 1)) & 1, axis, size)


def pack_nibbles(codes: Tensor, axis: int) -> Tensor:
    """Two whole numbers from 0 to 15, of any type, to a byte: uint8, with half of the size along `axis`, rounded up."""
    low, high = _parts(codes, 2, axis)
    return torch.add(low, high, alpha=16).to(torch.uint8)


def unpack_nibbles(packed: Tensor, axis: int, size: int) -> Tensor:
    """The numbers of `pack_nibbles`, uint8, `size` of them along `axis`."""
    shifts = torch.tensor([0, 4], dtype=torch.uint8, device=packed.device)
    return _joined((packed.unsqueeze(axis) >> _along(shifts, axis, packed.dim() + 1)) & 15, axis, size)


def _parts(values: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    missing = -values.shape[axis] % count
    if missing:
        after = values.dim() - 1 - axis
        values = F.pad(values, [0, 0] * after + [0, missing])
    return values.unflatten(axis, (count, -1)).unbind(axis)


def _along(values: Tensor, axis: int, dims: int) -> Tensor:
    return values.view(-1, *[1] * (dims - 1 - axis))


def _joined(parts: Tensor, axis: int, size: int) -> Tensor:
    joined = parts.flatten(axis, axis + 1)
    return joined if joined.shape[axis] == size else joined.narrow(axis, 0, size)


def packed_shape(shape: Sequence[int], axis: int, to_a_byte: int) -> tuple[int, ...]:
    """The shape of what was packed."""
    return tuple(-(-size // to_a_byte) if i == axis else size for i, size in enumerate(shape))
