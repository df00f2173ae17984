"""Images per second, and the share of time that training waits for data."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Throughput(Callback):
    """Measures each training epoch, and logs at its end:

        train/images_per_second  over all processes
        train/waiting            the share of time between two batches, from 0 to 1: loading, and moving to the device

    The first batch of an epoch (compilation, workers that start) and validation are left out; an epoch of one batch logs nothing.
    """

    def __init__(self) -> None:
        self._images = 0
        self._computing = 0.0
        self._waiting = 0.0
        self._mark: float | None = None
        self._processes = 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._images, self._computing, self._waiting, self._mark = 0, 0.0, 0.0, None
        self._processes = trainer.world_size

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: D102
        now = time.perf_counter()
        if self._mark is not None:
            self._waiting += now - self._mark
            self._mark = now

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._mark is not None:
            self._computing += now - self._mark
            images = batch[0] if isinstance(batch, list | tuple) else batch
            self._images += len(images) if isinstance(images, Tensor) else 0
        self._mark = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._mark is not None:
            self._mark = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._images:
            of_this_process = self.images_per_second / self._processes
            pl_module.log("train/images_per_second", of_this_process, reduce_fx="sum", sync_dist=True)
            pl_module.log("train/waiting", self.waiting, batch_size=1, sync_dist=True)

    @property
    def images_per_second(self) -> float:
        """Training images a second of this epoch so far, over all processes if they are as fast; 0 before the second batch."""
        return self._processes * self._images / max(self._computing + self._waiting, 1e-9)

    @property
    def waiting(self) -> float:
        """The share of this epoch's time so far that passed between two batches, from 0 to 1."""
        return self._waiting / max(self._computing + self._waiting, 1e-9)
