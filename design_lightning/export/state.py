"""A state dict into a network that was just rebuilt."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from design_lightning.binary._float32 import Float32State


def load_state_(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a state dict; every tensor takes the type, the device and the memory format that it has there.

    Parameters stay the ones that they are: trained or frozen, shared by layers or by a threshold. What is float32 in every
    precision stays float32.

    Raises:
        ValueError: if a tensor is missing, or foreign, or of another shape, or a stage is unknown.
    """
    _check_shapes(model.state_dict(), state)
    example = _example(model, state)
    model.to(example.device, example.dtype)  # buffers that are in no state dict
    thresholds = {
        f"{name}.{each}"
        for name, module in model.named_modules()
        if isinstance(module, Float32State)
        for each in module.float32_state
    }
    try:
        for key, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and key not in thresholds:
                tensor.data = torch.empty_like(state[key])
        model.load_state_dict(state)
    except RuntimeError as error:  # a parameter of whole numbers, say
        raise ValueError(" ".join(str(error).split())) from error


def _check_shapes(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    differing = []
    for key in {**own, **state}:
        if key not in state:
            differing.append(f"{key!r} is missing")
        elif key not in own:
            differing.append(f"{key!r} is foreign")
        elif _shape(state[key]) != _shape(own[key]):
            differing.append(f"{key!r} has the shape {_shape(state[key])}, not {_shape(own[key])}")
    if differing:
        raise ValueError(f"{len(differing)} of {len(own)} tensors do not fit: {', '.join(differing[:3])}")


def _shape(value: Any) -> list[int] | None:
    return list(value.shape) if isinstance(value, Tensor) else None


def _example(model: nn.Module, state: Mapping[str, Any]) -> Tensor:
    """The first real-valued parameter as the state has it."""
    tensors: list[Tensor] = [state[name] for name, _ in model.named_parameters()]
    return next(tensor for tensor in tensors if tensor.is_floating_point())
