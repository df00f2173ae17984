"""One stage of training, as a recipe writes it."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from design_lightning._names import class_by_name
from design_lightning.binary import ESTIMATORS, Stage
from design_lightning.binary.estimators import Estimator


@dataclass
class TrainingStage:
    """What is binary for how long, and what the optimizer does meanwhile.

    Args:
        stage: `float`, `activations` (binary input, latent weights) or `both`.
        until: when the next stage begins: a number of epochs from the start of training, a share of training below 1, or
            `plateau`; null for the last stage.
        lr: the learning rate at which the stage starts; null for the optimizer's own.
        weight_decay: of the latent weights and the other matrices; null leaves it as it is in the first stage, and is 0 in
            later ones.
        restart_schedule: whether the learning rate starts anew and ends with this stage; else it goes on.
        reset_optimizer: whether the optimizer forgets its momenta, as where the stage is a run of its own.
        scale: the kernels' scale; null leaves it.
        estimator: another estimator for the activations; null leaves it. One without a state: `ste`, `approx_sign`, `swish_sign`.
        estimator_args: what its constructor takes.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    stage: Stage
    until: int | float | Literal["plateau"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    restart_schedule: bool = True
    reset_optimizer: bool = True
    scale: float | None = None
    estimator: str | None = None
    estimator_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise ValueError(f"unknown stage {self.stage!r}: use one of {', '.join(get_args(Stage))}")
        until = self.until
        if isinstance(until, str):
            if until != "plateau":
                raise ValueError(f"until={until!r} must be epochs (100), a share of training (0.5), plateau or null")
        elif until is not None and (until <= 0 or (isinstance(until, float) and until >= 1)):
            raise ValueError(f"until={until} must be at least 1 epoch, or a share of training above 0 and below 1")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.lr is not None and not self.restart_schedule:
            raise ValueError(
                f"lr={self.lr} needs restart_schedule: where the learning rate goes on, it has no new start"
            )
        if self.estimator is not None:
            made = class_by_name(self.estimator, ESTIMATORS, Estimator, "estimator")(**self.estimator_args)
            if made.state_dict():
                raise ValueError(
                    f"estimator {self.estimator!r} has a state in the checkpoint, which a stage cannot bring in; set it in "
                    "`binary`, and let EstimatorAnnealing move it"
                )
        elif self.estimator_args:
            raise ValueError(f"estimator_args {self.estimator_args} need an estimator")
