"""Pictures for loggers: those of TensorBoard, W&B and MLflow take them, others do not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAKE_FIGURES = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def take_figures(loggers: Sequence[Logger]) -> list[Logger]:
    """Those loggers that take pictures."""
    return [logger for logger in loggers if isinstance(logger, _TAKE_FIGURES)]


def log_figure(logger: Logger, name: str, figure: "Figure", step: int) -> None:
    """Logs a picture, as `name` at a step; in MLflow as the artifact `name/step.png`."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [figure], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}/{step}.png")
    else:
        raise TypeError(f"{type(logger).__name__} takes no pictures")
