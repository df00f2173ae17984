"""Companions: the float activations that go well with a binarizer further down the stream.

A ReLU leaves nothing below zero, so a Sign behind it is constant. Its companion keeps both signs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning.binary.activations import Layout
from design_lightning.binary.functional import hardtanh
from design_lightning.binary.keeping import Keeping

CompanionName = Literal["hardtanh", "prelu", "rprelu", "identity", "keep"]


class Hardtanh(nn.Hardtanh, Keeping):
    """torch's Hardtanh, of which one bit an element waits for the backward pass; it works out of place."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return hardtanh(input, self.min_val, self.max_val, self.keeps)


class ChannelPReLU(nn.Module):
    """PReLU with a slope per channel, in either layout: x where it is positive, slope[c] * x elsewhere.

    He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852. `torch.nn.PReLU` takes channels first only.

    Args:
        channels: C.
        layout: which axis holds the channels, as in `binary.activations`.
        slope: the slopes' start.
    """

    def __init__(self, channels: int, layout: Layout = "NCHW", slope: float = 0.25) -> None:
        super().__init__()
        self.layout: Layout = layout
        self.weight = nn.Parameter(torch.full((channels,), slope))

    def _shaped(self, values: Tensor, x: Tensor) -> Tensor:
        return values.view(-1, 1, 1) if self.layout == "NCHW" and x.dim() > 2 else values

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(x) - self._shaped(self.weight, x) * F.relu(-x)

    def extra_repr(self) -> str:  # noqa: D102
        return f"channels={self.weight.numel()}, layout={self.layout}"


class RPReLU(ChannelPReLU):
    """PReLU with learned shifts: PReLU(x - before[c]) + after[c].

    Liu et al., "ReActNet", ECCV 2020, arXiv:2003.03488. Both shifts start at 0. Arguments as in `ChannelPReLU`.
    """

    def __init__(self, channels: int, layout: Layout = "NCHW", slope: float = 0.25) -> None:
        super().__init__(channels, layout, slope)
        self.before = nn.Parameter(torch.zeros(channels))
        self.after = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x - self._shaped(self.before, x)) + self._shaped(self.after, x)


def make_companion(name: CompanionName, channels: int, layout: Layout) -> nn.Module:
    """The companion of that name for a stream of so many channels. `keep` is no module: it leaves what is there.

    Raises:
        ValueError: if the name is none of hardtanh, prelu, rprelu, identity.
    """
    if name == "hardtanh":
        return Hardtanh()
    if name == "identity":
        return nn.Identity()
    if name == "prelu":
        return ChannelPReLU(channels, layout)
    if name == "rprelu":
        return RPReLU(channels, layout)
    raise ValueError(f"unknown companion {name!r}: use hardtanh, prelu, rprelu, identity or keep")
