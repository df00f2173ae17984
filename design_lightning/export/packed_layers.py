"""What a reader of a packed file has to know of a layer beside its tensors, as plain values: see docs/format.md."""

from typing import Any, cast

from torch import Tensor, nn

from design_lightning.binary.activations import OWN_ACTIVATIONS, DeSign
from design_lightning.binary.packed import PackedConv2d, PackedLayer


def description(layer: PackedLayer, model: nn.Module) -> dict[str, Any]:
    """The kind, shape and geometry of a packed layer of a model, and of the thresholds of its input.

    Raises:
        ValueError: if the norm that scales the thresholds is none of the model's.
    """
    return {**_product(layer), "activation": _activation(layer, model)}


def _product(layer: PackedLayer) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "linear", "shape": list(layer.signs.shape)}
    if not isinstance(layer, PackedConv2d):
        return facts
    geometry = layer.geometry
    left, right, top, bottom = geometry._reversed_padding_repeated_twice
    return {
        **facts,
        "kind": "conv2d",
        "stride": list(geometry.stride),
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
        "padding": "same" if geometry.pads_by_input_size else [top, left, bottom, right],
        "padding_value": _padding_value(layer),
    }


def _padding_value(layer: PackedConv2d) -> int | str:
    geometry = layer.geometry
    if geometry.padding_mode != "zeros":
        return geometry.padding_mode
    is_real = layer.activation is None and geometry.padding_value != "replicate"
    return 0 if is_real else geometry.padding_value  # a real-valued input has zeros around it


def _activation(layer: PackedLayer, model: nn.Module) -> dict[str, Any] | None:
    activation = layer.activation
    if activation is None:
        return None
    kinds: dict[type[nn.Module], str] = {kind: name for name, kind in OWN_ACTIVATIONS.items()}
    kind = type(activation)
    facts: dict[str, Any] = {"kind": kinds.get(kind, f"{kind.__module__}.{kind.__qualname__}")}
    if isinstance(activation, DeSign):
        facts["align"] = activation.align
        facts["grid"] = None if activation.grid is None else list(activation.grid)
        facts["prefix_tokens"] = activation.prefix_tokens
        facts["gamma"] = None if activation.gamma_from is None else _name_of_weight(activation.gamma_from, model)
    return facts


def _name_of_weight(norm: nn.Module, model: nn.Module) -> str:
    """The key of a norm's weight in the model's state dict; the norm itself may be another one by now, of the same weight."""
    weight = cast(Tensor, norm.weight)
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), None)
    if name is None:
        raise ValueError(f"the norm {norm} scales thresholds, but its weight is no parameter of the model")
    return name
