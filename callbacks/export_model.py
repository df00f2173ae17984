"""The trained network as files, at the end of training."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from design_lightning._names import did_you_mean
from design_lightning.callbacks._layers import network_of, refuse_sharding
from design_lightning.callbacks.batch_norm_recalibration import BatchNormRecalibration
from design_lightning.export import save

Writer = Callable[[nn.Module, Path, Mapping[str, Any]], object]


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Args:
        suffix: of its files.
        packages: that it needs, of the extra `export`.
        write: from the network, a path and the arguments of `timm.create_model` to the file; None where this release has none.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    write: Writer | None = None


FORMATS = {
    "safetensors": Format(".safetensors", write=save),
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format(".xml", ("openvino",)),
}


class ExportModel(Callback):
    """At the end of `fit`, writes the best checkpoint's network, or the final one where no checkpoint was saved.

    The best checkpoint is `best_model_path` of the first `ModelCheckpoint`. Where its layers are in other stages than at the end
    of training, such as with real weights, the final weights are exported, and a warning says so. With an averaging callback a
    checkpoint holds the average, and the final weights are the average. The first process alone writes, and with
    `fast_dev_run` none. Whether the network can be exported is found out before training, by exporting it as it is then to a
    folder that is deleted.

    Formats:

        safetensors   `design_lightning.export.save`: latent weights and all, for `design_lightning.load`

    Args:
        formats: names of formats.
        path: of the files, to which each format adds its suffix; `model` in the log folder of the run if null.

    Raises:
        ValueError: if a format is unknown, this release does not write it, its package is missing, the network cannot be
            exported, or the strategy shards weights.
    """

    def __init__(self, formats: Sequence[str] = ("safetensors",), path: str | None = None) -> None:
        self.formats = tuple(formats)
        self.path = path
        if not self.formats:
            raise ValueError(f"formats is empty, so nothing would be exported: name some of {', '.join(_written())}")
        for name in self.formats:
            _check_format(name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        refuse_sharding(self, trainer)
        with TemporaryDirectory() as folder:
            self._write(pl_module, Path(folder) / "model")

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
            paths = self._write(pl_module, path)
        for written in paths:
            print(f"written: {written} ({best or 'final weights'})")

    def _write(self, module: LightningModule, path: Path) -> list[Path]:
        """Writes every format, and gives the paths."""
        arguments = dict(module.hparams).get("backbone_args") or {}
        paths = []
        for name in self.formats:
            each = FORMATS[name]
            assert each.write is not None
            target = path if path.name.endswith(each.suffix) else path.with_name(path.name + each.suffix)
            each.write(network_of(module), target, arguments)
            paths.append(target)
        return paths


def _written() -> list[str]:
    return [name for name, each in FORMATS.items() if each.write is not None]


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise ValueError(f"unknown export format {name!r}: {did_you_mean(name, FORMATS)}")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"export format {name!r} needs {', '.join(missing)}: pip install design-lightning[export]; without it, formats are "
            f"{', '.join(_written())}"
        )
    if FORMATS[name].write is None:
        raise ValueError(f"export format {name!r} is not written by this release; formats are {', '.join(_written())}")


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
