"""A plugin: a kernel, an estimator and a callback, which configurations find by their names.

    design-train fit --config quickstart --model.binary.kernel checkers --model.binary.estimator triangle \
        --trainer.callbacks+=UndecidedWeights

The entry point in pyproject.toml names this module; `design-train` imports it before it reads its arguments.
"""

import design_lightning as dl
from design_example.callback import UndecidedWeights
from design_example.estimator import Triangle

__all__ = ["Triangle", "UndecidedWeights"]

dl.register("checkers", dl.ThresholdKernel([[0.3, 0.9], [0.9, 0.3]], name="checkers", provenance="an example"))
dl.register("triangle", Triangle)
