"""The functions of `binary.functional` as the formulas say them: they keep float tensors, and can be differentiated twice.

They are the reference for the others, and run instead of them where `keeps` is `floats` or a transform of `torch.func` is active.
"""

from typing import Any

import torch
from torch import Tensor

from design_lightning.binary._indicator import indicator
from design_lightning.binary.estimators import Estimator


def sign(x: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    """+1 where x >= threshold, compared in float32, else -1; of the type of x. Never 0; a NaN gives -1."""
    # In place on what the comparison gave: on a CPU a fresh result costs more than the arithmetic.
    return indicator(torch.ge, x.float(), threshold).to(x.dtype).mul_(2).sub_(1)


def distance(x: Tensor, threshold: Tensor) -> Tensor:
    """u = x - threshold, where the estimator is evaluated: float32, or float64 for such x."""
    return (x if x.dtype == torch.float64 else x.float()) - threshold


def binarize(x: Tensor, threshold: Tensor, estimator: Estimator) -> Tensor:
    """The shifted sign with a pseudo-gradient."""
    y: Tensor = _ShiftedSign.apply(x, threshold, estimator)
    return y


def replace_gradient(value: Tensor, source: Tensor, derivative: Tensor) -> Tensor:
    """`value` in the forward pass; in the backward pass its gradient times `derivative` goes to `source`.

    All three have one shape. No gradient reaches `value`, nor `derivative`.
    """
    y: Tensor = _ReplacedGradient.apply(value, source, derivative)
    return y


class _ShiftedSign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, threshold: Tensor, estimator: Estimator) -> Tensor:
        return sign(x, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Estimator], output: Tensor) -> None:
        x, threshold, ctx.estimator = inputs
        ctx.save_for_backward(x, threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, threshold = ctx.saved_tensors
        flow = gradient * ctx.estimator.derivative(distance(x, threshold))
        to_threshold = -flow.sum_to_size(threshold.shape).to(threshold.dtype) if ctx.needs_input_grad[1] else None
        return flow.to(x.dtype), to_threshold, None


class _ReplacedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, source: Tensor, derivative: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return None, gradient * derivative, None
