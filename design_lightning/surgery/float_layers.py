"""The float layers that have a binary twin, timm's subclasses among them.

A twin keeps what the float class does in its forward: TensorFlow's SAME padding, weight standardisation. A subclass that
is not listed and has a forward or a method of its own has no twin: it stays float, and the report says why.
"""

from typing import cast

import timm.layers
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, get_same_padding
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from design_lightning.binary import BinaryConv2d, BinaryLayer, BinaryLinear


class BinaryConv2dSame(BinaryConv2d):
    """The twin of timm's `Conv2dSame`: the padding depends on the input's size, and may be one pixel more at the end."""

    @property
    def pads_by_input_size(self) -> bool:  # noqa: D102
        return True

    def padding_of(self, x: Tensor) -> tuple[int, int, int, int]:  # noqa: D102
        height, width = (
            get_same_padding(size, kernel, stride, dilation)
            for size, kernel, stride, dilation in zip(
                x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        return width // 2, width - width // 2, height // 2, height - height // 2


class BinaryStdConv2d(BinaryConv2d):
    """The twin of timm's `StdConv2d`: the latent weights are standardised per output channel before they are binarized."""

    eps: float

    def latent_weight(self) -> Tensor:  # noqa: D102
        return self._standardised(None)

    def _standardised(self, gain: Tensor | None) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        standard = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=self.eps)
        return standard.reshape_as(self.weight)


class BinaryScaledStdConv2d(BinaryStdConv2d):
    """The twin of timm's `ScaledStdConv2d`: standardised, times a learned gain and 1 / sqrt(fan-in)."""

    gain: nn.Parameter
    scale: float

    def latent_weight(self) -> Tensor:  # noqa: D102
        return self._standardised((self.gain * self.scale).view(-1))


class _SamePaddingIfDynamic(BinaryConv2dSame):
    same_pad: bool

    @property
    def pads_by_input_size(self) -> bool:
        return self.same_pad

    def padding_of(self, x: Tensor) -> tuple[int, int, int, int]:
        return super().padding_of(x) if self.same_pad else BinaryConv2d.padding_of(self, x)


class BinaryStdConv2dSame(_SamePaddingIfDynamic, BinaryStdConv2d):
    """The twin of timm's `StdConv2dSame`."""


class BinaryScaledStdConv2dSame(_SamePaddingIfDynamic, BinaryScaledStdConv2d):
    """The twin of timm's `ScaledStdConv2dSame`."""


BINARY_TWINS: dict[type[nn.Module], type[BinaryLayer]] = {
    nn.Conv2d: BinaryConv2d,
    Conv2dSame: BinaryConv2dSame,
    StdConv2d: BinaryStdConv2d,
    StdConv2dSame: BinaryStdConv2dSame,
    ScaledStdConv2d: BinaryScaledStdConv2d,
    ScaledStdConv2dSame: BinaryScaledStdConv2dSame,
    nn.Linear: BinaryLinear,
    timm.layers.Linear: BinaryLinear,
}
"""From a float class to its twin; a subclass belongs to its nearest listed ancestor. Plugins add theirs here."""


_HARMLESS = {
    *("__module__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__orig_bases__"),
    *("__init__", "__repr__", "extra_repr", "reset_parameters"),
}
"""What a subclass may define and still compute, and offer to its network, what its listed ancestor does."""


def binary_twin(layer: nn.Module) -> type[BinaryLayer] | None:
    """The class that `layer` would become, or None where it has a forward, a method or a weight that no listed class has."""
    if is_parametrized(layer) or _has_own_forward(layer):
        return None
    ancestor = _listed_ancestor(layer)
    return None if ancestor is None or _own_names(layer, ancestor) else BINARY_TWINS[ancestor]


def _listed_ancestor(layer: nn.Module) -> type[nn.Module] | None:
    return next((ancestor for ancestor in type(layer).__mro__ if ancestor in BINARY_TWINS), None)


def _own_names(layer: nn.Module, ancestor: type[nn.Module]) -> set[str]:
    """What the classes before a listed ancestor define: a twin would lack it."""
    order = type(layer).__mro__
    return {name for kind in order[: order.index(ancestor)] for name in vars(kind)} - _HARMLESS


def _has_own_forward(layer: nn.Module) -> bool:
    return bool({"forward", "_conv_forward"} & set(vars(layer)))


def why_no_twin(layer: nn.Module) -> str:
    """The reason for which `binary_twin` gave None."""
    if is_parametrized(layer):
        return "its weight is parametrized; remove_parametrizations first"
    if _has_own_forward(layer):
        return "its forward was replaced on the instance; binarize it before that"
    ancestor = _listed_ancestor(layer)
    own = sorted(_own_names(layer, ancestor)) if ancestor else []
    has = f"a {own[0] if 'forward' not in own else 'forward'} of its own" if own else "no binary twin"
    return f"{type(layer).__name__} has {has}"


_HOLDERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers of torch whose weights have other names than `weight`."""


def is_weight_layer(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a weight matrix or filters, so that a report has to account for it."""
    weight = getattr(module, "weight", None)
    has_weight = isinstance(weight, Tensor) and weight.dim() >= 2 and not isinstance(module, nn.LayerNorm)
    return has_weight or isinstance(module, _HOLDERS)


def weight_count(layer: nn.Module) -> int:
    """How many weights a weight layer has itself, biases apart."""
    if isinstance(layer, _HOLDERS):
        return sum(parameter.numel() for parameter in layer.parameters(recurse=False) if parameter.dim() >= 2)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def multiply_accumulates(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Of one call of a weight layer; the products of two streams in an attention are not among them."""
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, _HOLDERS):
        return x.numel() // x.shape[-1] * weight_count(layer)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return x.numel() * weight_count(layer) // layer.in_channels
    assert isinstance(layer.weight, Tensor)
    return output.numel() * layer.weight[0].numel()


def in_channels(layer: nn.Module) -> int:
    """C of the layer's input."""
    return cast(int, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
