"""A callback for the cluster's tests, found on PYTHONPATH: has SLURM pre-empt the job that it runs in."""

import os
import subprocess
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from design_lightning.callbacks import PreemptionCheckpoint


class Preempting(Callback):
    """At the given steps, the n-th of them in the n-th start of the job, runs a command, and waits for its signal.

    Args:
        commands: from a step to the command, in which `JOB` stands for the job's number. Step -1 is before there is a trainer.
    """

    def __init__(self, commands: dict[int, str]) -> None:
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.step, self.command = (list(commands.items())[start:] or [(None, "")])[0]
        if self.step == -1 and "SLURM_PROCID" in os.environ:  # not where `submit` looks at the configuration
            self._preempt(os.environ["SLURM_PROCID"] == "0")
            time.sleep(600)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if trainer.global_step == self.step:
            self._preempt(trainer.is_global_zero)
            preemption = next(each for each in trainer.callbacks if isinstance(each, PreemptionCheckpoint))
            while preemption.received is None:
                time.sleep(0.05)

    def _preempt(self, is_first: bool) -> None:
        if is_first:
            subprocess.run(self.command.replace("JOB", os.environ["SLURM_JOB_ID"]).split(), check=True)
