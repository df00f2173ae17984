"""A binarized timm network in one `.safetensors` file: its tensors, and what rebuilds it, with no pickle.

The header's metadata holds one JSON text under the key `design_lightning`:

    format_version  1
    architecture    the name for `timm.create_model`
    model_args      its other arguments
    binary          `BinaryConfig`
    input_shape     of the probe's batch, by which surgery learned what reaches what
    extra_state     the layers' stages, by state-dict key
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import design_lightning.models  # noqa: F401  registers the papers' networks with timm
from design_lightning.surgery import BinaryConfig, SurgeryRecord, surgery_record
from design_lightning.surgery.binarize import operate_

FORMAT_VERSION = 1
_KEY = "design_lightning"
_EXTRA = "_extra_state"


def save(model: nn.Module, path: str | Path, model_args: Mapping[str, Any] | None = None) -> Path:
    """Writes a binarized timm network, latent weights and all, so that `load(path)` rebuilds it.

    Args:
        model: what `binarize_` made of a timm network.
        path: the file; `.safetensors` by custom. It appears when it is complete.
        model_args: what `timm.create_model` got beside the name, `num_classes` and `in_chans`, such as `{"img_size": 64}`.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not binarized, is no network of timm, or differs from what its name and `model_args` build.
    """
    record = surgery_record(model)
    if record is None:
        raise ValueError(
            f"{type(model).__name__} has no record of a surgery; call binarize_(model) on the whole network"
        )
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None or not timm.is_model(architecture):
        raise ValueError(
            f"{type(model).__name__} is no network of timm, so its name cannot rebuild it; save its state_dict and its "
            "BinaryConfig instead"
        )
    arguments = dict(model_args or {})
    if "num_classes" not in arguments and getattr(model, "num_classes", None) is not None:
        arguments["num_classes"] = model.num_classes
    channels = record.input_shape[1] if record.input_shape and len(record.input_shape) == 4 else 3
    if channels != 3:
        arguments.setdefault("in_chans", channels)
    state = model.state_dict()
    _check_rebuilds(architecture, arguments, record, state)
    stored = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "model_args": arguments,
        "binary": record.config.to_dict(),
        "input_shape": record.input_shape,
        "extra_state": {key: value for key, value in state.items() if key.endswith(_EXTRA)},
    }
    try:
        metadata = {_KEY: json.dumps(stored)}
    except TypeError as error:
        raise ValueError(f"model_args and BinaryConfig must be plain values that JSON can hold: {error}") from error
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(tensors, aside, metadata)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def load(path: str | Path, num_classes: int | None = None) -> nn.Module:
    """A network from a file of `save`, or from a checkpoint of `design-train fit`; in eval mode, on the CPU.

    Args:
        path: `.safetensors`, or Lightning's `.ckpt`.
        num_classes: another number of classes than the file's gives a new classifier, as for fine-tuning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither, or of a newer format, or its tensors do not fit.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file; give one that dl.save or design-train fit wrote")
    if Path(path).suffix == ".ckpt":
        from design_lightning.training import DesignClassifier  # Lightning is not needed for the other format

        model = DesignClassifier.load_from_checkpoint(path, map_location="cpu").backbone
    else:
        model = _load_safetensors(path)
    if num_classes is not None and num_classes != getattr(model, "num_classes", None):
        if not hasattr(model, "reset_classifier"):
            raise ValueError(f"{type(model).__name__} has no classifier, so num_classes={num_classes} cannot be set")
        cast(Any, model).reset_classifier(num_classes)
    return model.eval()


def _load_safetensors(path: str | Path) -> nn.Module:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not readable as safetensors, cut off perhaps: {error}") from error
    if text is None:
        raise ValueError(f"{str(path)!r} holds no binarized network: its metadata has no {_KEY!r}; dl.save writes it")
    stored = json.loads(text)
    if stored["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {stored['format_version']}, but this release reads {FORMAT_VERSION}; "
            "update design-lightning"
        )
    record = SurgeryRecord(BinaryConfig.from_dict(stored["binary"]), _shape(stored["input_shape"]))
    model = _rebuild(stored["architecture"], stored["model_args"], record)
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point() and name in tensors]
    model.to(tensors[names[0]].dtype)
    try:
        model.load_state_dict({**tensors, **stored["extra_state"]})
    except RuntimeError as error:
        raise ValueError(
            f"{str(path)!r} does not fit the {stored['architecture']} of timm {timm.__version__}: {' '.join(str(error).split())}"
        ) from error
    return model


def _shape(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _rebuild(architecture: str, arguments: Mapping[str, Any], record: SurgeryRecord, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        model: nn.Module = timm.create_model(architecture, **arguments)
    with warnings.catch_warnings():  # whoever binarized it first was warned
        warnings.simplefilter("ignore")
        operate_(model, record.config, record.input_shape)
    return model


def _check_rebuilds(architecture: str, arguments: dict[str, Any], record: SurgeryRecord, state: dict[str, Any]) -> None:
    try:
        twin = _rebuild(architecture, arguments, record, "meta").state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"timm.create_model({architecture!r}, **{arguments}) and binarize_ do not rebuild it: {error}"
        ) from error
    differing = [
        key
        for key in {**twin, **state}
        if key not in twin
        or key not in state
        or getattr(twin[key], "shape", None) != getattr(state[key], "shape", None)
    ]
    if differing:
        raise ValueError(
            f"the model differs from timm.create_model({architecture!r}, **{arguments}) in {len(differing)} tensors, such as "
            f"{differing[0]!r}; pass as model_args what it was created with"
        )
