"""How the derivative of an estimator waits for the backward pass.

    one that is 0 or 1            1 bit: exact
    one whose range is known      4 bits: the nearest of 16 equally spaced levels, 0 among them
    any other, or on request      itself, as a float

With 4 bits the derivative is off by half a step at most, `largest_error`: 1/15 for approx_sign, whose values go from 0 to 2.
Neither 1 nor 4 bits can hold a NaN: where the input is one, the derivative is 0.
"""

from typing import Literal

import torch
from torch import Tensor

from design_lightning.binary.estimators import Estimator
from design_lightning.binary.keeping import Keeps
from design_lightning.binary.packing import (
    pack_bits,
    pack_nibbles,
    packed_axis,
    packing_axis,
    unpack_bits,
    unpack_nibbles,
)

Code = Literal["mask", "levels", "float"]

_HIGHEST_CODE = 15


def code_of(estimator: Estimator, keeps: Keeps) -> Code:
    """In which form the derivative of an estimator waits."""
    if estimator.is_mask:
        return "mask"
    return "levels" if keeps == "bits" and estimator.derivative_range() is not None else "float"


def largest_error(estimator: Estimator) -> float:
    """By how much a derivative kept with 4 bits may be off, at the estimator's temperature now; 0 where it is kept exactly."""
    return 0.0 if code_of(estimator, "bits") != "levels" else float(levels(estimator)[1]) / 2


def encode(u: Tensor, estimator: Estimator, code: Code) -> Tensor:
    """What is kept of the derivative at u, which may be overwritten."""
    derivative = estimator.derivative_(u)
    if code == "float":
        return derivative
    if code == "mask":
        return pack_bits(derivative, packing_axis(u.shape))
    zero, step = levels(estimator)
    return pack_nibbles((derivative / step).round_().add_(zero), packing_axis(u.shape))


def step_of(estimator: Estimator, code: Code) -> Tensor:
    """The size of a step, which `decode` takes: it is kept, as an estimator's temperature may move before the backward pass."""
    return levels(estimator)[1].detach() if code == "levels" else torch.ones(())


def decode(
    kept: Tensor, step: Tensor, estimator: Estimator, code: Code, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """The derivative again: of a shape and floating type."""
    if code == "float":
        return kept
    axis = packed_axis(kept.shape, shape)
    if code == "mask":
        return unpack_bits(kept, axis, shape[axis]).to(dtype)
    return (unpack_nibbles(kept, axis, shape[axis]).to(step.dtype) - levels(estimator)[0]) * step


def levels(estimator: Estimator) -> tuple[int, Tensor]:
    """The code of derivative 0, and the size of a step, such that the codes 0 to 15 reach from end to end of the range."""
    ends = estimator.derivative_range()
    assert ends is not None
    lowest, highest = ends
    if lowest == 0:
        return 0, torch.as_tensor(highest / _HIGHEST_CODE)
    zero = max(1, round(_HIGHEST_CODE * -lowest / float(highest - lowest)))
    return zero, torch.as_tensor(max(highest / (_HIGHEST_CODE - zero), -lowest / zero))
