"""The elementwise work of the binary layers as Triton kernels: threshold and pack, unpack and estimator, each one pass over memory.

`binary.elementwise` takes them for tensors on a GPU in eager mode, and its own operations of torch elsewhere: what either keeps
and gives is the same to the last bit. With TRITON_INTERPRET=1 in the environment they run on a CPU, slowly, to be tested.

A byte of the packed tensor at (o, p, i) holds the elements (o, k, p, i), k from 0 to 7, of a tensor of which the packed axis is
split: [outer, 8, part, inner].
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from design_lightning.binary.derivatives import Code, encode, levels
from design_lightning.binary.estimators import STE, ApproxSign, Estimator
from design_lightning.binary.packing import packed_shape, packing_axis
from design_lightning.binary.plain import distance

_BLOCK = 256
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def serve(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the kernels take a tensor of this shape and type, and x, which is it or its bits: whole bytes, laid out densely."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and dtype in _FLOATS
        and len(shape) > 1
        and 0 < math.prod(shape) < 2**31
        and shape[packing_axis(shape)] % 8 == 0
        and (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)))
    )


def signs_and_derivative(
    x: Tensor, threshold: Tensor, estimator: Estimator, code: Code, with_bits: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `elementwise.signs_and_derivative`."""
    grid, period = _Grid.of(x), _period(threshold, x)
    y, bits = torch.empty_like(x), _bytes(x, 8) if with_bits else None
    kind = _KINDS.get(type(estimator), "") if code != "float" else ""
    kept, bound, step = None, 0.0, None
    if kind == "clip":
        assert isinstance(estimator, STE)
        kept, bound = _bytes(x, 8), estimator.clip
    elif kind == "approx_sign":
        kept, step = _bytes(x, 2), levels(estimator)[1].to(x.device)
    with torch.cuda.device_of(x):
        _threshold_and_pack[grid.programs](
            *(x, period, y, bits, kept, step, bound, grid.bytes, grid.part, grid.inner, period.numel()),
            BITS=with_bits,
            KIND=kind,
            BLOCK=_BLOCK,
        )
    return y, encode(distance(x, threshold), estimator, code) if kept is None else kept, bits


