"""Small pictures, and the small part of Fashion-MNIST that the package embeds."""

from importlib import resources

import pytest
import torch

from design_lightning.data.idx import read_idx


@pytest.fixture(scope="session")
def clothes() -> torch.Tensor:
    """[200, 28, 28] uint8: real pictures."""
    folder = resources.files("design_lightning.data") / "fashion_mnist_subset"
    return torch.from_numpy(read_idx(folder / "t10k-images-idx3-ubyte.gz")[::5].copy())


@pytest.fixture(scope="session")
def blobs() -> torch.Tensor:
    """[4, 11, 12] in [0, 1]: smooth noise, so that neighbours are alike as in a photograph."""
    noise = torch.rand(4, 1, 11, 12, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)[:, 0]
