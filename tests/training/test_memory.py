"""How many images fit: counted by hand for a network of two layers."""

import pytest
import torch
from torch import nn

from design_lightning.training.memory import COPIES, HEADROOM, images_that_fit, is_out_of_memory, kept_per_image


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))


def test_what_is_kept_is_the_input_of_each_layer_and_the_output_of_tanh() -> None:
    pixels = 16 * 16
    assert kept_per_image(network(), (3, 16, 16)) == 4 * (
        3 * pixels + 8 * pixels
    )  # the linear layer's input is tanh's output


@pytest.mark.parametrize("images", [3, 64, 71])
def test_as_many_images_fit_as_memory_is_left_for(images: int) -> None:
    model = network()
    fixed = COPIES * 4 * sum(p.numel() for p in model.parameters())
    capacity = int(fixed + HEADROOM * kept_per_image(model, (3, 16, 16)) * (images + 0.5))
    assert images_that_fit(model, (3, 16, 16), capacity) == (images if images < 8 else 64)
    assert images_that_fit(model, (3, 16, 16), fixed // 2) == 0


def test_errors_of_memory_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60)
    assert is_out_of_memory(failed.value)
