"""What `design-train design --model` needs: a network, its images as it takes them, and the inputs of its binary layers."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from design_lightning._names import did_you_mean
from design_lightning.binary import BinaryLayer, DeSign
from design_lightning.kernels.search import Preactivations, SearchConfig, read_image
from design_lightning.surgery import BinaryConfig, binarize_
from design_lightning.surgery.stages import binary_layers


@dataclass(frozen=True)
class InputView:
    """How a network takes its images: (C, H, W), and mean and standard deviation a channel."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Inputs:
    """Image files as batches [B, C, H, W] for a network: the shorter side resized, the middle cropped, normalised."""

    paths: Sequence[str]
    view: InputView
    batch_size: int = 16

    def __iter__(self) -> Iterator[Tensor]:
        channels, height, width = self.view.size
        transform: Any = timm.data.create_transform(
            (channels, height, width), mean=self.view.mean, std=self.view.std, interpolation="bilinear", crop_pct=1.0
        )
        for start in range(0, len(self.paths), self.batch_size):
            paths = self.paths[start : start + self.batch_size]
            yield torch.stack([transform(read_image(path, "L" if channels == 1 else "RGB")) for path in paths])


def preactivations(
    name: str | None, checkpoint: str | None, image_size: int | None, paths: Sequence[str], config: SearchConfig
) -> Preactivations:
    """The inputs of a network's binary layers, as maps of a search.

    Args:
        name: timm's name of the network; may be left out where a checkpoint is given, and must agree with it.
        checkpoint: a `.ckpt` of `design-train fit`, or a `.safetensors` of `dl.save`. Without one the weights are random.
        image_size: pixels of the network's input, if not those that it was trained with.
        paths: of the images.
        config: of the search.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the network is unknown or another than the checkpoint's, or no layer serves.
    """
    model, view = _network(name, checkpoint)
    if image_size is not None:
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}, but a network needs at least 8 pixels")
        view = InputView((view.size[0], image_size, image_size), view.mean, view.std)
    layers = {key: layer for key, layer in binary_layers(model).items() if layer.activation is not None}

    def as_maps(key: str, x: Tensor) -> Tensor | None:
        return _in_standard_deviations(layers[key], x)

    found = Preactivations(
        model,
        layers,
        Inputs(paths, view),
        len(paths),
        config.alphabet.peak,
        (config.rows, config.columns),
        as_maps,
        config.device,
    )
    for key, reason in found.left_out.items():
        print(f"design-train: {key} is left out: {reason}", file=sys.stderr)
    return found


def _network(name: str | None, checkpoint: str | None) -> tuple[nn.Module, InputView]:
    """A network, and how it takes its images."""
    import design_lightning.models  # noqa: F401  registers the papers' networks with timm

    if name is not None and not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}: {did_you_mean(name, timm.list_models())}")
    if checkpoint is None:
        print("design-train: warning: no --checkpoint given, so the network has random weights", file=sys.stderr)
        model = timm.create_model(str(name))
        binarize_(model, BinaryConfig())
        return model, _view_of(model, {})
    from design_lightning.export import load

    model = load(checkpoint)
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is not None and architecture not in (None, name.partition(".")[0]):
        raise ValueError(f"model is {name!r}, but checkpoint {checkpoint!r} holds a {architecture!r}; leave model out")
    given = {}
    if Path(checkpoint).suffix == ".ckpt":
        from design_lightning.training.checkpoint_files import read_checkpoint

        given = read_checkpoint(checkpoint, "checkpoint").get("hyper_parameters", {})
    return model, _view_of(model, given)


def _view_of(model: nn.Module, given: dict[str, Any]) -> InputView:
    """From the run that wrote a checkpoint, else from timm's configuration, which may be of colour where the network is not."""
    known = getattr(model, "pretrained_cfg", None) or {}
    (_, height, width), mean, std = (given.get(key) or known[key] for key in ("input_size", "mean", "std"))
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), len(mean))
    if len(mean) != channels:
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return InputView((channels, height, width), tuple(mean), tuple(std))


def _in_standard_deviations(layer: BinaryLayer, x: Tensor) -> Tensor | None:
    """A layer's input as maps [B, C, H, W] in the unit of its thresholds; None where it has no places in an image."""
    activation = layer.activation
    grid, prefix_tokens = None, 0
    if isinstance(activation, DeSign):
        x = x / activation.unit
        grid, prefix_tokens = activation.grid, activation.prefix_tokens
        if activation.gamma_from is not None and x.dim() == 4:
            gamma = cast(Tensor, activation.gamma_from.weight).abs().clamp_min(1e-6)
            x = x / (gamma.view(-1, 1, 1) if layer.layout == "NCHW" else gamma)
    if layer.layout == "NCHW":
        return x if x.dim() == 4 else None
    if x.dim() == 3 and grid is not None:
        return x[:, prefix_tokens:].transpose(1, 2).unflatten(2, grid)
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else None
