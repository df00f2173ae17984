"""A callback for the tests of processes that die, found on PYTHONPATH: one process of a run ends, in one of many ways."""

import os
import signal
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Dying(Callback):
    """At its sixth step, or in `setup`, the process of a rank dies.

    Args:
        rank: of the process; null for all.
        how: it `raises` what nobody foresaw, `refuses` with an error of this project, `exits` without a word, `leaves` with the
            code 0, is `killed`, or is killed while the other one `hangs` and notices nothing.
        when: `step` or `setup`.
    """

    def __init__(self, rank: int | None, how: str, when: str = "step") -> None:
        self.rank, self.how, self.when = rank, how, when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.when == "setup":
            self._die(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.when == "step" and trainer.global_step == 5:
            self._die(trainer, pl_module)

    def _die(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rank not in (None, trainer.global_rank):
            if self.how == "hangs":
                time.sleep(600)
            return
        if self.how == "raises":
            raise KeyError("what nobody foresaw")
        if self.how == "refuses":
            pl_module(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
        if self.how in ("exits", "leaves"):
            os._exit(7 if self.how == "exits" else 0)
        if self.how in ("killed", "hangs"):
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
