"""`design-train sensitivity`: the accuracy that each layer costs by being binary, and the overrides that follow from it."""

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from design_lightning.commands.lightning import DesignCLI, load_weights, run
from design_lightning.training.checkpoint_files import read_checkpoint
from design_lightning.training.trainer import DesignTrainer

if TYPE_CHECKING:
    from design_lightning.training.sensitivity import Sensitivity

Order = Literal["loss", "gain"]


class SensitivityTrainer(DesignTrainer):
    """The Trainer of this command, which takes devices and precision from a configuration and trains nothing."""

    def sensitivity(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        limit: int | None = None,
        recalibrate: int = 20,
        keep: int = 3,
        by: Order | None = None,
        out: str | None = None,
        memory: float = 2.0,
        json: bool = False,
        weights_only: bool | None = None,
    ) -> None:
        """Measures on validation images what each binary layer costs, and prints overrides that leave the worst float.

        Args:
            model: whose backbone is measured.
            datamodule: its validation images are measured, and its training images recalibrate.
            ckpt_path: the checkpoint to measure; without one, the weights that the configuration starts from.
            limit: how many validation batches; all if not given. Each is looked at twice a layer.
            recalibrate: estimate batch norm anew on so many training batches for each measurement; 0 keeps the model's.
            keep: how many layers the printed overrides leave float; fewer where fewer have a figure above one standard error.
            by: what they are ranked by: `loss`, by binarizing the layer alone, or `gain`, by leaving it float alone; without
                it by loss, or by gain where the float network is the worse one.
            out: the folder of the table and the picture; `sensitivity/` below default_root_dir if not given.
            memory: gigabytes that the batches may take; where they need more, they are read anew in each of the passes.
            json: print JSON in place of the table.
            weights_only: false reads a checkpoint that holds other things than tensors and plain values; only of a trusted file.

        Raises:
            ValueError: if the model has no backbone with a binary layer, or there is nothing to measure on.
        """
        from design_lightning.training.sensitivity import measure_sensitivity

        for name, value, least in (("limit", limit, 1), ("recalibrate", recalibrate, 0), ("keep", keep, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, torch.nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no backbone; sensitivity measures DesignClassifier and its like"
            )
        if ckpt_path is not None:
            load_weights(model, read_checkpoint(ckpt_path, "ckpt_path", weights_only is not False), ckpt_path)
        backbone.to(self.strategy.root_device)
        batches, recalibration = self._read(model, datamodule, limit, recalibrate, memory)
        found = measure_sensitivity(backbone, batches, recalibration, _progress if sys.stderr.isatty() else None)
        by = by or found.order
        others = getattr(getattr(model, "binary_config", None), "overrides", {})
        overrides = found.overrides_yaml(min(keep, len(found.rows)), by, others)
        folder = Path(out) if out is not None else Path(self.default_root_dir) / "sensitivity"
        _write(found, by, overrides, folder)
        _print(found, by, keep, overrides, folder, json)

    def _read(
        self, model: LightningModule, data: LightningDataModule, limit: int | None, recalibrate: int, memory: float
    ) -> tuple[Any, Any]:
        """The validation batches, in memory where they fit, and the training images that recalibrate, if any."""
        from design_lightning.training.sensitivity import hold_batches

        data.prepare_data()
        data.setup("fit" if recalibrate else "validate")
        batches, held = hold_batches(
            data.val_dataloader(),
            limit,
            memory * 1e9,
            check=lambda batch: model.on_before_batch_transfer(batch, 0),
            convert=lambda batch: data.on_after_batch_transfer(batch, 0),
        )
        if not held:
            print(
                f"the images need more than {memory:g} GB, so each pass reads them anew: --memory allows more, --limit takes fewer",
                file=sys.stderr,
            )
        training = islice(data.train_dataloader(), recalibrate)
        return batches, [data.on_after_batch_transfer(batch, 0)[0] for batch in training] if recalibrate else None


class SensitivityCLI(DesignCLI):
    """The command line of this command: configurations, checkpoints and errors as those of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one command."""
        return {"sensitivity": {"model", "datamodule"}}

    before_sensitivity = DesignCLI.before_validate


def main(command: str, args: Sequence[str]) -> None:
    """Runs the command."""
    args = ["--json=true" if arg == "--json" else arg for arg in args]
    run(command, args, SensitivityCLI, SensitivityTrainer, saves_config=False)


def _progress(done: int, total: int) -> None:
    print(f"\rmeasured {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _write(found: "Sensitivity", by: Order, overrides: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found.to_csv(folder / "sensitivity.csv")
    (folder / "sensitivity.json").write_text(found.to_json() + "\n", encoding="utf-8")
    (folder / "overrides.yaml").write_text(overrides, encoding="utf-8")
    found.draw(folder / "sensitivity.png", by)


def _print(found: "Sensitivity", by: Order, keep: int, overrides: str, folder: Path, json: bool) -> None:
    if json:
        print(found.to_json())
        return
    from rich.console import Console

    Console(highlight=False).print(found.table(by))
    clear = len(found.overrides(min(keep, len(found.rows)), by))
    if clear:
        print(f"\npaste below `binary:` of the configuration, and train:\n\n{overrides}")
    if clear < keep:
        print(f"\nlayers with a {by} above one standard error: {clear}, fewer than the {keep} asked for\n")
    print(f"written: sensitivity.png, .csv and .json, overrides.yaml, in {folder}")
