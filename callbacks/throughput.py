"""A progress bar with images per second, and the share of time that training waits for data."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import BarColumn
from torch import Tensor

NARROW = 110
"""In a terminal of fewer columns the bar is short, so that the metrics beside it stay on two lines."""


class ThroughputProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with `img/s` over all processes and `wait`, the share of time spent on loading.

    Both are of the training epoch so far, its first batch (compilation, workers that start) left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._images = 0
        self._computing = 0.0
        self._waiting = 0.0
        self._mark: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        super().on_train_epoch_start(trainer, pl_module)
        self._images, self._computing, self._waiting, self._mark = 0, 0.0, 0.0, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: D102
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
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
            self._images += len(images) * trainer.world_size if isinstance(images, Tensor) else 0
        self._mark = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def configure_columns(self, trainer: Trainer) -> list[Any]:  # noqa: D102
        columns = super().configure_columns(trainer)
        if self._console is None or self._console.width >= NARROW or trainer.state.fn != "fit":
            return columns
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 10
        return [column for column in columns if not isinstance(column, ProcessingSpeedColumn)]  # img/s says it

    @property
    def images_per_second(self) -> float:
        """Training images a second of this epoch, over all processes; 0 before the second batch."""
        return self._images / max(self._computing + self._waiting, 1e-9) if self._images else 0.0

    @property
    def waiting_share(self) -> float:
        """The share of this epoch's time that passed between two batches, from 0 to 1."""
        return self._waiting / max(self._computing + self._waiting, 1e-9)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # noqa: D102
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        if self._images:
            return {"img/s": f"{self.images_per_second:.0f}", "wait": f"{self.waiting_share:.0%}", **metrics}
        return metrics
