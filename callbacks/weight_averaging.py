"""The exponential moving average of a binary network's weights, as Lightning does it, without its traps."""

import copy
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from design_lightning.callbacks._layers import refuse_sharding
from design_lightning.callbacks.batch_norm_recalibration import recalibrate_
from design_lightning.surgery import binary_layers
from design_lightning.training.batch_norm import running_batch_norms


class BinaryWeightAveraging(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` for binary networks: validates, saves and at the end keeps the averaged weights.

        average <- decay * average + (1 - decay) * weights    after an optimizer step

    The average is one of latent weights; its signs are binarized, and are those of no moment of training. So

    - parameters are averaged: latent weights, learned scales, thresholds and kernels;
    - buffers are copied: annealed values (`scale`, `temperature`, `tau`), units, kernels that are not learned, counters;
    - the running statistics of batch norm are re-estimated on the average's own signs before it is validated, at the end of
      an epoch without a validation behind its last step, and at the end of training, with `recalibrate_batch_norm_`. In
      between, as in a checkpoint that is written in the middle of an epoch, they are averages of the running statistics;
    - stages are those of the current weights; where binary weights follow real ones, the average's learned scales start anew
      from its own latent weights, as those of the network do.

    Before the first update the average is the current weights. Outside of `fit` nothing is swapped. A checkpoint that is
    written during a validation has both sets of weights in their right places.

    Args:
        decay: share of the average that stays in each update.
        update_every_n_steps: optimizer steps between updates.
        update_starting_at_step: the first step, counted from 0, after which the average is updated; the very first if null.
        update_starting_at_epoch: also updates at the end of each epoch from this one on; never if null.
        recalibration_batches: training batches that each process reads for the statistics of batch norm; 0 keeps averages of
            the running statistics. The LightningModule needs a `forward(images)` for it.
        device: of the average; the model's if null.

    Raises:
        ValueError: if an argument is out of range, or the strategy shards weights.
    """

    needs_whole_weights = True

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        recalibration_batches: int = 50,
        device: str | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay must be at least 0 and below 1, not {decay}; it is the share of the average that stays"
            )
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps must be at least 1, not {update_every_n_steps}")
        if recalibration_batches < 0:
            raise ValueError(
                f"recalibration_batches must be at least 0, not {recalibration_batches}; 0 averages the running statistics"
            )
        super().__init__(
            device=device,
            use_buffers=True,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )
        self.recalibration_batches = recalibration_batches
        self._swapped = False
        self._stale = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        refuse_sharding(trainer)
        super().setup(trainer, pl_module, stage)
        self._swapped, self._stale = False, True

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._latest_update_step:  # not after a batch whose gradients are only accumulated
            self._follow_stages(pl_module)
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._latest_update_step != before:
            self._after_update(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._follow_stages(pl_module)
        before = self._latest_update_epoch
        super().on_train_epoch_end(trainer, pl_module)
        if self._latest_update_epoch != before:
            self._after_update(pl_module)
        self._recalibrate_average(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._recalibrate_average(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.state.fn == TrainerFn.FITTING:
            if not trainer.sanity_checking:
                self._recalibrate_average(trainer, pl_module)
            self._follow(pl_module)
            self._exchange(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._swapped:
            self._exchange(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        if self._swapped:
            self._exchange(pl_module)

    def on_save_checkpoint(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A signal may come here from anywhere: nothing that takes long, and nothing that waits for other processes.
        if self._average_model is not None and not self._swapped:
            self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            current, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    @property
    def _average(self) -> LightningModule:
        assert self._average_model is not None
        return cast(LightningModule, self._average_model.module)

    def _has_updates(self) -> bool:
        assert self._average_model is not None
        return bool(self._average_model.n_averaged > 0)

    def _after_update(self, pl_module: LightningModule) -> None:
        self._follow(pl_module)
        self._stale = True

    def _recalibrate_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimates the statistics of the average, if it changed since the last time."""
        self._follow(pl_module)
        if self._stale and self._has_updates() and self.recalibration_batches and running_batch_norms(pl_module):
            self._exchange(pl_module)
            recalibrate_(trainer, pl_module, self.recalibration_batches)
            self._exchange(pl_module)
            self._stale = False

    def _exchange(self, pl_module: LightningModule) -> None:
        """Swaps the average and the current weights, and remembers it."""
        self._swap_models(pl_module)
        self._swapped = not self._swapped

    @torch.no_grad()
    def _follow(self, pl_module: LightningModule) -> None:
        """Brings what is not averaged from the current model to the average: everything, before the first update."""
        self._follow_stages(pl_module)
        averaged = _averaged_tensors(pl_module) if self._has_updates() else set()
        pairs = zip(_tensors(self._average), _tensors(pl_module), strict=True)
        for average, current in pairs:
            if id(current) not in averaged:
                average.copy_(current)

    def _follow_stages(self, pl_module: LightningModule) -> None:
        averages = binary_layers(self._average)
        for name, layer in binary_layers(pl_module).items():
            average = averages[name]
            if average.stage != layer.stage:
                average.set_stage(layer.stage)
            own, other = average.activation, layer.activation
            if own is not None and other is not None and type(own.estimator) is not type(other.estimator):
                own.estimator = copy.deepcopy(
                    other.estimator
                )  # a stage may bring another, which may have a temperature


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _averaged_tensors(module: nn.Module) -> set[int]:
    """The ids of the parameters, and of the running means and variances of batch norm."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
    return {id(tensor) for tensor in [*module.parameters(), *statistics]}
