"""The state of every random generator, kept in checkpoints, so that a resumed run draws what an undisturbed one draws."""

import random
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class RandomStates(Callback):
    """Keeps the global generators of torch (CPU and CUDA), numpy and Python, of each process.

    They are set at the first batch after a resume, so that nothing in between draws from them. What a loader's workers draw
    is not theirs: see `design_lightning.data.batches.SeededBatches`. A loader of yours needs a `generator` of its own, or it
    draws from torch's at the start of each epoch.
    """

    def __init__(self) -> None:
        self._to_set: dict[str, Any] | None = None
        self._before_batch: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """One state for each process; within a training step the one before it, since a resume repeats that step."""
        if self._to_set is not None:
            return self._to_set  # a checkpoint between a resume and its first batch
        own = _states() if self._before_batch is None else self._before_batch
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, own)
            return {"processes": gathered}
        return {"processes": [own]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._to_set = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: D102
        if self._to_set is not None:
            processes, self._to_set = self._to_set["processes"], None
            if len(processes) == trainer.world_size:
                _set_states(processes[trainer.global_rank])
            else:
                rank_zero_warn(
                    f"the checkpoint has the random generators of {len(processes)} processes, this run has "
                    f"{trainer.world_size}: they start anew, so the run differs from an undisturbed one"
                )
        self._before_batch = _states()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self._before_batch = None


def _states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = cast(tuple[str, Any, int, int, float], np.random.get_state())
    version, numbers, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(numbers), python_gauss],
    }


def _set_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
