"""The products that a binary layer computes, and their gradients: a convolution with its border, a linear map.

Both are applied to plain tensors, and differentiated by the same functions of torch that autograd would call.
"""

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PaddingMode = Literal["constant", "reflect", "replicate", "circular"]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Product(Protocol):
    """A map that is linear in its input and in its weight."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of input and weight, plus the bias."""

    def per_output(self, values: Tensor) -> Tensor:
        """Shapes one value per output channel [O] so that it broadcasts to the product."""

    def gradients(self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]) -> Gradients:
        """Those of x, weight and bias, as far as they are needed, from that of the product."""


class Linear:
    """x [..., I] by weight [O, I]."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.linear(x, weight, bias)

    def per_output(self, values: Tensor) -> Tensor:  # noqa: D102
        return values

    def gradients(  # noqa: D102
        self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> Gradients:
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = (rows @ weight).view(x.shape) if needed[0] else None
        to_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None
        return to_x, to_weight, rows.sum(0) if needed[2] else None


class Convolution(NamedTuple):
    """x [B, I, H, W], with a border around it, by weight [O, I / groups, kh, kw].

    Args:
        stride, padding, dilation: (vertical, horizontal); `padding` is the convolution's own, with zeros.
        groups: as in `torch.nn.Conv2d`.
        border: how many pixels (left, right, top, bottom) are put around x before.
        mode: what they hold: `value`, or what stands in x.
        value: for the mode `constant`.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: PaddingMode = "constant"
    value: float = 0.0

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.conv2d(self.pad(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def per_output(self, values: Tensor) -> Tensor:  # noqa: D102
        return values.view(-1, 1, 1)

    def pad(self, x: Tensor) -> Tensor:
        """x with its border."""
        if not any(self.border):
            return x
        if self.mode == "constant":
            return F.pad(x, self.border, value=self.value)
        # torch's own modes refuse an empty batch, for which any value will do.
        return F.pad(x, self.border, mode=self.mode) if x.numel() else F.pad(x, self.border)

    def unpad(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient of x from that of `pad(x)`."""
        if not any(self.border):
            return gradient
        if self.mode == "constant" or not x.numel():
            return F.pad(gradient, [-pixels for pixels in self.border])
        if self.mode == "replicate":
            return torch.ops.aten.replication_pad2d_backward(gradient, x, self.border)
        if self.mode == "reflect":
            return torch.ops.aten.reflection_pad2d_backward(gradient, x, self.border)
        left, right, top, bottom = self.border
        return _unwrap(_unwrap(gradient, -2, top, bottom), -1, left, right)

    def gradients(  # noqa: D102
        self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> Gradients:
        to_padded, to_weight, to_bias = torch.ops.aten.convolution_backward(
            *(gradient, self.pad(x), weight, [weight.shape[0]] if needed[2] else None),
            *(self.stride, self.padding, self.dilation, False, (0, 0), self.groups, needed),
        )
        return self.unpad(to_padded, x) if needed[0] else None, to_weight, to_bias


def _unwrap(gradient: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Adds the gradient of a circular border, along one axis, to that of the pixels which stand in it."""
    size = gradient.shape[axis] - before - after
    inner = gradient.narrow(axis, before, size).clone()
    inner.narrow(axis, size - before, before).add_(gradient.narrow(axis, 0, before))
    inner.narrow(axis, 0, after).add_(gradient.narrow(axis, before + size, after))
    return inner
