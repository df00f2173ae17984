"""Norms without the activation that their formula holds: what is left of an evo-norm or a filter response norm for a companion.

    float                     normalises by                     then
    EvoNorm2dB0, B1, B2       the batch's deviation             scale, shift, companion
    EvoNorm2dS0, S0a          the deviation of a channel group  scale, shift, companion
    FilterResponseNormTlu2d   the root mean square of a channel scale, shift, companion

Liu et al., "Evolving Normalization-Activation Layers", 2020, arXiv:2004.02967; Singh and Krishnan, "Filter Response
Normalization Layer", 2019, arXiv:1911.09737.
"""

from typing import ClassVar, Self

import timm.layers
import torch
from torch import Tensor, nn

from design_lightning._adopt import adopt


class BareNorm(nn.Module):
    """The base: act(normalise(x) * weight + bias) on [B, C, H, W], with the parameters of the norm that it was made from."""

    dropped: ClassVar[tuple[str, ...]] = ("v", "tau")
    """The parameters of the activation that is gone."""
    weight: nn.Parameter
    bias: nn.Parameter
    act: nn.Module
    eps: float

    @classmethod
    def from_float(cls, norm: nn.Module, act: nn.Module) -> Self:
        """Takes over a norm's scale, shift and statistics, without a copy, and puts `act` behind them."""
        bare = adopt(cls, norm)
        for name in cls.dropped:
            bare._parameters.pop(name, None)
        bare.act = act
        return bare

    def normalise(self, x: Tensor) -> Tensor:
        """x with a deviation of about 1."""
        raise NotImplementedError(f"{type(self).__name__} lacks `normalise`")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shape = (1, -1, 1, 1)
        out: Tensor = self.act(self.normalise(x) * self.weight.view(shape) + self.bias.view(shape))
        return out


class BatchDeviationNorm(BareNorm):
    """Divides by the deviation of a channel over the batch, by the running one in eval mode."""

    running_var: Tensor
    momentum: float

    def normalise(self, x: Tensor) -> Tensor:  # noqa: D102
        variance = self.running_var
        if self.training:
            variance = x.float().var(dim=(0, 2, 3), unbiased=False)
            values = x.numel() // x.shape[1]
            with torch.no_grad():
                unbiased = variance.to(self.running_var.dtype) * values / max(values - 1, 1)
                self.running_var.lerp_(unbiased, self.momentum)
        return x * (variance + self.eps).rsqrt().to(x.dtype).view(1, -1, 1, 1)


class GroupDeviationNorm(BareNorm):
    """Divides by the deviation of a group of channels, image by image."""

    groups: int

    def normalise(self, x: Tensor) -> Tensor:  # noqa: D102
        grouped = x.unflatten(1, (self.groups, -1))
        variance = grouped.float().var(dim=(2, 3, 4), unbiased=False, keepdim=True)
        return (grouped * (variance + self.eps).rsqrt().to(x.dtype)).flatten(1, 2)


class FilterResponseNorm(BareNorm):
    """Divides by the root mean square of a channel, image by image."""

    def normalise(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * (x.float().square().mean(dim=(2, 3), keepdim=True) + self.eps).rsqrt().to(x.dtype)


_BARE: dict[type[nn.Module], type[BareNorm]] = {
    timm.layers.EvoNorm2dB0: BatchDeviationNorm,
    timm.layers.EvoNorm2dB1: BatchDeviationNorm,
    timm.layers.EvoNorm2dB2: BatchDeviationNorm,
    timm.layers.EvoNorm2dS0: GroupDeviationNorm,
    timm.layers.FilterResponseNormTlu2d: FilterResponseNorm,
}


def with_companion(norm: nn.Module, companion: nn.Module) -> BareNorm:
    """One of `ACTIVATION_NORMS` with a companion in place of its activation."""
    kind = next(_BARE[ancestor] for ancestor in type(norm).__mro__ if ancestor in _BARE)
    return kind.from_float(norm, companion)
