"""The backbone of a classifier: a timm network by name, and the weights that it may start from."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

import design_lightning.models  # noqa: F401  registers the papers' networks with timm
from design_lightning._names import did_you_mean


def create_backbone(
    name: str,
    num_classes: int,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """A timm network by name, with as many input channels as the data has.

    Raises:
        OSError: if pretrained weights are not to be had.
        ValueError: if timm has no network of that name (names the nearest), or an argument is not a plain value or has a
            place of its own.
    """
    for own in ("num_classes", "pretrained"):
        if own in (arguments or {}):
            raise ValueError(f"backbone_args has {own!r}, which is an argument of its own: set it beside backbone_args")
    try:
        json.dumps(dict(arguments or {}))
    except TypeError as error:
        raise ValueError(
            f"backbone_args must be plain values that a checkpoint can hold (a layer by its name): {error}"
        ) from error
    family = name.removeprefix("timm/").split(".")[0]
    if ":" not in name and not timm.is_model(family):
        raise ValueError(
            f"unknown backbone {name!r}: {did_you_mean(family, timm.list_models())}; timm.list_models() lists all"
        )
    arguments = dict(arguments or {})
    if input_size is not None and input_size[0] != 3:
        arguments.setdefault("in_chans", input_size[0])
    return create_network(name, "backbone_args", pretrained=pretrained, num_classes=num_classes, **arguments)


def create_network(name: str, place: str, **arguments: Any) -> nn.Module:
    """`timm.create_model`, which says what to do about unknown arguments, and where weights cannot be downloaded.

    Args:
        name: of timm.
        place: the option that passes arguments to timm; named in the error.
        **arguments: of `timm.create_model`.

    Raises:
        OSError: if weights are not to be had.
        ValueError: if the network has no such argument.
    """
    try:
        network: nn.Module = timm.create_model(name, **arguments)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unknown or unknown[1] not in arguments:
            raise
        raise ValueError(f"{name!r} has no argument {unknown[1]!r}: take it out of {place}") from error
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"the weights of {name!r} were not to be had: {reason} Connect and try again, or give a file: "
            f"pretrained: false and {place}: {{checkpoint_path: FILE}}"
        ) from error
    return network


def load_weights_(backbone: nn.Module, state: Mapping[str, Any], path: str) -> None:
    """Loads the backbone's part of a LightningModule's state dict, as the start of another stage.

    Kernels, scales and temperatures that are not learned stay as this backbone's configuration has them, and so do weight
    binarizers and activations of another kind; a warning counts the latter.

    Raises:
        ValueError: if the rest does not fit: it is another network.
    """
    state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    for name, module in backbone.named_modules():
        for constant in getattr(module, "start", {}):
            if not isinstance(getattr(module, constant), nn.Parameter):
                state[f"{name}.{constant}"] = getattr(module, constant)
    own = backbone.state_dict()
    keys = state.keys() | own.keys()
    differing = {k for k in keys if k not in state or k not in own or not _same_shape(state[k], own[k])}
    others = sorted(
        key for key in differing if not {"weight_binarizer", "activation", "_extra_state"} & set(key.split("."))
    )
    if others:
        shown = ", ".join(others[:3])
        raise ValueError(f"weights {path!r} are of another network: {len(others)} tensors differ, among them {shown}")
    left = [key for key in differing if not key.endswith("_extra_state")]
    if left:
        rank_zero_warn(
            f"weights {path!r}: {len(left)} tensors of weight binarizers and activations differ and stay as they start"
        )
    backbone.load_state_dict({key: value for key, value in state.items() if key not in differing}, strict=False)


def _same_shape(first: Any, second: Any) -> bool:
    return getattr(first, "shape", None) == getattr(second, "shape", None)
