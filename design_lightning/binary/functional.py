"""The functions below every binary layer, with the gradients that they are given: what waits for the backward pass is bits.

    binarize           the shifted sign with a pseudo-gradient
    multiply_bits      a convolution or a linear map of +-1
    binarized_product  both in one
    scaled_signs       the signs of weights times a factor per output channel, with a pseudo-gradient
    hardtanh           the companion that a binarizer likes to see in front of it

A naive layer keeps floats: the pre-activation for the estimator, the +-1 for the gradient of the weights. Here each sign is
kept as one bit and its derivative as 1 or 4; the floats are made again when the backward pass comes. `binary.plain` has the
naive forms, which run where `keeps` is `floats` or a transform of `torch.func` is active.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from design_lightning.binary import plain
from design_lightning.binary._indicator import indicator
from design_lightning.binary.derivatives import code_of, step_of
from design_lightning.binary.elementwise import (
    bits_of,
    clamped_and_inside,
    signs_and_derivative,
    signs_of,
    through_derivative,
    where_inside,
)
from design_lightning.binary.estimators import Estimator
from design_lightning.binary.keeping import Keeps, floats_needed, refuse_double_backward
from design_lightning.binary.plain import sign
from design_lightning.binary.products import Product

__all__ = ["binarize", "binarized_product", "hardtanh", "multiply_bits", "scaled_signs", "sign"]


def binarize(x: Tensor, threshold: Tensor, estimator: Estimator, keeps: Keeps = "bits") -> Tensor:
    """The shifted sign with a pseudo-gradient.

        forward   +1 if x >= threshold, else -1
        gradient  of x: derivative(x - threshold); of the threshold: minus that

    Args:
        x: any shape and floating type.
        threshold: float32, broadcasts to x.
        estimator: gives the derivative.
        keeps: what waits for the backward pass; see `binary.keeping`.
    """
    if not records(x, threshold):
        return sign(x, threshold)
    if keeps == "floats" or floats_needed() or not x.dim():
        return plain.binarize(x, threshold, estimator)
    y: Tensor = _ShiftedSign.apply(x, threshold, estimator, keeps)
    return y


def multiply_bits(
    x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, is_binary: bool, keeps: Keeps = "bits"
) -> Tensor:
    """A product of +-1 by a weight.

    Of binary weights the signs are multiplied first, and then the scale: the sums are whole numbers, the same on every device.
    (With `floats` the weights are multiplied as they are, and the result may differ in its last bits.)

    Args:
        x: the signs. Nothing else than +1 and -1 may be among them: one bit of each is kept.
        weight: of the layer, as its product takes it.
        bias: [O], or None.
        product: a `Convolution` or a `Linear`.
        is_binary: whether each output channel of the weight holds one number and its negative alone.
        keeps: what waits for the backward pass; see `binary.keeping`.
    """
    x, weight, bias = _cast(_autocast_dtype(x), x, weight, bias)
    if not records(x, weight, bias):
        return _product_of_bits(product, x, weight, bias, is_binary)
    if keeps == "floats" or floats_needed():
        return product.apply(x, weight, bias)
    y: Tensor = _BitProduct.apply(x, weight, bias, product, is_binary)
    return y


def binarized_product(
    x: Tensor,
    threshold: Tensor,
    estimator: Estimator,
    weight: Tensor,
    bias: Tensor | None,
    product: Product,
    is_binary: bool,
    keeps: Keeps = "bits",
) -> Tensor:
    """`multiply_bits` of what `binarize` gives, in one function, which passes over x once less. Arguments as in these."""
    if keeps == "floats" or not records(x, threshold, weight, bias) or floats_needed():
        return multiply_bits(binarize(x, threshold, estimator, keeps), weight, bias, product, is_binary, keeps)
    dtype = _autocast_dtype(x)
    weight, bias = _cast(dtype, weight, bias)
    y: Tensor = _BinarizedProduct.apply(
        x, threshold, estimator, weight, bias, product, is_binary, keeps, dtype or x.dtype
    )
    return y


def scaled_signs(
    w: Tensor,
    scale: Tensor | None,
    derivative: Callable[[Tensor], Tensor],
    scales_gradient: bool = True,
    keeps: Keeps = "bits",
) -> Tensor:
    """The signs of weights times a factor per output channel.

        forward   sign(w) * scale
        gradient  of w: derivative(w), times the scale if `scales_gradient`; of the scale: the sum over its channel of sign(w)

    Args:
        w: [O, ...]. It waits for the backward pass as it is: where it is a parameter, that costs nothing.
        scale: [O], or None for 1.
        derivative: gives that of the sign at w, of the shape and type of w.
        scales_gradient: whether the gradient of w has the scale as a factor.
        keeps: `floats` allows a double backward.
    """
    if keeps != "floats" and not floats_needed():
        y: Tensor = _ScaledSigns.apply(w, scale, derivative, scales_gradient)
        return y
    with torch.no_grad():
        passes = derivative(w)
    if scale is None:
        return plain.replace_gradient(sign(w), w, passes)
    if scales_gradient:
        return plain.replace_gradient(sign(w), w, passes) * _per_output(scale, w)
    return plain.replace_gradient(sign(w) * _per_output(scale, w), w, passes)


def hardtanh(x: Tensor, lowest: float = -1.0, highest: float = 1.0, keeps: Keeps = "bits") -> Tensor:
    """x between two bounds. The gradient is 1 strictly between them, else 0."""
    if keeps == "floats" or not records(x) or floats_needed() or not x.dim():
        return F.hardtanh(x, lowest, highest)
    y: Tensor = _Hardtanh.apply(x, lowest, highest)
    return y


def records(*tensors: Tensor | None) -> bool:
    """Whether what is done to these is recorded for a backward pass."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # meta, say
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The operands as autocast gives them to a product, which it does not do inside a function of autograd."""
    return tuple(tensor if tensor is None or dtype is None else tensor.to(dtype) for tensor in tensors)


def fan_in_axes(w: Tensor) -> tuple[int, ...]:
    """All axes of weights [O, ...] but the first. (To flatten them would order a compiler how to lay out the weights.)"""
    return tuple(range(1, w.dim()))


def _per_output(values: Tensor, w: Tensor) -> Tensor:
    """Shapes [O] so that it broadcasts to w."""
    return values.view(-1, *(1 for _ in range(w.dim() - 1)))


def _product_of_bits(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, is_binary: bool) -> Tensor:
    """What `multiply_bits` says, without a gradient."""
    if not is_binary:
        return product.apply(x, weight, bias)
    # All of a channel are the same. A compiler makes vector code of a reduction's result, not of numbers that lie apart.
    sizes = weight.abs().amax(fan_in_axes(weight)) if torch.compiler.is_compiling() else weight.flatten(1)[:, 0].abs()
    scale = product.per_output(sizes)
    y = product.apply(x, torch.sign(weight), None).mul_(scale)
    return y if bias is None else y.add_(product.per_output(bias))


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _ShiftedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, estimator: Estimator, keeps: Keeps) -> Tensor:
        ctx.estimator, ctx.code = estimator, code_of(estimator, keeps)
        ctx.dtype, ctx.threshold_shape, ctx.threshold_dtype = x.dtype, threshold.shape, threshold.dtype
        y, kept, _ = signs_and_derivative(x, threshold, estimator, ctx.code, with_bits=False)
        ctx.save_for_backward(kept, step_of(estimator, ctx.code))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_double_backward()
        kept, step = ctx.saved_tensors
        return *_through_sign(ctx, gradient, kept, step, ctx.needs_input_grad[1]), None, None


def _through_sign(
    ctx: Any, gradient: Tensor, kept: Tensor, step: Tensor, to_threshold: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the threshold."""
    flow = through_derivative(gradient, kept, step, ctx.estimator, ctx.code)
    if not to_threshold:
        return flow.to(ctx.dtype), None
    return flow.to(ctx.dtype), -flow.sum_to_size(ctx.threshold_shape).to(ctx.threshold_dtype)


