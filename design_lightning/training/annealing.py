"""The callback that `KernelAnnealing` and `EstimatorAnnealing` extend: a value of many layers that moves while training."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from design_lightning.training.annealing_path import AnnealingPath, Every, PathName


class Annealing(Callback):
    """Sets 0-dim buffers of a module to a value that depends on the share of training done, and on nothing else.

    So there is no state to resume, every process has the same value, and one compiled graph serves for all values.

    Args:
        start, end, path: the value's way; see `AnnealingPath`.
        begin: the share of training up to which the value is `start`.
        until: the share of training from which the value is `end`; 1 is the last step, or epoch.
        every: whether it moves each optimizer `step` or each `epoch`.

    Raises:
        ValueError: if `begin` and `until` are no shares in this order, or an argument of the path is wrong.
    """

    logged_as: str

    def __init__(
        self,
        start: float,
        end: float,
        path: PathName | Sequence[float] = "linear",
        begin: float = 0.0,
        until: float = 1.0,
        every: Every = "step",
    ) -> None:
        if not 0 <= begin < until <= 1:
            raise ValueError(f"begin={begin} and until={until} must be shares of training: 0 <= begin < until <= 1")
        if every not in get_args(Every):
            raise ValueError(f"every={every!r} is neither 'step' nor 'epoch'")
        self.way = AnnealingPath(start, end, path)
        self.begin, self.until, self.every = begin, until, every
        self._buffers: list[Tensor] = []
        self._set: tuple[int, int] | None = None

    @abstractmethod
    def find_buffers(self, module: LightningModule) -> list[Tensor]:
        """The buffers to set.

        Raises:
            ValueError: if there is none.
        """

    def value(self, trainer: Trainer) -> float:
        """The value now."""
        if self.every == "step":
            done, total = float(trainer.global_step), float(trainer.estimated_stepping_batches)
        else:
            done, total = float(trainer.current_epoch), float(trainer.max_epochs or -1)
        if not math.isfinite(total) or total <= 0:
            raise ValueError(
                f"{type(self).__name__} goes by the share of training done, but training has no end; set trainer.max_epochs "
                + ("or trainer.max_steps" if self.every == "step" else "or every: step")
            )
        share = done / max(total - 1, 1)  # so that the last step, or epoch, has the value `end`
        return self.way.value(min(max((share - self.begin) / (self.until - self.begin), 0.0), 1.0))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the buffers."""
        self._buffers = self.find_buffers(pl_module)
        self._set = None

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Moves the value, once an optimizer step."""
        now = trainer.global_step, trainer.current_epoch
        if now == self._set:
            return
        self._set = now
        value = self.value(trainer)
        for buffer in self._buffers:
            buffer.fill_(value)
        pl_module.log(self.logged_as, value, batch_size=1)
