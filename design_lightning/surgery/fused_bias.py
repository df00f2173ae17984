"""timm's attentions whose qkv layer is not called: F.linear(x, qkv.weight, a bias made of parts).

A layer that is not called cannot binarize its input. These attentions (BEiT, EVA, Swin V2) have a switch for calling qkv and
adding the bias behind it, which is the same sum; surgery turns it on where qkv becomes binary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

_SWITCH = "qkv_bias_separate"
_MARK = "_qkv_bias_was_fused"


def _fused(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if getattr(m, _SWITCH, None) is False and isinstance(m.qkv, nn.Linear)]


@contextmanager
def qkv_layers_called(model: nn.Module) -> Iterator[None]:
    """Has every qkv layer called for a while."""
    attentions = _fused(model)
    for attention in attentions:
        setattr(attention, _SWITCH, True)
    try:
        yield
    finally:
        for attention in attentions:
            setattr(attention, _SWITCH, False)


def call_qkv_layer_(attention: nn.Module) -> None:
    """Has the qkv layer of one attention called from now on; any other module is left as it is."""
    if attention in _fused(attention):
        cast(Any, attention).qkv_bias_separate = True
        setattr(attention, _MARK, True)


def fuse_qkv_bias_again_(attention: nn.Module) -> None:
    """Takes back what `call_qkv_layer_` did, if it did anything."""
    if attention.__dict__.pop(_MARK, False):
        cast(Any, attention).qkv_bias_separate = False
