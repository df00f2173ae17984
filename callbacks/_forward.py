"""A forward beside training that leaves no trace: what the callbacks share that look at activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor


@contextmanager
def aside(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Inside, the module is in eval mode and runs eagerly, in the run's precision, without gradients.

    Afterwards every mode and random state is as before. A compiled network runs uncompiled, so that hooks on its layers
    are called and compile nothing anew.

    Raises:
        ValueError: if the module has no `forward`.
    """
    if not is_overridden("forward", pl_module):
        raise ValueError(
            f"{type(pl_module).__name__} has no forward(images), by which a callback could run it: define one that gives "
            "what training_step computes from the images"
        )
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            isolate_rng(),
            trainer.precision_plugin.forward_context(),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def images_of(batch: Any) -> Tensor:
    """The images of a batch: the batch itself, or the first thing in it.

    Raises:
        ValueError: if that is no tensor.
    """
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(images, Tensor):
        raise ValueError(f"a batch must be a tensor of images, or (images, ...), not a {type(batch).__name__}")
    return images
