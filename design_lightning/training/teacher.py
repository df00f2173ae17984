"""The teacher of a distillation: a frozen network, its precision and its normalisation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

import design_lightning.models  # noqa: F401  registers the papers' networks with timm
from design_lightning._names import did_you_mean
from design_lightning.training.backbone import create_network

Precision = Literal["float32", "bfloat16", "float16"]
Normalisation = tuple[Sequence[float], Sequence[float]]
FILES = (".ckpt", ".safetensors")


class Teacher:
    """A network in eval mode, without gradients, in its own precision. It is no `nn.Module`, so nothing registers it.

    Args:
        network: it is frozen.
        precision: its weights are float32; with another one its layers run under autocast, whatever the student does.
        given: mean and std, a value a channel, by which the images were normalised.
        wanted: those that the network learned with; the images are renormalised where both are given.
        channels_last: whether it runs in the channels-last memory format.
    """

    def __init__(
        self,
        network: nn.Module,
        precision: Precision = "float32",
        given: Normalisation | None = None,
        wanted: Normalisation | None = None,
        channels_last: bool = False,
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.eval().requires_grad_(False).float().to(memory_format=self.memory_format)
        self.precision = precision
        self.scale = self.shift = None
        if given is not None and wanted is not None:
            (mean, std), (own_mean, own_std) = (torch.tensor(pair, dtype=torch.float64) for pair in (given, wanted))
            self.scale = (std / own_std).view(-1, 1, 1).float()
            self.shift = ((mean - own_mean) / own_std).view(-1, 1, 1).float()

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self  # frozen: a copy of the student has the same teacher

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K] of the student's images [B, C, H, W]. The network moves to their device."""
        device = images.device
        if next(self.network.parameters()).device != device:
            self.network.to(device)
        images = images.float()
        if self.scale is not None and self.shift is not None:
            self.scale, self.shift = self.scale.to(device), self.shift.to(device)
            images = images * self.scale + self.shift
        images = images.contiguous(memory_format=self.memory_format)
        low = self.precision != "float32"
        with torch.autocast(device.type, dtype=getattr(torch, self.precision) if low else None, enabled=low):
            logits: Tensor = self.network(images)
        return logits


def load_network(
    name: str, pretrained: bool, arguments: dict[str, Any], channels: int | None
) -> tuple[nn.Module, Normalisation | None]:
    """The network of a name or a file, and the mean and std that it learned with, where that is known.

    Raises:
        FileNotFoundError: if the file is none.
        OSError: if pretrained weights are not to be had.
        ValueError: if timm has no network of that name, or the file holds none of ours.
    """
    if is_file(name):
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"the teacher {name!r} is no file: train it first, and give as model.distillation.teacher the path of the "
                "checkpoint that `design-train fit` prints"
            )
        from design_lightning.export import load  # which imports this package for a .ckpt

        return load(name, trust=True), _stored_normalisation(name)
    if channels not in (None, 3):
        arguments = {"in_chans": channels, **arguments}
    if pretrained and ":" not in name and not timm.is_model_pretrained(name.removeprefix("timm/")):
        raise ValueError(
            f"there are no pretrained weights of {name!r}; train it (`binary: null`), and give the path of its checkpoint"
        )
    network = create_network(name, "teacher_args", pretrained=pretrained, **arguments)
    if not pretrained:
        if "checkpoint_path" not in arguments:
            rank_zero_warn(
                f"the teacher {name!r} has random weights: set pretrained: true, or give the path of a checkpoint"
            )
        return network, None
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    return network, (cfg["mean"], cfg["std"]) if cfg.get("mean") and cfg.get("std") else None


def is_file(name: str) -> bool:
    """Whether a teacher's name is a path."""
    return Path(name).suffix in FILES


def check_name(name: str) -> None:
    """Refuses what is neither a path, nor an address of a hub, nor a name that timm has.

    Raises:
        ValueError: names the nearest.
    """
    family = name.removeprefix("timm/").split(".")[0]
    if not is_file(name) and ":" not in name and not timm.is_model(family):
        raise ValueError(
            f"unknown teacher {name!r}: {did_you_mean(family, timm.list_models())} It is a name of timm.list_models(), or a "
            f"path that ends in {' or '.join(FILES)}"
        )


def _stored_normalisation(path: str) -> Normalisation | None:
    if Path(path).suffix != ".ckpt":
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
    mean, std = stored.get("mean"), stored.get("std")
    return (mean, std) if mean and std else None
