"""Downsampling as binary networks like it: an average pool, then a real-valued 1x1 convolution.

A strided 1x1 convolution looks at one pixel in four; with an average pool in front the shortcut, which carries most of the
information past a binary convolution, loses less. Liu et al., "Bi-Real Net", ECCV 2018, arXiv:1808.00278.
"""

from typing import Self, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning._adopt import adopt


class AveragePooledConv2d(nn.Conv2d):
    """A float 1x1 convolution whose stride is an average pool in front of it; the same parameters under the same keys.

    [B, C, H, W] becomes [B, O, ceil(H / stride), ceil(W / stride)], as with the strided convolution.
    """

    pool: tuple[int, int]

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """Takes over a strided 1x1 convolution's parameters, without a copy."""
        pooled = adopt(cls, conv)
        pooled.pool, pooled.stride = (conv.stride[0], conv.stride[1]), (1, 1)
        return pooled

    def to_float(self) -> nn.Conv2d:
        """The strided convolution that this one was."""
        conv = adopt(nn.Conv2d, self)
        conv.stride = self.pool
        del conv.pool
        return conv

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        x = F.avg_pool2d(input, self.pool, self.pool, ceil_mode=True, count_include_pad=False)
        return self._conv_forward(x, self.weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, pool={self.pool}"


def is_strided_projection(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a plain 1x1 convolution with a stride."""
    return (
        type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.padding == (0, 0) and layer.stride != (1, 1)
    )
