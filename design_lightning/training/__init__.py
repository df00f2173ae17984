"""Training: the LightningModule, its parameter groups, losses and learning-rate schedules."""

from typing import TYPE_CHECKING

from design_lightning._lazy import lazy_attributes

if TYPE_CHECKING:
    from design_lightning.training.batch_norm import recalibrate_batch_norm_
    from design_lightning.training.bop import Bop
    from design_lightning.training.checkpoint_io import AtomicCheckpointIO
    from design_lightning.training.classifier import DesignClassifier
    from design_lightning.training.distillation import Distillation
    from design_lightning.training.exported import ExportedClassifier
    from design_lightning.training.groups import parameter_groups
    from design_lightning.training.image_classifier import ImageClassifier
    from design_lightning.training.losses import SquaredHinge
    from design_lightning.training.mixing import MixupCutmix
    from design_lightning.training.per_group import PerGroupOptimizer
    from design_lightning.training.schedules import CosineDecay, FractionSchedule, LinearDecay, StepDecay, with_warm_up
    from design_lightning.training.trainer import DesignTrainer

__all__ = [
    "AtomicCheckpointIO",
    "Bop",
    "CosineDecay",
    "DesignClassifier",
    "DesignTrainer",
    "Distillation",
    "ExportedClassifier",
    "FractionSchedule",
    "ImageClassifier",
    "LinearDecay",
    "MixupCutmix",
    "PerGroupOptimizer",
    "SquaredHinge",
    "StepDecay",
    "parameter_groups",
    "recalibrate_batch_norm_",
    "with_warm_up",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "AtomicCheckpointIO": ".checkpoint_io",
        "Bop": ".bop",
        "DesignClassifier": ".classifier",
        "Distillation": ".distillation",
        "ExportedClassifier": ".exported",
        "ImageClassifier": ".image_classifier",
        "MixupCutmix": ".mixing",
        "PerGroupOptimizer": ".per_group",
        "SquaredHinge": ".losses",
        "parameter_groups": ".groups",
        "recalibrate_batch_norm_": ".batch_norm",
        "DesignTrainer": ".trainer",
        **dict.fromkeys(("CosineDecay", "FractionSchedule", "LinearDecay", "StepDecay", "with_warm_up"), ".schedules"),
    },
)
