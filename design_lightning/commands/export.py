"""`design-train export`: a checkpoint as files to ship, each compared with the network that it came from."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from design_lightning.commands.lightning import DesignCLI, load_weights, run
from design_lightning.export.formats import check_format, export_model
from design_lightning.export.report import Exports
from design_lightning.training.checkpoint_files import read_checkpoint
from design_lightning.training.provenance import about_module
from design_lightning.training.trainer import DesignTrainer

Precision = Literal["float32", "float16", "bfloat16"]


class ExportTrainer(DesignTrainer):
    """The Trainer of this command, which trains nothing."""

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        format: list[str] | None = None,
        out: str | None = None,
        name: str = "model",
        images: int = 100,
        dtype: Precision = "float32",
        json: bool = False,
        weights_only: bool | None = None,
    ) -> None:
        """Writes a network as files, compares each with it on validation images, and prints a table.

        A file that computes something else than the network is not kept, and the command ends with an error.

        Args:
            model: whose backbone is exported.
            datamodule: whose validation images are compared; without one, 16 images of noise.
            ckpt_path: the checkpoint; without one, the weights that the configuration starts from.
            format: packed, onnx, openvino, onnx_int8, openvino_int8, safetensors; several may follow, such as
                `--format onnx openvino`. The first three if not given. The int8 ones need validation images like those to come.
            out: the folder; `exported/` below default_root_dir if not given.
            name: of the files, before their suffix.
            images: how many images are compared.
            dtype: of the floats of a packed file: float32, float16 or bfloat16.
            json: print JSON in place of the table.
            weights_only: false reads a checkpoint that holds other things than tensors and plain values; only of a trusted file.

        Raises:
            ValueError: if the model has no binary layer, a file disagrees, or an argument is out of range.
        """
        formats = tuple(format or ("packed", "onnx", "openvino"))
        for each in formats:
            check_format(each)
        if images < 1:
            raise ValueError(f"images is {images}, but must be at least 1")
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise ValueError(f"{type(model).__name__} has no backbone; export is for DesignClassifier and its like")
        checkpoint = None
        if ckpt_path is not None:
            checkpoint = read_checkpoint(ckpt_path, "ckpt_path", weights_only is not False)
            load_weights(model, checkpoint, ckpt_path)
        about_module(model, checkpoint).describe_(backbone)
        batch, labels = (None, None) if datamodule is None else first_images(datamodule, images)
        if batch is None:
            print("no data is given, so the files are compared on 16 images of noise", file=sys.stderr)
        exports = export_model(
            backbone,
            Path(out if out is not None else Path(self.default_root_dir) / "exported") / name,
            formats,
            batch,
            model_args=dict(model.hparams).get("backbone_args") or {},
            dtype=getattr(torch, dtype),
            labels=labels,
            report=lambda text: print(text, file=sys.stderr, flush=True),
        )
        _print(exports, json)


def first_images(data: LightningDataModule, count: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The first validation images of data, normalised: [N, C, H, W] of at most `count`; and their labels [N]."""
    data.prepare_data()
    data.setup("validate")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in data.val_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        readable = batch[1] >= 0
        images.append(batch[0][readable])
        labels.append(batch[1][readable])
        if sum(map(len, images)) >= count:
            break
    return (torch.cat(images)[:count], torch.cat(labels)[:count]) if images else (None, None)


class ExportCLI(DesignCLI):
    """The command line of this command: configurations, checkpoints and errors as those of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one command."""
        return {"export": {"model", "datamodule"}}

    before_export = DesignCLI.before_validate


def main(command: str, args: Sequence[str]) -> None:
    """Runs the command."""
    run(command, _with_lists(args), ExportCLI, ExportTrainer, saves_config=False)


def _with_lists(args: Sequence[str]) -> list[str]:
    """The arguments as jsonargparse takes them: `--format a b` as `--format=[a,b]`, `--json` as `--json=true`."""
    made: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--json":
            arg = "--json=true"
        elif arg == "--format":
            names = []
            while rest and not rest[0].startswith("-"):
                names.append(rest.pop(0))
            arg = f"--format=[{','.join(names)}]"
        elif arg.startswith("--format=") and not arg.startswith("--format=["):
            arg = f"--format=[{arg.partition('=')[2]}]"
        made.append(arg)
    return made


def _print(exports: Exports, json: bool) -> None:
    if json:
        import json as encoder

        print(encoder.dumps(exports.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(exports.table())
    for each in exports.files:
        for layer, reason in each.stay_float.items():
            console.print(f"{each.format}: {layer} runs as float: {reason}", soft_wrap=True)
        print(f"written: {each.path}")
