"""Batch-norm statistics of the signs as they are, before they are evaluated or exported."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from design_lightning.callbacks._forward import aside
from design_lightning.callbacks._layers import refuse_sharding
from design_lightning.callbacks._training_images import training_images
from design_lightning.training.batch_norm import recalibrate_batch_norm_, running_batch_norms

Moment = Literal["validation", "test", "export"]


class BatchNormRecalibration(Callback):
    """Re-estimates the running statistics of batch norm on training batches, with frozen weights and signs.

    `recalibrate_batch_norm_` has the formula. With several processes each reads its own share of the training data, and the
    statistics are those of all batches together. Training goes on as if nothing had happened: the order of its data, its
    random numbers and its modes stay as they were. A checkpoint that is saved after a validation holds the new statistics.

    The LightningModule needs a `forward(images)`. Batches are those that an epoch begins with, augmented as in training.
    `BinaryWeightAveraging` re-estimates the statistics of its average by itself.

    Args:
        batches: how many training batches each process reads; fewer where there are no more.
        before: `validation`, `test`, and `export`, which is the end of training and, with `ExportModel`, the checkpoint that
            it exports. Outside of `fit` the training data must come from a datamodule (whose `setup("fit")` is called) or the
            LightningModule, dealt to processes as it deals it.

    Raises:
        ValueError: if an argument is out of range, the network has no batch norm with running statistics, there is no
            training data to read, or the strategy is DeepSpeed or FSDP1.
    """

    def __init__(self, batches: int = 50, before: Sequence[Moment] = ("validation",)) -> None:
        if batches < 1:
            raise ValueError(f"batches must be at least 1, not {batches}")
        for moment in before:
            if moment not in get_args(Moment):
                raise ValueError(f"before has {moment!r}: use {', '.join(get_args(Moment))}")
        if not before:
            raise ValueError(f"before is empty, so nothing would be done: name some of {', '.join(get_args(Moment))}")
        self.batches = batches
        self.before = tuple(before)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        refuse_sharding(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not running_batch_norms(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no batch norm with running statistics: take BatchNormRecalibration out of "
                "the callbacks"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if "validation" in self.before and not trainer.sanity_checking:
            self.recalibrate_(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if "test" in self.before:
            self.recalibrate_(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if "export" in self.before:
            self.recalibrate_(trainer, pl_module)

    def recalibrate_(self, trainer: Trainer, pl_module: LightningModule, every_process: bool = True) -> None:
        """Re-estimates the statistics of a module now.

        Args:
            trainer: gives the training data and the precision.
            pl_module: is changed in place; the trainer's module, or a copy of it.
            every_process: all processes call this, and their statistics are added up. Else one process reads as many batches
                as all of them would.
        """
        recalibrate_(trainer, pl_module, self.batches, every_process)


def recalibrate_(trainer: Trainer, pl_module: LightningModule, batches: int, every_process: bool = True) -> None:
    """`recalibrate_batch_norm_` of a module on the training batches of a run; arguments as in the callback."""
    count = batches if every_process else batches * trainer.world_size
    reduce = partial(trainer.strategy.reduce, reduce_op="sum") if every_process else None
    with aside(trainer, pl_module), training_images(trainer, pl_module, count) as images:
        recalibrate_batch_norm_(pl_module, images, reduce)
