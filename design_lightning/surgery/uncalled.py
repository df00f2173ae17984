"""Modules that read the weight of an inner layer without calling it, and the switch that each has for calling it.

A layer that is not called cannot binarize its input.

    qkv_bias_separate         timm's BEiT, EVA and Swin V2 attentions compute F.linear(x, qkv.weight, a bias made of parts);
                              True calls qkv and adds the bias behind it, which is the same sum
    activation_relu_or_gelu   torch's TransformerEncoderLayer has a fused kernel for evaluation without gradients;
                              0, for "another activation", calls its layers

Surgery turns the switch where a layer inside becomes binary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SWITCHES: dict[str, Any] = {"qkv_bias_separate": True, "activation_relu_or_gelu": 0}
_BEFORE = "_switches_before_surgery"


def _turn(module: nn.Module) -> dict[str, Any]:
    """Turns the switches of one module; returns those that it turned, as they were."""
    before = {}
    for name, calling in _SWITCHES.items():
        value = getattr(module, name, calling)
        if value != calling:
            before[name] = value
            setattr(module, name, calling)
    return before


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Has every such layer called for a while."""
    turned = [(module, before) for module in model.modules() if (before := _turn(module))]
    try:
        yield
    finally:
        for module, before in turned:
            for name, value in before.items():
                setattr(module, name, value)


def call_layers_(module: nn.Module) -> None:
    """Has the layers of one module called from now on."""
    if before := _turn(module):
        module.__dict__[_BEFORE] = before


def undo_call_layers_(module: nn.Module) -> None:
    """Takes back what `call_layers_` did, if it did anything."""
    for name, value in module.__dict__.pop(_BEFORE, {}).items():
        setattr(module, name, value)
