"""What the signs of a binary network do during training, in numbers and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from design_lightning.binary import BinaryActivation, BinaryLayer, DeSign
from design_lightning.callbacks._figures import log_figure, take_figures
from design_lightning.callbacks._forward import aside, images_of
from design_lightning.callbacks._layers import chosen_layers, refuse_sharding

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SignFlipMonitor(Callback):
    """Logs how many weights change their sign, and what the binary activations let through.

    Every so many optimizer steps, for each binary layer and as a mean over them:

        flips/<layer>      share of weights whose sign is not that of the last look
        positive/<layer>   share of activations at +1
        dead/<layer>       share of input channels whose activation is the same for all images and places of the batch

    The loggers of TensorBoard, W&B and MLflow also get pictures of thresholded feature maps beside their real-valued ones, as
    `maps/<layer>`. Where there is none of them, it says so at the start.

    Activations are seen in a forward of their own of the batch at hand: in eval mode, without gradients, uncompiled. Hooks
    are there for this forward alone, so that between two looks training costs nothing more, and a compiled network is not
    compiled anew; batch-norm statistics and random numbers stay as they were. With several processes the first one looks,
    at its own batch. The last signs are part of a checkpoint, a bit each. The LightningModule needs a `forward(images)`.

    Args:
        every_n_steps: optimizer steps between two looks.
        images: how many images of the batch are drawn; 0 draws none.
        channels: how many channels of each are drawn, the first ones.
        layers: the binary layers looked at: a name in the backbone, a glob, or `re:` and a regular expression; null is all.
        drawn_layers: how many of them are drawn, from the first to the last.

    Raises:
        ValueError: if an argument is out of range, no binary layer matches, or the strategy shards weights.
    """

    needs_whole_weights = True

    def __init__(
        self,
        every_n_steps: int = 100,
        images: int = 4,
        channels: int = 4,
        layers: str | None = None,
        drawn_layers: int = 4,
    ) -> None:
        least = {"every_n_steps": (every_n_steps, 1), "images": (images, 0), "channels": (channels, 1)}
        for name, (value, low) in {**least, "drawn_layers": (drawn_layers, 1)}.items():
            if value < low:
                raise ValueError(f"{name} must be at least {low}, not {value}")
        self.every_n_steps = every_n_steps
        self.images = images
        self.channels = channels
        self.layers = layers
        self.drawn_layers = drawn_layers
        self.metrics: dict[str, float] = {}
        """What was logged at the last look."""
        self._signs: dict[str, Tensor] = {}
        self._step = 0

    @property
    def state_key(self) -> str:
        """Tells two instances apart in a checkpoint."""
        return f"{type(self).__qualname__}[every_n_steps={self.every_n_steps}, layers={self.layers}]"

    def state_dict(self) -> dict[str, Any]:
        """The signs of the last look, eight to a byte, with the shapes of the weights."""
        packed = {name: torch.from_numpy(np.packbits(signs.cpu().numpy())) for name, signs in self._signs.items()}
        return {"signs": packed, "shapes": {name: list(signs.shape) for name, signs in self._signs.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same, from a checkpoint."""
        self._signs = {}
        for name, packed in state_dict["signs"].items():
            shape = state_dict["shapes"][name]
            bits = np.unpackbits(packed.cpu().numpy(), count=int(np.prod(shape)))
            self._signs[name] = torch.from_numpy(bits).bool().view(shape)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        refuse_sharding(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        chosen_layers(self, pl_module, self.layers)
        if self.images and trainer.loggers and not take_figures(trainer.loggers):
            kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            rank_zero_info(
                f"SignFlipMonitor draws nothing: {kinds} takes no pictures (TensorBoardLogger, WandbLogger and MLFlowLogger do)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._step = trainer.global_step
        layers = chosen_layers(self, pl_module, self.layers)
        if not _same_layers(self._signs, layers):
            self._signs = {name: weight_signs(layer) for name, layer in layers.items()}

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or step // self.every_n_steps == self._step // self.every_n_steps:
            self._step = step
            return
        self._step = step
        if trainer.is_global_zero:
            layers = chosen_layers(self, pl_module, self.layers)
            self.metrics = self._count_flips(layers)
            self._look_at_activations(trainer, pl_module, layers, images_of(batch))
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics, step=step)

    def _count_flips(self, layers: Mapping[str, BinaryLayer]) -> dict[str, float]:
        shares = {}
        for name, layer in layers.items():
            signs = weight_signs(layer)
            shares[name] = (signs != self._signs[name].to(signs.device)).float().mean()
            self._signs[name] = signs
        return _named("flips", shares)

    def _look_at_activations(
        self, trainer: Trainer, pl_module: LightningModule, layers: Mapping[str, BinaryLayer], images: Tensor
    ) -> None:
        loggers = take_figures(trainer.loggers)
        drawn = _spread(list(layers), self.drawn_layers) if loggers and self.images else []
        seen: dict[str, _Activations] = {}

        def watch(name: str, activation: BinaryActivation) -> RemovableHandle:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                positive, dead = _shares(activation, output)
                seen[name] = _Activations(
                    positive, dead, self._cut(activation, inputs[0], output) if name in drawn else None
                )

            return activation.register_forward_hook(hook)

        handles = [watch(name, layer.activation) for name, layer in layers.items() if layer.activation is not None]
        try:
            with aside(trainer, pl_module):
                pl_module(images)
        finally:
            for handle in handles:
                handle.remove()
        self.metrics |= _named("positive", {name: each.positive for name, each in seen.items()})
        self.metrics |= _named("dead", {name: each.dead for name, each in seen.items()})
        for name, each in seen.items():
            if each.maps is not None:
                figure = draw_maps(*each.maps, title=f"{name}, step {trainer.global_step}")
                for logger in loggers:
                    log_figure(logger, f"maps/{name}", figure, trainer.global_step)

    def _cut(self, activation: BinaryActivation, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """The first images and channels of an activation's input and output; None where they are no maps."""
        real, binary = _as_maps(activation, x), _as_maps(activation, y)
        if real is None or binary is None:
            return None
        return real[: self.images, : self.channels].float().cpu(), binary[: self.images, : self.channels].float().cpu()


@dataclass
class _Activations:
    """What one binary activation gave for a batch: shares of +1 and of dead channels, 0-dim, and what is drawn."""

    positive: Tensor
    dead: Tensor
    maps: tuple[Tensor, Tensor] | None


@torch.no_grad()
def weight_signs(layer: BinaryLayer) -> Tensor:
    """Which weights of a layer are +1, or would be in stage `both`: bool, of the shape of the weights."""
    return layer.weight_binarizer.signs(layer.latent_weight()) > 0


def draw_maps(real: Tensor, binary: Tensor, title: str) -> "Figure":
    """Draws feature maps [B, C, H, W] before and after a binary activation side by side: a row an image, a column a channel."""
    from matplotlib.figure import Figure

    images, channels, height, width = real.shape
    side = 0.9
    panel = (channels * side, images * side * height / width)
    figure = Figure(figsize=(2 * panel[0] + 1.6, panel[1] + 1.1), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    bound = float(real.abs().quantile(0.99)) or 1.0
    picture = left.imshow(_mosaic(real), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
    right.imshow(_mosaic(binary), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    left.set_title("real-valued", fontsize=9)
    right.set_title(f"thresholded: white is +1, {float((binary > 0).float().mean()):.0%}", fontsize=9)
    for axes in (left, right):
        for c in range(1, channels):
            axes.axvline(c * width - 0.5, color="tab:green", linewidth=2)
        for b in range(1, images):
            axes.axhline(b * height - 0.5, color="tab:green", linewidth=2)
        axes.set_xticks(
            [(c + 0.5) * width - 0.5 for c in range(channels)], [str(c) for c in range(channels)], fontsize=7
        )
        axes.set_yticks([(b + 0.5) * height - 0.5 for b in range(images)], [str(b) for b in range(images)], fontsize=7)
        axes.tick_params(length=0)
        axes.set_xlabel("channel", fontsize=8)
    left.set_ylabel("image", fontsize=8)
    bar = left.inset_axes((1.02, 0, 0.03, 1))
    figure.colorbar(picture, cax=bar)
    bar.tick_params(labelsize=7)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    return figure


def _mosaic(maps: Tensor) -> np.ndarray:
    """Maps [B, C, H, W] as one picture [B H, C W]."""
    images, channels, height, width = maps.shape
    return maps.permute(0, 2, 1, 3).reshape(images * height, channels * width).numpy()


def _as_maps(activation: BinaryActivation, x: Tensor) -> Tensor | None:
    """An activation's input or output as [B, C, H, W], or None where it has no places in an image."""
    if x.dim() == 4:
        return x if activation.layout == "NCHW" else x.permute(0, 3, 1, 2)
    if x.dim() == 3 and activation.layout == "NHWC" and isinstance(activation, DeSign) and activation.grid is not None:
        return x[:, activation.prefix_tokens :].transpose(1, 2).unflatten(2, activation.grid)
    return None


def _shares(activation: BinaryActivation, y: Tensor) -> tuple[Tensor, Tensor]:
    """The share of +1 in an activation's output, and the share of channels that are constant."""
    axis = -3 if activation.layout == "NCHW" and y.dim() > 2 else -1
    positive = (y > 0).movedim(axis, 0).flatten(1).float().mean(1)
    return positive.mean(), ((positive == 0) | (positive == 1)).float().mean()


def _named(kind: str, shares: Mapping[str, Tensor]) -> dict[str, float]:
    """Names for a logger, and the mean over the layers."""
    if not shares:
        return {}
    values = torch.stack(list(shares.values())).tolist()
    return {
        **{f"{kind}/{n}": v for n, v in zip(shares, values, strict=True)},
        f"{kind}/mean": sum(values) / len(values),
    }


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of the names, from the first to the last at even distances."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


def _same_layers(signs: Mapping[str, Tensor], layers: Mapping[str, BinaryLayer]) -> bool:
    """Whether signs are those of these layers, and not of another choice of them."""
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    return shapes == {name: each.shape for name, each in signs.items()}
