"""Tiling against the formula of SPEC section 1, one element at a time."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from design_lightning.kernels import PUBLISHED, Alignment, ThresholdKernel, tile

ALIGNMENTS = get_args(Alignment)


def tiled_by_loops(levels: torch.Tensor, channels: int, height: int, width: int, align: str) -> torch.Tensor:
    depth, rows, columns = levels.shape
    oi = (math.ceil(height / rows) * rows - height) // 2 if align == "center" else 0
    oj = (math.ceil(width / columns) * columns - width) // 2 if align == "center" else 0
    tiled = torch.empty(channels, height, width)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                tiled[c, i, j] = levels[c % depth, (i + oi) % rows, (j + oj) % columns]
    return tiled


@given(
    size=st.tuples(*[st.integers(1, 4)] * 3),
    copies=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    align=st.sampled_from(ALIGNMENTS),
)
@settings(max_examples=60, deadline=None)
def test_a_tiled_kernel_follows_the_formula(
    size: tuple[int, int, int], copies: int, height: int, width: int, align: Alignment
) -> None:
    levels = torch.arange(1.0, 1 + math.prod(size)).view(size)  # all levels differ, so that a wrong place shows
    channels = copies * size[0]
    tiled = ThresholdKernel(levels).tile(channels, height, width, align)
    assert tiled.shape == (channels, height, width)
    assert tiled.dtype == torch.float32
    assert tiled.equal(tiled_by_loops(levels, channels, height, width, align))


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_kernel_tiles_every_small_image(name: str, align: Alignment) -> None:
    kernel = ThresholdKernel.named(name)
    for height, width in [(1, 1), (1, 6), (5, 2), (7, 3), (4, 4)]:
        expected = tiled_by_loops(kernel.tensor(), 4, height, width, align)
        assert kernel.tile(4, height, width, align).equal(expected), (height, width)


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_an_image_of_whole_kernels_starts_at_the_corner(align: Alignment) -> None:
    kernel = ThresholdKernel.named("3x3_symmetric_v2")
    assert kernel.tile(1, 3, 3, align).equal(kernel.tensor())


def test_the_center_alignment_crops_the_middle() -> None:
    kernel = ThresholdKernel([[1.0, 2.0, 3.0]])
    assert kernel.tile(1, 1, 4, "center")[0, 0].tolist() == [2.0, 3.0, 1.0, 2.0]  # 1 [2 3 1 2] 3
    assert kernel.tile(1, 1, 5, "center")[0, 0].tolist() == [1.0, 2.0, 3.0, 1.0, 2.0]  # one column over: cropped right


def test_gradients_reach_the_levels() -> None:
    levels = torch.ones(2, 2, 2, requires_grad=True)
    tile(levels, 4, 3, 3).sum().backward()
    assert levels.grad is not None
    assert levels.grad.tolist() == [[[8.0, 4.0], [4.0, 2.0]]] * 2


def test_a_depth_that_does_not_divide_the_channels_is_named() -> None:
    with pytest.raises(
        ValueError, match="kernel has 4 channels, but the input has 6, not a multiple of 4; use a 2-D kernel"
    ):
        ThresholdKernel.named("2x2x4_baseline").tile(6, 2, 2)


def test_an_unknown_alignment_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown alignment 'middle'.*'center'"):
        ThresholdKernel.named("2x2_v1").tile(1, 2, 2, "middle")  # type: ignore[arg-type]
