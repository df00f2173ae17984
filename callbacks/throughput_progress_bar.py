"""A progress bar with images per second, and the share of time that training waits for data."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import BarColumn

from design_lightning.callbacks.throughput import Throughput

NARROW = 110
"""In a terminal of fewer columns the bar is short, so that the metrics beside it stay on two lines."""


class ThroughputProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with `img/s` and `wait`, which the `Throughput` beside it measures.

    Raises:
        ValueError: when a run starts, if the Trainer has no `Throughput`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        super().setup(trainer, pl_module, stage)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it in a connector
        found = next((each for each in callbacks if isinstance(each, Throughput)), None)
        if found is None:
            raise ValueError(
                "ThroughputProgressBar shows what Throughput measures, and the Trainer has none: add Throughput() to callbacks"
            )
        self._throughput = found

    def configure_columns(self, trainer: Trainer) -> list[Any]:  # noqa: D102
        columns = super().configure_columns(trainer)
        if self._console is None or self._console.width >= NARROW or trainer.state.fn != "fit":
            return columns
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 10
        return [column for column in columns if not isinstance(column, ProcessingSpeedColumn)]  # img/s says it

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # noqa: D102
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        rate, waiting = self._throughput.images_per_second, self._throughput.waiting
        return {"img/s": f"{rate:.0f}", "wait": f"{waiting:.0%}", **metrics} if rate else metrics
