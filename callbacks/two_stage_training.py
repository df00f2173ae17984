"""Training in stages: binary activations with real weights first, then both binary; or any other list of stages."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from design_lightning.binary import DeSign, make_estimator
from design_lightning.callbacks._layers import refuse_sharding
from design_lightning.callbacks.kernel_annealing import KernelAnnealing
from design_lightning.surgery import binary_layers, set_stage_
from design_lightning.training.schedules import FractionSchedule, WarmUp, fraction_schedule, steps_of_epoch
from design_lightning.training.stages import TrainingStage


class TwoStageTraining(Callback):
    """Goes through stages of training in one run, with one optimizer and one schedule.

    At the start of a stage the binary layers change, the optimizer forgets its momenta, weight decay changes, and the learning
    rate starts anew to end with the stage; see `TrainingStage`. The first optimizer step of a stage is the first with it:
    a stage never begins within an accumulation. What `ModelCheckpoint` and `EarlyStopping` took for the best begins anew with a
    stage, so that the best checkpoint of a run is one of its last stage.

    A resumed run goes on within its stage, exactly, from any checkpoint that was written between two optimizer steps. What a
    checkpoint does not hold: gradients that were accumulated by then, and the validation of an epoch whose checkpoint was
    written right before it (`every_n_train_steps` at an epoch's end), which Lightning does not make up for.

    Martinez et al., "Training Binary Neural Networks with Real-to-Binary Convolutions", ICLR 2020, arXiv:2003.11535; two
    stages as in Liu et al., "ReActNet", ECCV 2020, arXiv:2003.03488.

    Logged: `stage`, from 1.

    Args:
        stages: the stages; null for `activations` until `switch`, then `both` without weight decay.
        switch: of the two default stages: a number of epochs, a share of training below 1, or `plateau`; null is 0.5.
        monitor: the metric of a plateau.
        mode: whether the metric is to grow (`max`) or to fall (`min`).
        patience: how many validations without a better value are a plateau.

    Raises:
        ValueError: if a stage is wrong, one that is not the last has no end or the last has one, stages end in no ascending
            order, the module has no binary layer, or the optimizer, the scheduler or another callback does not go with a
            stage, or the strategy is DeepSpeed or FSDP1. All of it is known when training starts.
    """

    def __init__(
        self,
        stages: list[TrainingStage] | None = None,
        switch: int | float | Literal["plateau"] | None = None,
        monitor: str = "val/top1",
        mode: Literal["max", "min"] = "max",
        patience: int = 5,
    ) -> None:
        if stages is None:
            stages = [TrainingStage("activations", until=0.5 if switch is None else switch), TrainingStage("both")]
        elif switch is not None:
            raise ValueError(f"switch={switch} is of the two default stages; with a list of stages set their `until`")
        if not stages:
            raise ValueError("stages is empty; leave it out for the two default ones")
        for number, stage in enumerate(stages, 1):
            if number < len(stages) and stage.until is None:
                raise ValueError(f"stage {number} of {len(stages)} has no end; set its `until`")
        if stages[-1].until is not None:
            raise ValueError(f"the last stage lasts to the end of training; leave out its until={stages[-1].until!r}")
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} is neither 'max' nor 'min'")
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1 validation")
        self.stages = list(stages)
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self._index = 0
        self._phase_started_at = 0
        """The step at which the learning rate began its present way."""
        self._best: float | None = None
        self._without_gain = 0
        self._is_resumed = False
        self._base_rates: list[float] = []
        self._ends: list[float] = []

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {
            "stage": self._index,
            "phase_started_at": self._phase_started_at,
            "best": self._best,
            "without_gain": self._without_gain,
            "base_rates": self._base_rates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        if state_dict["stage"] >= len(self.stages):
            raise ValueError(
                f"the checkpoint is of stage {state_dict['stage'] + 1}, this run has {len(self.stages)}; resume with its stages"
            )
        self._index, self._phase_started_at = state_dict["stage"], state_dict["phase_started_at"]
        self._best, self._without_gain = state_dict["best"], state_dict["without_gain"]
        self._base_rates = list(state_dict["base_rates"])
        self._is_resumed = True

    # Going through the stages

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the first stage, before the network is compiled or copied; a checkpoint that is loaded later brings its own."""
        if stage != "fit":
            return
        refuse_sharding(trainer)
        if not binary_layers(pl_module):
            raise ValueError("TwoStageTraining found no binary layer; give the model a `binary` configuration")
        set_stage_(pl_module, self.stages[0].stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up the stage of a resume, or begins the first."""
        self._ends = self._resolve_ends(trainer)
        if not self._is_resumed:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self._base_rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self._check(trainer, pl_module)
        if self._is_resumed:
            for layer in binary_layers(pl_module).values():
                layer.stage = self.stages[self._index].stage  # sharded weights are loaded without it
            if self._without_gain >= self.patience:
                self._ends[self._index] = trainer.global_step  # the plateau was found right before the checkpoint
            self._set_estimator(pl_module)
            self._set_schedule_end(trainer)
            if trainer.global_step < self._ends[self._index]:  # else the next begins at once, and says so
                rank_zero_info(self._describe(trainer, "resumed at"))
        else:
            self._begin(trainer, pl_module, 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where training ended before its last stage."""
        if self._index + 1 < len(self.stages):
            rank_zero_warn(
                f"training ended in stage {self._index + 1} of {len(self.stages)}, {self.stages[self._index].stage!r}: the network "
                "is not what the last stage makes of it"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins the next stage, where this one is over."""
        while self._index + 1 < len(self.stages) and trainer.global_step >= self._ends[self._index]:
            self._begin(trainer, pl_module, self._index + 1)
        pl_module.log("stage", float(self._index + 1), batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks for a plateau."""
        is_fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not is_fitting or self.stages[self._index].until != "plateau":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(
                f"TwoStageTraining waits for a plateau of {self.monitor!r}, which is not logged; logged: {known}"
            )
        now = float(value)
        if (
            self._best is None
            or math.isnan(self._best)
            or (now > self._best if self.mode == "max" else now < self._best)
        ):
            self._best, self._without_gain = now, 0
        else:
            self._without_gain += 1
        if self._without_gain >= self.patience:
            self._ends[self._index] = trainer.global_step

    def _resolve_ends(self, trainer: Trainer) -> list[float]:
        """The optimizer step before which each stage ends, at least one step each; infinite for one that waits for a plateau."""
        total = trainer.estimated_stepping_batches
        epoch = steps_of_epoch(trainer)
        exact, ends = 0.0, [0.0]
        for number, stage in enumerate(self.stages[:-1], 1):
            if not isinstance(stage.until, int | float):
                ends.append(math.inf)
                continue
            if isinstance(stage.until, float) and not math.isfinite(total):
                raise ValueError(
                    f"stage {number} ends at {stage.until:g} of training, but training has no end; set trainer.max_epochs"
                )
            end = stage.until * (total if isinstance(stage.until, float) else epoch)
            if end <= exact and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # the Trainer sets it in a connector
                raise ValueError(
                    f"stage {number} ends at step {end:g} (until {stage.until:g}), not after the stage before it, at step "
                    f"{exact:g}; let `until` rise from stage to stage, and give all in epochs or all in shares of training"
                )
            exact = end
            ends.append(max(round(end), 1 + max(e for e in ends if math.isfinite(e))))  # a trial run is short
        ends = [*ends[1:], total]
        for number, (stage, end) in enumerate(zip(self.stages[:-1], ends, strict=False), 1):
            if math.isfinite(end) and end >= total:
                rank_zero_info(
                    f"stage {number} ({stage.stage}) lasts {end:g} steps, all {total:g} of this run: the next never begins"
                )
        return ends

    def _begin(self, trainer: Trainer, pl_module: LightningModule, index: int) -> None:
        self._index = index
        self._best, self._without_gain = None, 0
        stage = self.stages[index]
        self._set_network(pl_module)
        for optimizer in trainer.optimizers:
            self._set_weight_decay(optimizer)
            if index and stage.reset_optimizer:
                optimizer.state.clear()
        self._set_learning_rates(trainer)
        if index:
            _forget_the_best(trainer, index)
        rank_zero_info(self._describe(trainer, "from"))

    def _describe(self, trainer: Trainer, since: str) -> str:
        """A line for the log: where in training the stage is, and what the optimizer does."""
        end = self._ends[self._index]
        if math.isfinite(end):
            until = f" to {end:g}"
        else:
            until = f" to a plateau of {self.monitor}" if self.stages[self._index].until == "plateau" else ""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in groups if "weight_decay" in group and _decays(group)]
        values = {"learning rate": [group["lr"] for group in groups], "weight decay": decays}
        shown = [
            f"{name} {' and '.join(f'{v:.3g}' for v in sorted(set(found)))}" for name, found in values.items() if found
        ]
        place = f"{since} step {trainer.global_step}{until}"
        return ", ".join(
            [f"stage {self._index + 1} of {len(self.stages)}: {self.stages[self._index].stage}", place, *shown]
        )

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether every stage can be had, so that no error comes days after the start."""
        if any(stage.until == "plateau" for stage in self.stages) and not trainer.enable_validation:
            raise ValueError("a stage waits for a plateau, but there is no validation; give it a number of epochs")
        if any(stage.scale is not None for stage in self.stages):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, KernelAnnealing):
                    raise ValueError(
                        "a stage sets the kernels' scale, which KernelAnnealing moves; leave one of the two out"
                    )
        activations = [layer.activation for layer in binary_layers(pl_module).values() if layer.activation is not None]
        stateful = {type(a.estimator).__name__ for a in activations if a.estimator.state_dict()}
        for number, stage in enumerate(self.stages, 1):
            if stage.estimator is not None and stateful:
                raise ValueError(
                    f"stage {number} sets estimator {stage.estimator!r}, but the activations have {', '.join(sorted(stateful))}, "
                    "which has a state in the checkpoint; begin with one without"
                )
            self._rates(number - 1)
            if stage.weight_decay and not all(_has_weight_decay(optimizer) for optimizer in trainer.optimizers):
                raise ValueError(
                    f"stage {number} has weight_decay={stage.weight_decay}, but the optimizer has none; leave it out"
                )
        for config in trainer.lr_scheduler_configs:
            warm_up = getattr(config.scheduler, "warm_up_steps", 0)
            restarts = [
                i for i, stage in enumerate(self.stages) if stage.restart_schedule and (i or stage.lr is not None)
            ]
            if fraction_schedule(config.scheduler) is None and any(stage.restart_schedule for stage in self.stages):
                raise ValueError(
                    f"the learning rate of a stage cannot start anew with {type(config.scheduler).__name__}; use CosineDecay, "
                    "LinearDecay or StepDecay, no scheduler, or restart_schedule: false"
                )
            if warm_up and 0 in restarts:
                raise ValueError(
                    f"stage 1 has lr={self.stages[0].lr}, and a warm-up rises to the optimizer's; set the rate there"
                )
            if warm_up and self._in_units(trainer, config.interval, min(self._ends)) < warm_up:
                rank_zero_warn(
                    f"stage 2 begins at step {min(self._ends):g}, within the warm-up of {warm_up} steps, which is cut off there"
                )

    def _set_network(self, pl_module: LightningModule) -> None:
        stage = self.stages[self._index]
        layers = binary_layers(pl_module).values()
        if any(layer.stage != stage.stage for layer in layers):
            set_stage_(pl_module, stage.stage)
        for layer in layers:
            if stage.scale is not None and isinstance(layer.activation, DeSign):
                with torch.no_grad():
                    layer.activation.scale.fill_(stage.scale)
        self._set_estimator(pl_module)

    def _set_estimator(self, pl_module: LightningModule) -> None:
        """The estimator of this stage, or of the last one before it that sets any; no checkpoint holds it."""
        setting = [stage for stage in self.stages[: self._index + 1] if stage.estimator is not None]
        if setting:
            for layer in binary_layers(pl_module).values():
                if layer.activation is not None:
                    layer.activation.estimator = make_estimator(
                        str(setting[-1].estimator), **setting[-1].estimator_args
                    )

    def _set_weight_decay(self, optimizer: Optimizer) -> None:
        decay = self.stages[self._index].weight_decay
        if decay is None and self._index == 0:
            return
        for group in optimizer.param_groups:
            if "weight_decay" in group and _decays(group):
                group["weight_decay"] = decay or 0.0

    def _rates(self, index: int) -> list[float]:
        rate = self.stages[index].lr
        if rate is None:
            return self._base_rates
        if len(set(self._base_rates)) > 1:
            raise ValueError(
                f"stage {index + 1} has lr={rate}, but the optimizer's groups have rates of their own, {self._base_rates}; "
                "leave lr out"
            )
        return [rate] * len(self._base_rates)

    def _set_learning_rates(self, trainer: Trainer) -> None:
        stage = self.stages[self._index]
        if not stage.restart_schedule:
            return
        if not trainer.lr_scheduler_configs:
            for optimizer in trainer.optimizers:
                for group, rate in zip(optimizer.param_groups, self._rates(self._index), strict=True):
                    group["lr"] = rate
            return
        for config in trainer.lr_scheduler_configs:
            schedule = fraction_schedule(config.scheduler)
            assert schedule is not None, "looked at when training started"
            if self._index == 0:
                warm_up = getattr(config.scheduler, "warm_up_steps", 0)
                schedule.total_steps = max(self._in_units(trainer, config.interval, self._phase_end()) - warm_up, 1)
                if stage.lr is not None:
                    schedule.restart(schedule.total_steps, self._rates(0))
                continue
            self._phase_started_at = trainer.global_step
            steps = self._in_units(trainer, config.interval, self._phase_end() - trainer.global_step)
            assert isinstance(config.scheduler, WarmUp | FractionSchedule)
            config.scheduler.restart(max(steps, 1), self._rates(self._index))

    def _set_schedule_end(self, trainer: Trainer) -> None:
        """A resumed schedule ends as the configuration says, which may have more epochs than the checkpoint's."""
        if not any(stage.restart_schedule for stage in self.stages[: self._index + 1]):
            return
        for config in trainer.lr_scheduler_configs:
            schedule = fraction_schedule(config.scheduler)
            if schedule is not None:
                warm_up = 0 if self._phase_started_at else getattr(config.scheduler, "warm_up_steps", 0)
                steps = self._in_units(trainer, config.interval, self._phase_end() - self._phase_started_at)
                schedule.total_steps = max(steps - warm_up, 1)

    def _phase_end(self) -> float:
        """The step at which the learning rate's way ends: with the last stage before the next restart."""
        last = self._index
        while last + 1 < len(self.stages) and not self.stages[last + 1].restart_schedule:
            last += 1
        return self._ends[last] if math.isfinite(self._ends[last]) else self._ends[-1]

    @staticmethod
    def _in_units(trainer: Trainer, interval: str, steps: float) -> int:
        """Optimizer steps as what the scheduler counts."""
        if interval == "step":
            return int(steps)
        return round(steps / steps_of_epoch(trainer))


def _has_weight_decay(optimizer: Optimizer) -> bool:
    parts = [getattr(optimizer, name) for name in ("latent", "rest") if hasattr(optimizer, name)] or [optimizer]
    return any("weight_decay" in part.defaults for part in parts)


def _decays(group: dict[str, Any]) -> bool:
    """Whether weight decay is meant for a group of parameters; see `training.groups`."""
    return group.get("name") != "no_decay"


def _forget_the_best(trainer: Trainer, number: int) -> None:
    """The best of one stage is no measure for the next: real weights beat binary ones. The files stay."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            if callback.best_model_score is not None:
                rank_zero_info(
                    f"best {callback.monitor} of stage {number}: {float(callback.best_model_score):.4g}, {callback.best_model_path}"
                )
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
        elif isinstance(callback, EarlyStopping):
            infinity = torch.tensor(torch.inf)
            callback.best_score = -infinity if callback.mode == "max" else infinity
            callback.wait_count = 0
