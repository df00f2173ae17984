"""Lightning callbacks, one a file; usable by bare name from YAML, and alone in anybody's Trainer.

This folder stands at the top of the repository and is imported as `design_lightning.callbacks`.
"""

from design_lightning.callbacks.batch_norm_recalibration import BatchNormRecalibration
from design_lightning.callbacks.binary_summary import BinarySummary
from design_lightning.callbacks.confusion_matrix import ConfusionMatrixReport
from design_lightning.callbacks.damaged_images import DamagedImagesReport
from design_lightning.callbacks.estimator_annealing import EstimatorAnnealing
from design_lightning.callbacks.export_model import ExportModel
from design_lightning.callbacks.kernel_annealing import KernelAnnealing
from design_lightning.callbacks.latent_weight_clipping import LatentWeightClipping
from design_lightning.callbacks.prediction_writer import PredictionWriter
from design_lightning.callbacks.preemption_checkpoint import PreemptionCheckpoint
from design_lightning.callbacks.random_states import RandomStates
from design_lightning.callbacks.sign_flip_monitor import SignFlipMonitor
from design_lightning.callbacks.terminate_on_nan import TerminateOnNaN
from design_lightning.callbacks.throughput import Throughput
from design_lightning.callbacks.throughput_progress_bar import ThroughputProgressBar
from design_lightning.callbacks.two_stage_training import TwoStageTraining
from design_lightning.callbacks.weight_averaging import BinaryWeightAveraging

__all__ = [
    "BatchNormRecalibration",
    "BinarySummary",
    "BinaryWeightAveraging",
    "ConfusionMatrixReport",
    "DamagedImagesReport",
    "EstimatorAnnealing",
    "ExportModel",
    "KernelAnnealing",
    "LatentWeightClipping",
    "PredictionWriter",
    "PreemptionCheckpoint",
    "RandomStates",
    "SignFlipMonitor",
    "TerminateOnNaN",
    "Throughput",
    "ThroughputProgressBar",
    "TwoStageTraining",
]
