"""A run that is taken off its machine goes on later as if nothing had been: saved at a signal, and every so many steps."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from design_lightning.callbacks._layers import refuse_sharding
from design_lightning.training.checkpoint_files import PREEMPTED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class PreemptionCheckpoint(Callback):
    """Saves a run at a signal and ends it, to go on with the very next step in another process.

    SLURM announces the end of a job by SIGUSR1, and preempts with SIGTERM. Lightning saves at once, in the middle of whatever a
    process does, and processes are not at the same step then. Here a signal is noted; before the next batch all processes agree on
    it, write `hpc_ckpt_1.ckpt`, and end with the code 128 + signal, which is 138 for SIGUSR1: `scripts/slurm/train.sbatch` then
    requeues the job. A signal within a validation ends the run there, and the steps since the last file are done again.

    The file is written every `every_n_steps`, too, for what comes without a signal: a lost node, `kill -9`. `ModelCheckpoint`s
    that have no `dirpath` save in `checkpoints/` beside it, so that a requeued run knows its best one again.

    Stands first in the list of callbacks: a checkpoint that others wrote half of the start of a step into would repeat that half.
    `design-train fit` puts it there, and adds it on SLURM.

    Args:
        every_n_steps: optimizer steps between two files; null writes at signals alone.

    Raises:
        ValueError: if `every_n_steps` is not positive, a callback stands before this one, the strategy is DeepSpeed or FSDP1, or
            `default_root_dir` has a checkpoint that Lightning would take in place of this one's.
    """

    def __init__(self, every_n_steps: int | None = 500) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1, or null for none without a signal")
        self.every_n_steps = every_n_steps
        self.path = ""
        """The file, once this process wrote it."""
        self.received: signal.Signals | None = None
        """The first signal that came to this process."""
        self._handlers: dict[signal.Signals, Any] = {}
        self._is_listening = False
        self._saved_at = -1
        self._is_saving = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        if stage != "fit":
            return
        refuse_sharding(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it in a connector
        if callbacks[0] is not self:
            raise ValueError(
                f"{type(callbacks[0]).__name__} stands before PreemptionCheckpoint: make it the first of the callbacks"
            )
        root = Path(trainer.default_root_dir)
        for other in root.glob("hpc_ckpt_*"):
            if other.name != PREEMPTED:
                raise ValueError(f"Lightning would go on from {other}, which is not of this run: move it away")
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root / "checkpoints")
        self._listen()

    # Listening: from before Lightning sets handlers of its own until after it took them back. It restores what it found, ours; so a
    # process that ends with its code is not killed by the SIGTERM that SLURM sends when the first process of a job has ended.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._listen()
        self._saved_at = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        self._is_listening = isinstance(exception, SystemExit) and self.received is not None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._is_listening = False
        self._restore()

    def _listen(self) -> None:
        self._is_listening = True
        for number in SIGNALS:
            before = signal.signal(number, self._note)
            self._handlers.setdefault(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_listening:
            self.received = self.received or signal.Signals(number)
        else:  # after an error
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    # Saving

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves where it is due: all that belongs to the steps before is done here, their validation included."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a checkpoint would lose the gradients that were accumulated
        is_over = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if is_over or (is_due and trainer.global_step != self._saved_at):
            self._save(trainer)
        if is_over:
            # A process that has not got its signal yet ends like one that shall be requeued.
            self._end(trainer, self.received or signal.SIGUSR1, f"saved as {self.path}")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run where a signal came."""
        if self.received is not None and trainer.state.fn == TrainerFn.FITTING:
            self._end(trainer, self.received, "within a validation")

    def _end(self, trainer: Trainer, received: signal.Signals, how: str) -> None:
        rank_zero_info(f"{received.name}: ended at step {trainer.global_step}, {how}")
        raise SystemExit(128 + received)

    def _save(self, trainer: Trainer) -> None:
        self._is_saving = True
        path = str(Path(trainer.default_root_dir) / PREEMPTED)
        trainer.save_checkpoint(path)
        self.path, self._saved_at, self._is_saving = path, trainer.global_step, False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has Lightning count rightly: it takes the batch that it has fetched for one that was begun when it resumes."""
        if self._is_saving:
            loops = checkpoint["loops"]["fit_loop"]
            progress = loops["epoch_loop.batch_progress"]
            progress["is_last_batch"] = False  # else an epoch would end without its last batch
            is_last = progress["current"]["ready"] == trainer.num_training_batches
            if trainer.accumulate_grad_batches == 1 or is_last:
                loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # a resume adds one
