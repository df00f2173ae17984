"""Gradient checkpointing by timm: activations are computed again in the backward pass instead of kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def set_gradient_checkpointing_(network: nn.Module) -> None:
    """Turns gradient checkpointing on, in place.

    Raises:
        ValueError: if the network has none.
    """
    enable: Any = getattr(network, "set_grad_checkpointing", None)
    reason = "it has no set_grad_checkpointing"
    if enable is not None:
        try:
            enable(True)
            return
        except AssertionError as error:  # how timm refuses
            reason = str(error)
    raise ValueError(
        f"{type(network).__name__} cannot do gradient checkpointing ({reason}); set gradient_checkpointing: false, and "
        "halve the batch with accumulate_grad_batches: 2 to save memory"
    )


@contextmanager
def batch_norm_statistics_kept(network: nn.Module) -> Iterator[None]:
    """Behind the block the statistics of batch norms are what they were before it.

    Around a backward pass: what is computed again there would count a batch twice.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
