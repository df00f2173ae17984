"""What a binary layer keeps between its forward and its backward pass.

bits    1 bit for each sign, and of each derivative 1 bit where it is 0 or 1, else 4 bits (see `binary.derivatives`)
exact   1 bit for each sign, and each derivative that is not 0 or 1 as the float that it is
floats  the float tensors that the formulas name: what a double backward needs, and transforms of `torch.func` take by themselves
"""

from typing import Literal, get_args

import torch
from torch import nn

Keeps = Literal["bits", "exact", "floats"]


class Keeping(nn.Module):
    """A module whose backward pass needs something of its forward pass; `keeps` says in which form it waits."""

    keeps: Keeps = "bits"


def keep_for_backward_(model: nn.Module, keeps: Keeps) -> None:
    """Sets what the binary layers of a model, and the companions, keep for the backward pass.

    Args:
        model: any module.
        keeps: `bits`, `exact` or `floats`; see the module's text.

    Raises:
        ValueError: if `keeps` is none of them, or the model has nothing that keeps.
    """
    if keeps not in get_args(Keeps):
        raise ValueError(
            f"unknown form {keeps!r} of what is kept for the backward pass: use 'bits', 'exact' or 'floats'"
        )
    keeping = [module for module in model.modules() if isinstance(module, Keeping)]
    if not keeping:
        raise ValueError(f"{type(model).__name__} has no binary layer that could keep {keeps}; call binarize_ first")
    for module in keeping:
        module.keeps = keeps


def floats_needed() -> bool:
    """Whether a transform of `torch.func` runs, which may differentiate the backward pass again."""
    return torch._C._are_functorch_transforms_active()


def refuse_double_backward() -> None:
    """Raises in a backward pass that is recorded to be differentiated again: signs and codes have no derivative left."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "a backward pass through bits cannot be differentiated again (create_graph=True): the floats that it would need "
            "were not kept; call design_lightning.keep_for_backward_(model, 'floats') first"
        )
