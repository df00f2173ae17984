"""Tiling: the threshold of every pixel and channel, from a small periodic kernel.

Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.
"""

from typing import Literal

import torch
from torch import Tensor

Alignment = Literal["topleft", "center"]


def tile(levels: Tensor, channels: int, height: int, width: int, align: Alignment = "topleft") -> Tensor:
    """Repeats a kernel [D, h, w] periodically over channels, rows and columns.

        tiled[c, i, j] = levels[c mod D, (i + oi) mod h, (j + oj) mod w]

    `align="topleft"` starts at the kernel's corner: (oi, oj) = (0, 0). `align="center"` lays ceil(height / h) whole
    kernels and crops the middle: oi = (ceil(height / h) * h - height) // 2, and oj alike.

    Returns:
        [channels, height, width], or [1, height, width] where the kernel has one channel: it broadcasts.

    Raises:
        ValueError: if the kernel's depth does not divide the channels, or the alignment is unknown.
    """
    depth, rows, columns = levels.shape
    if channels % depth:
        raise ValueError(
            f"kernel has {depth} channels, but the input has {channels}, not a multiple of {depth}; "
            "use a 2-D kernel (one channel) or one whose depth divides the channels"
        )
    if align == "topleft":
        row_phase, column_phase = 0, 0
    elif align == "center":
        row_phase = (-(-height // rows) * rows - height) // 2
        column_phase = (-(-width // columns) * columns - width) // 2
    else:
        raise ValueError(f"unknown alignment {align!r}: use 'topleft' or 'center'")
    row_index = (torch.arange(height, device=levels.device) + row_phase) % rows
    column_index = (torch.arange(width, device=levels.device) + column_phase) % columns
    tiled = levels[:, row_index][:, :, column_index]
    return tiled if depth == 1 else tiled.repeat(channels // depth, 1, 1)
