"""Lightning callbacks, one a file; usable by bare name from YAML, and alone in anybody's Trainer.

This folder stands at the top of the repository and is imported as `design_lightning.callbacks`.
"""

from design_lightning.callbacks.binary_summary import BinarySummary
from design_lightning.callbacks.confusion_matrix import ConfusionMatrixReport
from design_lightning.callbacks.prediction_writer import PredictionWriter
from design_lightning.callbacks.throughput import ThroughputProgressBar

__all__ = ["BinarySummary", "ConfusionMatrixReport", "PredictionWriter", "ThroughputProgressBar"]
