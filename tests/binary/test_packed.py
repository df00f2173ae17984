"""Packed layers: what their tensors are when they come back from bits."""

import pytest
import torch

from design_lightning.binary.packed import pack_signs, unpack_signs


@pytest.mark.parametrize("shape", [(8, 3), (8, 12, 1, 1), (5, 3, 3, 3), (4, 1, 1, 5)])
def test_signs_come_back_with_the_strides_of_others(shape: tuple[int, ...]) -> None:
    """A 1x1 kernel with the strides of channels last would make its convolution round otherwise."""
    signs = torch.where(torch.randn(shape) < 0, -1, 1).to(torch.int8)
    again = unpack_signs(pack_signs(signs), signs.shape)
    assert torch.equal(again, signs)
    assert again.stride() == signs.stride()
