"""How many images of the data were damaged, over all processes, and which."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from design_lightning.data.reading import NAMED, ImageReader


class DamagedImagesReport(Callback):
    """Adds up, at the end of each epoch, the damaged images that the processes found; at the end of a run says which they are.

    Each process ends a run by itself once it has found more than `max_damaged` of the data module allows; here all of them count
    together, and end together. More than ten images are listed in a file in the log folder, `damaged_<split>.txt`.

    Works with the data modules of this project, which know their damaged images, and does nothing with others.

    Raises:
        ValueError: at the end of an epoch, if too many images of a split are damaged.
    """

    def __init__(self) -> None:
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the other processes

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._add_up(trainer, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._add_up(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._add_up(trainer, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._add_up(trainer, "predict")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        for split, reader in _readers(trainer).items():
            if not reader.count or not trainer.is_global_zero:
                continue
            names = reader.names(NAMED)
            if reader.count > NAMED:
                path = self._folder / f"damaged_{split}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(
                    "".join(f"{name}\n" for name in reader.names()), encoding="utf-8", errors="surrogateescape"
                )
                names = [*names[:2], f"... (all of them in {path})"]
            total, is_one = len(reader.samples), reader.count == 1
            print(
                f"{reader.count:,} of {total:,} {reader.split} images {'is' if is_one else 'are'} damaged and "
                f"{'was' if is_one else 'were'} left out: {', '.join(names)}"
            )

    @staticmethod
    def _add_up(trainer: Trainer, split: str) -> None:
        reader = _readers(trainer).get(split)
        if reader is None or trainer.world_size == 1:
            return
        strategy = trainer.strategy
        if strategy.reduce_boolean_decision(reader.count > 0, all=False):
            found = reader.damaged.to(strategy.root_device, torch.int32)
            reader.add((strategy.reduce(found, reduce_op="sum") > 0).cpu())


def _readers(trainer: Trainer) -> dict[str, ImageReader]:
    data = getattr(trainer, "datamodule", None)
    readers: dict[str, ImageReader] = getattr(data, "readers", {})
    return readers
