"""The trained network as files, at the end of training."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from design_lightning.callbacks._layers import network_of, refuse_sharding
from design_lightning.callbacks.batch_norm_recalibration import BatchNormRecalibration
from design_lightning.export.formats import FORMATS, check_format, export_model
from design_lightning.export.report import Exports
from design_lightning.export.verification import random_images
from design_lightning.surgery import binary_layers, set_stage_, surgery_record
from design_lightning.training.provenance import about_module


class ExportModel(Callback):
    """At the end of `fit`, writes the best checkpoint's network, or the final one where no checkpoint was saved.

    The best checkpoint is `best_model_path` of the first `ModelCheckpoint`. Where its layers are in other stages than at the end
    of training, such as with real weights, the final weights are exported, and a warning says so. With an averaging callback a
    checkpoint holds the average, and the final weights are the average. The first process alone writes, and with
    `fast_dev_run` none. Whether the network can be exported is found out before training, by exporting it as it is then to a
    folder that is deleted.

    Formats, each compared with the network on validation images before it is kept (`design_lightning.export.export_model`):

        safetensors    latent weights and all, to train on
        packed         one bit a binary weight, for `design_lightning.load`
        onnx           standard operators; binary weights take one bit in the file, and run as float
        openvino       binary layers run as 1-bit convolutions
        onnx_int8      as onnx, with int8 for the float layers, calibrated with the validation images
        openvino_int8  as openvino, in the same way

    Args:
        formats: names of formats; all but `safetensors` need the network in stage `both` at the end.
        path: of the files, to which each format adds its suffix; `model` in the log folder of the run if null.
        images: with how many validation images the files are compared; without validation, 16 images of noise.
        dtype: of the floats of a packed file: float32, float16 or bfloat16.

    Raises:
        ValueError: if a format is unknown, the network cannot be exported, a file computes something else than the network, or
            the strategy shards weights.
        ImportError: if a format's package is missing.
    """

    needs_whole_weights = True

    def __init__(
        self,
        formats: Sequence[str] = ("safetensors",),
        path: str | None = None,
        images: int = 100,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        self.formats = tuple(formats)
        self.path = path
        self.images = images
        self.dtype: torch.dtype = getattr(torch, dtype)
        if not self.formats:
            raise ValueError(f"formats is empty, so nothing would be exported: name some of {', '.join(FORMATS)}")
        if images < 1:
            raise ValueError(f"images is {images}, but must be at least 1")
        for name in self.formats:
            check_format(name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        refuse_sharding(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        network = network_of(pl_module)
        stages = {layer.stage for layer in binary_layers(network).values()}
        if self.formats != ("safetensors",) and stages - {"both"}:
            network = copy.deepcopy(network)
            set_stage_(network, "both")  # as it has to be at the end
        with TemporaryDirectory() as folder:
            # In float32, for what rounding does to a network that is not trained says nothing.
            self._write(network, pl_module, Path(folder) / "model", None, torch.float32, runs=0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # the Trainer sets it in a connector
            return
        log_dir = trainer.log_dir  # asks the other processes, so all of them have to come here
        if not trainer.is_global_zero:
            return
        path = Path(self.path or Path(log_dir or trainer.default_root_dir) / "model")
        path.parent.mkdir(parents=True, exist_ok=True)
        best = _best_checkpoint(trainer)
        checkpoint = None
        if best is not None:
            checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(best, weights_only=True)
            if other := _other_stage(checkpoint["state_dict"], pl_module.state_dict()):
                warnings.warn(f"the best checkpoint, {best}, {other}: the final weights are exported", stacklevel=2)
                best = checkpoint = None
        with nullcontext() if checkpoint is None else _weights_of(checkpoint, trainer, pl_module):
            network = network_of(pl_module)
            about_module(pl_module, checkpoint).describe_(network)
            images = _validation_images(trainer, self.images)
            exports = self._write(network, pl_module, path, images, self.dtype, runs=20)
        if self.formats != ("safetensors",):
            print(exports)
        for each in exports.files:
            print(f"written: {each.path} ({best or 'final weights'})")

    def _write(
        self,
        network: nn.Module,
        module: LightningModule,
        path: Path,
        images: Tensor | None,
        dtype: torch.dtype,
        runs: int,
    ) -> Exports:
        """Writes every format."""
        arguments = dict(module.hparams).get("backbone_args") or {}
        if images is None and (record := surgery_record(network)) is not None and record.input_shape is not None:
            images = random_images(record.input_shape[1:], 2 if runs == 0 else 16)
        return export_model(network, path, self.formats, images, model_args=arguments, dtype=dtype, runs=runs)


def _validation_images(trainer: Trainer, count: int) -> Tensor | None:
    """The first images of the validation data as the network gets them, float32, on the CPU; None if there are none."""
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    found: list[Tensor] = []
    for batch in loader or ():
        batch = trainer.strategy.batch_to_device(batch)
        images = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(images, Tensor):
            return None
        found.append(images.float().cpu())
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count] if found else None


def _best_checkpoint(trainer: Trainer) -> str | None:
    checkpoint = trainer.checkpoint_callback
    return (checkpoint.best_model_path or None) if isinstance(checkpoint, ModelCheckpoint) else None


def _other_stage(stored: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How the stage of a layer differs between two state dicts; empty where none does."""
    for key, state in own.items():
        there = stored.get(key)
        if isinstance(state, dict) and isinstance(there, dict) and there.get("stage") != state.get("stage"):
            layer = key.removesuffix("._extra_state")
            return f"has {layer} in stage {there.get('stage')!r}, the end of training in {state.get('stage')!r}"
    return ""


@contextmanager
def _weights_of(checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Inside, the module has the weights of a checkpoint; afterwards its own again."""
    own = copy.deepcopy(pl_module.state_dict())
    device = pl_module.device
    pl_module.on_load_checkpoint(checkpoint)
    try:
        pl_module.load_state_dict(checkpoint["state_dict"])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the Trainer sets it in a connector
            if isinstance(callback, BatchNormRecalibration) and "export" in callback.before:
                pl_module.to(trainer.strategy.root_device)
                callback.recalibrate_(trainer, pl_module, every_process=False)
        yield
    finally:
        pl_module.to(device).load_state_dict(own)
