"""What rebuilds a binarized timm network, but for its tensors: the text that its file holds beside them.

format_version  2
architecture    the name for `timm.create_model`
model_args      its other arguments
float_head      whether the classifier is float; where the configuration makes one binary, another took its place later
binary          `BinaryConfig`
input_shape     of the probe's batch, by which surgery learned what reaches what
extra_state     the layers' stages, by state-dict key
packed          of each layer whose weights are stored as bits: what a reader needs beside its tensors (docs/format.md); else null
about           labels, input normalisation, and how it was trained: `About`
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import timm
import torch
from torch import Tensor, nn

import design_lightning.models  # noqa: F401  registers the papers' networks with timm
from design_lightning._names import did_you_mean, in_a_line
from design_lightning.binary import BinaryLayer
from design_lightning.binary.packed import PackedLayer
from design_lightning.export.about import About
from design_lightning.export.packed_layers import description
from design_lightning.surgery import BinaryConfig, set_stage_, surgery_record
from design_lightning.surgery.binarize import operate_
from design_lightning.surgery.packing import pack_layers_, packed_layers

FORMAT_VERSION = 2
_WEIGHT_SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
FOLDED = "_folded"
"""The attribute of a model whose batch norms `convert_` folded: what became of each layer."""
_CLASS_FIELDS = ("activation", "estimator", "weight")


@dataclass(frozen=True)
class Metadata:
    """The fields of the module's text."""

    architecture: str
    model_args: dict[str, Any]
    float_head: bool
    binary: dict[str, Any]
    input_shape: list[int] | None
    extra_state: dict[str, Any]
    packed: dict[str, Any] | None
    about: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, model_args: Mapping[str, Any] | None = None) -> Self:
        """That of a binarized network.

        Args:
            model: the network.
            model_args: what `timm.create_model` got beside the name, `num_classes` and `in_chans`.

        Raises:
            ValueError: if the model is not binarized, or is no network of timm.
        """
        if FOLDED in model.__dict__:
            raise ValueError(
                f"convert_ folded batch norms of the {type(model).__name__}, so its name no longer rebuilds it; save the network "
                "before, or convert it with fold=False"
            )
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
        arguments = _without_weight_sources(model_args or {})
        if "num_classes" not in arguments and getattr(model, "num_classes", None) is not None:
            arguments["num_classes"] = model.num_classes
        shape = record.input_shape
        if shape and len(shape) == 4 and shape[1] != 3:
            arguments.setdefault("in_chans", shape[1])
        return cls(
            architecture,
            arguments,
            float_head=not _has_binary_classifier(model),
            binary=record.config.to_dict(),
            input_shape=None if shape is None else list(shape),
            extra_state={key: value for key, value in model.state_dict().items() if not isinstance(value, Tensor)},
            packed={name: description(layer, model) for name, layer in packed_layers(model).items()} or None,
            about=About.of(model).to_dict(),
        )

    def to_text(self) -> str:
        """As JSON.

        Raises:
            ValueError: if a value is none of JSON's.
        """
        try:
            return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model_args and BinaryConfig must be plain values that JSON can hold: {error}") from error

    @classmethod
    def from_text(cls, text: str, trust: bool = False) -> Self:
        """What `to_text` gave.

        Args:
            text: the JSON.
            trust: whether `build` may import classes that are not of this package.

        Raises:
            ValueError: if the text is another one, of another format, names no network of timm, or a class that is not trusted.
        """
        stored = read_json(text)
        if not isinstance(stored, dict):
            raise ValueError(f"the metadata must be an object, not {stored!r}")
        version = stored.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"it has format version {version}, but this release reads {FORMAT_VERSION}; update design-lightning"
            )
        for name, kind in _TYPES.items():
            if not isinstance(stored.get(name), kind):
                raise ValueError(f"{name!r} of the metadata is {stored.get(name)!r}, which dl.save does not write")
        if not timm.is_model(stored["architecture"]):
            raise ValueError(
                f"timm has no network {stored['architecture']!r}: {did_you_mean(stored['architecture'], timm.list_models())}"
            )
        if not trust:
            refuse_foreign_classes(stored["binary"])
        stored["model_args"] = _without_weight_sources(stored["model_args"])
        return cls(**{name: stored[name] for name in _TYPES})

    @property
    def creation(self) -> str:
        """The call that creates the float network, in words."""
        return f"timm.create_model({self.architecture!r}, **{self.model_args})"

    def build(self) -> nn.Module:
        """The network, on the CPU, with random weights; torch's random state stays as it is.

        Raises:
            ValueError: if timm or `binarize_` does not take the arguments.
        """
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whoever binarized it first was warned
                model: nn.Module = timm.create_model(self.architecture, **self.model_args)
                operate_(model, BinaryConfig.from_dict(self.binary), self.input_shape)
                if self.packed is not None:
                    set_stage_(model, "both")
                    pack_layers_(model)
                if self.float_head and _has_binary_classifier(model):
                    cast(Any, model).reset_classifier(model.num_classes)
        except Exception as error:  # whatever a constructor may raise
            raise ValueError(f"{self.creation} and binarize_ do not rebuild it: {in_a_line(error)}") from error
        return model


_TYPES = {
    "architecture": str,
    "model_args": dict,
    "float_head": bool,
    "binary": dict,
    "input_shape": list | None,
    "extra_state": dict,
    "packed": dict | None,
    "about": dict,
}


def read_json(text: str) -> Any:
    """A JSON text of a file.

    Raises:
        ValueError: if it is none, or nested so deeply that Python does not read it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its metadata is nested too deeply for any that dl.save writes") from error


def refuse_foreign_classes(binary: Mapping[str, Any]) -> None:
    """Refuses a stored `BinaryConfig` by which a class outside this package would be imported.

    Raises:
        ValueError: names the class.
    """
    for path in _dotted_paths(binary):
        if not path.startswith("design_lightning."):
            raise ValueError(
                f"it names the class {path!r}, which would be imported; if you trust the file, pass trust=True"
            )


def _dotted_paths(binary: Mapping[str, Any]) -> Iterator[str]:
    overrides = binary.get("overrides")
    for fields in (binary, *(overrides.values() if isinstance(overrides, Mapping) else ())):
        if isinstance(fields, Mapping):
            yield from (str(fields[name]) for name in _CLASS_FIELDS if "." in str(fields.get(name)))


def _without_weight_sources(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _WEIGHT_SOURCES}


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm network; several in a distilled one, none where it has no such thing."""
    found = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    several = found if isinstance(found, tuple | list) else (found,)
    return [head for head in several if isinstance(head, nn.Module)]


def _has_binary_classifier(model: nn.Module) -> bool:
    return any(
        isinstance(module, BinaryLayer | PackedLayer) for head in classifiers(model) for module in head.modules()
    )
