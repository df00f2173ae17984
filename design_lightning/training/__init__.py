"""Training: the LightningModule, its parameter groups, losses and learning-rate schedules."""

from typing import TYPE_CHECKING

from design_lightning._lazy import lazy_attributes

if TYPE_CHECKING:
    from design_lightning.training.classifier import DesignClassifier
    from design_lightning.training.groups import parameter_groups
    from design_lightning.training.losses import SquaredHinge
    from design_lightning.training.schedules import CosineDecay, FractionSchedule, LinearDecay, StepDecay, with_warm_up
    from design_lightning.training.trainer import DesignTrainer

__all__ = [
    "CosineDecay",
    "DesignClassifier",
    "DesignTrainer",
    "FractionSchedule",
    "LinearDecay",
    "SquaredHinge",
    "StepDecay",
    "parameter_groups",
    "with_warm_up",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "DesignClassifier": ".classifier",
        "SquaredHinge": ".losses",
        "parameter_groups": ".groups",
        "DesignTrainer": ".trainer",
        **dict.fromkeys(("CosineDecay", "FractionSchedule", "LinearDecay", "StepDecay", "with_warm_up"), ".schedules"),
    },
)
