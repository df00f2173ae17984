"""A forward that leaves no trace in a model: modes and buffers are afterwards as before."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from design_lightning.binary._float32 import Float32State


@contextmanager
def forward_without_trace(model: nn.Module, in_training: Collection[nn.Module] = ()) -> Iterator[None]:
    """Eval mode and no gradients for a while. The buffers of binarizers (units) are not put back.

    Args:
        model: the model.
        in_training: modules that are in training mode for the while.
    """
    training = {module: module.training for module in model.modules()}
    of_binarizers = {id(b) for m in model.modules() if isinstance(m, Float32State) for b in m.buffers()}
    kept = [(b, b.clone()) for b in model.buffers() if id(b) not in of_binarizers and not b.is_meta]
    model.eval()
    for module in in_training:
        module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for module, mode in training.items():
            module.training = mode