class _BitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, is_binary: bool) -> Tensor:
        ctx.product, ctx.shape, ctx.dtype, ctx.channels_last = product, x.shape, x.dtype, _is_channels_last(x)
        ctx.save_for_backward(bits_of(x), weight)
        return _product_of_bits(product, x, weight, bias, is_binary)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        refuse_double_backward()
        bits, weight = ctx.saved_tensors
        x = signs_of(bits, ctx.shape, ctx.dtype, ctx.channels_last)
        return *ctx.product.gradients(gradient, x, weight, ctx.needs_input_grad[:3]), None, None


class _BinarizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        estimator: Estimator,
        weight: Tensor,
        bias: Tensor | None,
        product: Product,
        is_binary: bool,
        keeps: Keeps,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.estimator, ctx.code, ctx.product = estimator, code_of(estimator, keeps), product
        ctx.shape, ctx.dtype, ctx.product_dtype, ctx.channels_last = x.shape, x.dtype, dtype, _is_channels_last(x)
        ctx.threshold_shape, ctx.threshold_dtype = threshold.shape, threshold.dtype
        y, kept, bits = signs_and_derivative(x, threshold, estimator, ctx.code, with_bits=True)
        ctx.save_for_backward(kept, step_of(estimator, ctx.code), bits, weight)
        return _product_of_bits(product, y.to(dtype), weight, bias, is_binary)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        kept, step, bits, weight = ctx.saved_tensors
        to_x, to_threshold, _, to_weight, to_bias, *rest = ctx.needs_input_grad
        y = signs_of(bits, ctx.shape, ctx.product_dtype, ctx.channels_last)
        needed = (to_x or to_threshold, to_weight, to_bias)
        of_y, of_weight, of_bias = ctx.product.gradients(gradient, y, weight, needed)
        of_x = of_threshold = None
        if of_y is not None:
            of_x, of_threshold = _through_sign(ctx, of_y.to(ctx.dtype), kept, step, to_threshold)
        return of_x, of_threshold, None, of_weight, of_bias, *(None for _ in rest)


class _ScaledSigns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, scale: Tensor | None, derivative: Callable[[Tensor], Tensor], scales_gradient: bool
    ) -> Tensor:
        ctx.derivative, ctx.scales_gradient = derivative, scales_gradient
        ctx.save_for_backward(w, scale)
        if scale is None:
            return sign(w)
        # Either factor or its negative, to the last bit: f * 2s - s for f of 0 or 1.
        factor = _per_output(scale, w)
        return indicator(torch.ge, w, 0).mul_(2 * factor).sub_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_double_backward()
        w, scale = ctx.saved_tensors
        factor = None if scale is None else _per_output(scale, w)
        flow = gradient if factor is None or not ctx.scales_gradient else gradient * factor
        to_scale = None
        if factor is not None and ctx.needs_input_grad[1]:
            to_scale = (gradient * sign(w)).sum_to_size(factor.shape).view_as(scale)
        return flow * ctx.derivative(w), to_scale, None, None


class _Hardtanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float, highest: float) -> Tensor:
        y, inside = clamped_and_inside(x, lowest, highest)
        ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        refuse_double_backward()
        return where_inside(gradient, ctx.saved_tensors[0]), None, None