def signs_of(bits: Tensor, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """As `elementwise.signs_of`."""
    signs = torch.empty(tuple(shape), dtype=dtype, device=bits.device, memory_format=memory_format)
    grid, bits = _Grid.of(signs), bits.contiguous(memory_format=memory_format)
    with torch.cuda.device_of(bits):
        _unpack_signs[grid.programs](bits, signs, grid.bytes, grid.part, grid.inner, BLOCK=_BLOCK)
    return signs


def through_derivative(gradient: Tensor, kept: Tensor, step: Tensor, estimator: Estimator, code: Code) -> Tensor:
    """As `elementwise.through_derivative`, of a derivative that waits as a mask or as levels."""
    grid, kept = _Grid.of(gradient), kept.contiguous(memory_format=_format(gradient))
    is_mask = code == "mask"
    flow = torch.empty_like(gradient, dtype=gradient.dtype if is_mask else torch.float32)
    zero = 0 if is_mask else levels(estimator)[0]
    with torch.cuda.device_of(gradient):
        _through_derivative[grid.programs](
            *(gradient, kept, flow, step.to(gradient.device), zero, grid.bytes, grid.part, grid.inner),
            MASK=is_mask,
            BLOCK=_BLOCK,
        )
    return flow


class _Grid(NamedTuple):
    """The bytes of a packed tensor, in the order of memory."""

    bytes: int
    part: int
    inner: int

    @classmethod
    def of(cls, x: Tensor) -> "_Grid":
        axis = packing_axis(x.shape)
        return cls(x.numel() // 8, x.shape[axis] // 8, x.stride(axis))

    @property
    def programs(self) -> tuple[int]:
        return (triton.cdiv(self.bytes, _BLOCK),)


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _bytes(x: Tensor, to_a_byte: int) -> Tensor:
    """Room for what is packed of x, laid out as x is."""
    shape = packed_shape(x.shape, packing_axis(x.shape), to_a_byte)
    return torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=_format(x))


def _period(threshold: Tensor, x: Tensor) -> Tensor:
    """The thresholds of one image in the order of its memory, or one for all; where images differ, those of the batch."""
    if threshold.numel() == 1:
        return threshold.detach().reshape(1)
    differ = threshold.dim() == x.dim() and threshold.shape[0] != 1
    whole = threshold.detach().expand(x.shape if differ else (1, *x.shape[1:]))
    return whole.contiguous(memory_format=_format(x))


_KINDS: dict[type[Estimator], str] = {STE: "clip", ApproxSign: "approx_sign"}
"""The estimators whose derivative the first kernel computes; of any other it is computed by torch, and packed."""


@triton.jit
def _first_of_byte(at: Any, part: Any, inner: Any) -> Any:
    """Where the element of bit 0 of a byte lies; those of the other bits follow at distances of part * inner."""
    return ((at // (part * inner)) * 8 * part + (at // inner) % part) * inner + at % inner


@triton.jit
def _pair_of_byte(at: Any, k: Any, part: Any, inner: Any) -> Any:
    """Where two numbers of 4 bits lie, of the elements of bits k and k + 4 of a byte: the packed axis has four parts there."""
    return ((at // (part * inner)) * 4 * part + k * part + (at // inner) % part) * inner + at % inner


@triton.jit
def _nearest_even(value: Any) -> Any:
    up = tl.floor(value + 0.5)
    tie_to_odd = (up - value == 0.5) & (up - 2 * tl.floor(up / 2) == 1)
    return tl.where(tie_to_odd, up - 1, up)


@triton.jit
def _threshold_and_pack(
    x: Any,
    threshold: Any,
    y: Any,
    bits: Any,
    kept: Any,
    step: Any,
    bound: Any,
    count: Any,
    part: Any,
    inner: Any,
    period: Any,
    BITS: tl.constexpr,  # noqa: N803  constants of a kernel are written so
    KIND: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    first = _first_of_byte(at, part, inner)
    signs = tl.zeros((BLOCK,), dtype=tl.int32)
    mask = tl.zeros((BLOCK,), dtype=tl.int32)
    for k in tl.static_range(4):
        low = first + k * part * inner
        high = first + (k + 4) * part * inner
        low_x = tl.load(x + low, mask=valid, other=0.0).to(tl.float32)
        high_x = tl.load(x + high, mask=valid, other=0.0).to(tl.float32)
        low_threshold = tl.load(threshold + low % period, mask=valid, other=0.0)
        high_threshold = tl.load(threshold + high % period, mask=valid, other=0.0)
        low_above = low_x >= low_threshold
        high_above = high_x >= high_threshold
        tl.store(y + low, tl.where(low_above, 1.0, -1.0).to(y.dtype.element_ty), mask=valid)
        tl.store(y + high, tl.where(high_above, 1.0, -1.0).to(y.dtype.element_ty), mask=valid)
        if BITS:
            signs |= (low_above.to(tl.int32) << k) | (high_above.to(tl.int32) << (k + 4))
        low_size = tl.abs(low_x - low_threshold)
        high_size = tl.abs(high_x - high_threshold)
        if KIND == "clip":
            mask |= ((low_size <= bound).to(tl.int32) << k) | ((high_size <= bound).to(tl.int32) << (k + 4))
        if KIND == "approx_sign":
            size = tl.load(step)
            # A comparison, not a maximum: a NaN becomes 0.
            low_level = tl.where(low_size < 1, tl.div_rn(2 - 2 * low_size, size), 0.0)
            high_level = tl.where(high_size < 1, tl.div_rn(2 - 2 * high_size, size), 0.0)
            pair = _nearest_even(low_level).to(tl.int32) + 16 * _nearest_even(high_level).to(tl.int32)
            tl.store(kept + _pair_of_byte(at, k, part, inner), pair.to(tl.uint8), mask=valid)
    if BITS:
        tl.store(bits + at, signs.to(tl.uint8), mask=valid)
    if KIND == "clip":
        tl.store(kept + at, mask.to(tl.uint8), mask=valid)


@triton.jit
def _unpack_signs(
    bits: Any,
    signs: Any,
    count: Any,
    part: Any,
    inner: Any,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    first = _first_of_byte(at, part, inner)
    byte = tl.load(bits + at, mask=valid, other=0).to(tl.int32)
    for k in tl.static_range(8):
        sign = tl.where(((byte >> k) & 1) == 1, 1.0, -1.0)
        tl.store(signs + first + k * part * inner, sign.to(signs.dtype.element_ty), mask=valid)


@triton.jit
def _through_derivative(
    gradient: Any,
    kept: Any,
    flow: Any,
    step: Any,
    zero: Any,
    count: Any,
    part: Any,
    inner: Any,
    MASK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    first = _first_of_byte(at, part, inner)
    if MASK:
        byte = tl.load(kept + at, mask=valid, other=0).to(tl.int32)
    else:
        size = tl.load(step)
    for k in tl.static_range(8):
        where = first + k * part * inner
        value = tl.load(gradient + where, mask=valid, other=0.0).to(tl.float32)
        if MASK:
            derivative = ((byte >> k) & 1).to(tl.float32)
        else:
            pair = tl.load(kept + _pair_of_byte(at, k % 4, part, inner), mask=valid, other=0).to(tl.int32)
            derivative = (((pair >> (4 * (k // 4))) & 15) - zero).to(tl.float32) * size
        tl.store(flow + where, (value * derivative).to(flow.dtype.element_ty), mask=valid)
