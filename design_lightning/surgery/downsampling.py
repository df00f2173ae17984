"""Downsampling as binary networks like it: an average pool, then a real-valued 1x1 convolution.

A strided 1x1 convolution looks at one pixel in four; with an average pool in front the shortcut, which carries most of the
information past a binary convolution, loses less. Liu et al., "Bi-Real Net", ECCV 2018, arXiv:1808.00278.
"""

import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from design_lightning._adopt import adopt


class AveragePooled(nn.Conv2d):
    """A float 1x1 convolution whose stride is an average pool in front of it; the same parameters under the same keys.

    [B, C, H, W] becomes [B, O, ceil(H / stride), ceil(W / stride)], as with the strided convolution. It stands before the
    float class among a class's bases.
    """

    pool: tuple[int, int]

    def to_float(self) -> nn.Conv2d:
        """The strided convolution that this one was."""
        conv = adopt(next(kind for kind, pooled in _POOLED.items() if pooled is type(self)), self)
        conv.stride = self.pool
        del conv.pool
        return conv

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return super().forward(F.avg_pool2d(input, self.pool, self.pool, ceil_mode=True, count_include_pad=False))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, pool={self.pool}"


class AveragePooledConv2d(AveragePooled):
    """The twin of a plain convolution."""


class AveragePooledConv2dSame(AveragePooled, Conv2dSame):
    """The twin of timm's `Conv2dSame`."""


class AveragePooledStdConv2d(AveragePooled, StdConv2d):
    """The twin of timm's `StdConv2d`."""


class AveragePooledStdConv2dSame(AveragePooled, StdConv2dSame):
    """The twin of timm's `StdConv2dSame`."""


class AveragePooledScaledStdConv2d(AveragePooled, ScaledStdConv2d):
    """The twin of timm's `ScaledStdConv2d`."""


class AveragePooledScaledStdConv2dSame(AveragePooled, ScaledStdConv2dSame):
    """The twin of timm's `ScaledStdConv2dSame`."""


_POOLED: dict[type[nn.Conv2d], type[AveragePooled]] = {
    nn.Conv2d: AveragePooledConv2d,
    Conv2dSame: AveragePooledConv2dSame,
    StdConv2d: AveragePooledStdConv2d,
    StdConv2dSame: AveragePooledStdConv2dSame,
    ScaledStdConv2d: AveragePooledScaledStdConv2d,
    ScaledStdConv2dSame: AveragePooledScaledStdConv2dSame,
}


def average_pooled(conv: nn.Module) -> AveragePooled | None:
    """What a strided 1x1 convolution becomes, with its very parameters; None for any other layer."""
    if type(conv) not in _POOLED or not isinstance(conv, nn.Conv2d):
        return None
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.stride == (1, 1):
        return None
    pooled = adopt(_POOLED[type(conv)], conv)
    pooled.pool, pooled.stride = (conv.stride[0], conv.stride[1]), (1, 1)
    return pooled
