"""Learning-rate schedules that go by the share of training done, so that a recipe need not know its number of steps.

Each is a torch scheduler: `scheduler: CosineDecay` in a YAML. `DesignClassifier` sets `total_steps` from the trainer and
steps once an optimizer step. torch's own schedulers serve as well, in their own units.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR


class FractionSchedule(LRScheduler):
    """The base: the learning rate is its start times `factor(share of training done)`.

    Args:
        optimizer: whose learning rates it sets.
        total_steps: optimizer steps of the whole schedule; the trainer's where 0.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int = 0) -> None:
        self.total_steps = total_steps
        self.first_step = 0
        super().__init__(optimizer)

    def restart(self, steps: int, rates: Sequence[float]) -> None:
        """Begins anew from here: from these learning rates, a value a group, over so many steps."""
        self.first_step, self.total_steps = self.last_epoch, steps
        self.base_lrs = list(rates)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands. Its shape is the configuration's: a run resumed with more epochs follows the longer one."""
        place = ("base_lrs", "last_epoch", "first_step", "_step_count", "_last_lr")
        return {name: value for name, value in super().state_dict().items() if name in place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: if the state is of a schedule with a warm-up.
        """
        if "warm_up_steps" in state_dict:
            raise ValueError(_other_warm_up(state_dict["warm_up_steps"], 0))
        super().load_state_dict(state_dict)

    def factor(self, share: float) -> float:
        """What the starting learning rate is multiplied by, at a share of training from 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__} lacks `factor`")

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group now."""
        share = min((self.last_epoch - self.first_step) / self.total_steps, 1.0) if self.total_steps else 0.0
        return [base * self.factor(share) for base in self.base_lrs]

    _get_closed_form_lr = get_lr


class Decay(FractionSchedule):
    """The base of schedules that go from 1 to `final`.

    Args:
        optimizer: whose learning rates it sets.
        final: the factor at the end.
        total_steps: as in `FractionSchedule`.
    """

    def __init__(self, optimizer: Optimizer, final: float = 0.0, total_steps: int = 0) -> None:
        self.final = final
        super().__init__(optimizer, total_steps)


class CosineDecay(Decay):
    """Along half a cosine. Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983. Arguments as in `Decay`."""

    def factor(self, share: float) -> float:  # noqa: D102
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2


class LinearDecay(Decay):
    """Along a line, as Bi-Real Net, ReActNet and AdamBNN do. Arguments as in `Decay`."""

    def factor(self, share: float) -> float:  # noqa: D102
        return 1 + (self.final - 1) * share


class StepDecay(FractionSchedule):
    """Times `gamma` at each milestone.

    Args:
        optimizer: whose learning rates it sets.
        milestones: shares of training, such as [0.5, 0.75].
        gamma: the factor of each step.
        total_steps: as in `FractionSchedule`.
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1, total_steps: int = 0
    ) -> None:
        if any(not 0 < m < 1 for m in milestones):
            raise ValueError(f"milestones {list(milestones)} must be shares of training, above 0 and below 1")
        self.milestones = list(milestones)
        self.gamma = gamma
        super().__init__(optimizer, total_steps)

    def factor(self, share: float) -> float:  # noqa: D102
        return self.gamma ** sum(share >= m for m in self.milestones)


class WarmUp(SequentialLR):
    """A linear rise of so many optimizer steps, then another scheduler.

    Args:
        optimizer: whose learning rates it sets.
        steps: of the rise: the rate of step k is (k + 1) / (steps + 1) of the start.
        then: the scheduler that follows.
    """

    def __init__(self, optimizer: Optimizer, steps: int, then: LRScheduler) -> None:
        self.warm_up_steps = steps
        for group, base in zip(optimizer.param_groups, then.base_lrs, strict=True):
            group["lr"] = base  # LinearLR multiplies the rate that it finds
        rise = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
        super().__init__(optimizer, [rise, then], milestones=[steps])

    def restart(self, steps: int, rates: Sequence[float]) -> None:
        """Begins the scheduler behind the warm-up anew; a warm-up that still goes on ends here. As in `FractionSchedule`."""
        self._milestones[0] = min(self._milestones[0], self.last_epoch)
        schedule = fraction_schedule(self)
        assert schedule is not None, "only a FractionSchedule can begin anew"
        schedule.restart(steps, rates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: if the state is of a schedule with another warm-up, or none.
        """
        stored = state_dict.get("warm_up_steps", 0)
        if stored != self.warm_up_steps:
            raise ValueError(_other_warm_up(stored, self.warm_up_steps))
        super().load_state_dict(state_dict)


def fraction_schedule(scheduler: LRScheduler) -> FractionSchedule | None:
    """The `FractionSchedule` that a scheduler is, or that follows its warm-up; None if it is another kind."""
    inner = scheduler._schedulers[-1] if isinstance(scheduler, WarmUp) else scheduler
    return inner if isinstance(inner, FractionSchedule) else None


def steps_of_epoch(trainer: Trainer) -> int:
    """How many optimizer steps an epoch of a fit has."""
    _ = trainer.estimated_stepping_batches  # which loads the data that is counted below
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def _other_warm_up(stored: int, asked: int) -> str:
    return (
        f"the checkpoint's schedule has {stored} steps of warm-up, this run's has {asked}; resume with the same warm-up"
    )


def with_warm_up(scheduler: LRScheduler, warmup_steps: int, total_steps: int | float) -> LRScheduler:
    """A scheduler that first rises linearly for `warmup_steps` optimizer steps: the rate of step k is (k + 1) / (steps + 1).

    A `FractionSchedule` whose `total_steps` is 0 gets what is left of `total_steps` after the warm-up. Where nothing is left,
    as in a trial run of one epoch, the rate only rises, and a warning says so.

    Raises:
        ValueError: if such a schedule has no end.
    """
    if warmup_steps >= total_steps:
        warnings.warn(
            f"the warm-up of {warmup_steps} steps is longer than training, {int(total_steps)} steps: the learning rate only rises",
            stacklevel=2,
        )
    if isinstance(scheduler, FractionSchedule) and not scheduler.total_steps:
        if not math.isfinite(total_steps):
            raise ValueError(
                f"{type(scheduler).__name__} goes by the share of training done, but training has no end; "
                "set trainer.max_epochs or trainer.max_steps"
            )
        scheduler.total_steps = max(int(total_steps) - warmup_steps, 1)
    return WarmUp(scheduler.optimizer, warmup_steps, scheduler) if warmup_steps else scheduler
