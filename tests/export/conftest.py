from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import design_lightning as dl


@pytest.fixture
def binarized() -> Callable[..., nn.Module]:
    """A network of timm with 10 classes, binarized, the same each time."""

    def make(name: str = "test_resnet", config: dl.BinaryConfig | None = None, **arguments: object) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, **{"num_classes": 10, **arguments})
        dl.binarize_(model, config)
        return model

    return make
