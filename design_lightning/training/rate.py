"""The learning rate of a fit: a warm-up and a scheduler, in the units of its trainer."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau

from design_lightning.training.schedules import steps_of_epoch, with_warm_up


@dataclass(frozen=True)
class LearningRate:
    """What a fit asks of its learning rate. Arguments as in `DesignClassifier`.

    Raises:
        ValueError: if they contradict each other.
    """

    scheduler: LRSchedulerCallable | None
    interval: Literal["step", "epoch"]
    warmup_steps: int
    warmup_epochs: float

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_epochs {self.warmup_epochs}; set one of the two"
            )
        if self.warms_up and self.scheduler is not None and self.interval == "epoch":
            raise ValueError("a warm-up goes by optimizer steps, so it needs scheduler_interval: step")

    @property
    def warms_up(self) -> bool:
        """Whether it starts with a rise."""
        return bool(self.warmup_steps or self.warmup_epochs)

    def configure(self, optimizer: Optimizer, trainer: Trainer) -> Any:
        """What `configure_optimizers` returns: the optimizer, with a scheduler where there is one.

        Raises:
            ValueError: if the scheduler does not suit the trainer or the warm-up.
        """
        if self.scheduler is None and not self.warms_up:
            return optimizer
        scheduler = (self.scheduler or partial(ConstantLR, factor=1.0))(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            if self.warms_up:
                raise ValueError(
                    "ReduceLROnPlateau goes by epochs and has no warm-up; leave warmup_steps and warmup_epochs out"
                )
            monitor = getattr(scheduler, "monitor", "val/loss")
            return [optimizer], [{"scheduler": scheduler, "monitor": monitor, "interval": "epoch"}]
        scheduler = with_warm_up(scheduler, self._count_warm_up(trainer), self._count_steps(trainer))
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]

    def _count_steps(self, trainer: Trainer) -> int | float:
        """How often the scheduler will step; infinite for training without an end."""
        if self.interval == "step":
            return trainer.estimated_stepping_batches
        epochs = trainer.max_epochs
        return math.inf if epochs is None or epochs < 0 else epochs

    def _count_warm_up(self, trainer: Trainer) -> int:
        return round(self.warmup_epochs * steps_of_epoch(trainer)) if self.warmup_epochs else self.warmup_steps
