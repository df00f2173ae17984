"""Lightning's Trainer as this project runs it."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


class DesignTrainer(Trainer):
    """Lightning's Trainer, to which commands such as `export` add a method each."""

    @property
    def log_dir(self) -> str | None:
        """The folder of this run alone, in which its checkpoints lie, too; a collective, so to be read on all processes.

        Lightning gives the folder that all runs share where the logger is one such as W&B or MLflow, so that one run's
        configuration would overwrite another's.
        """
        folder = super().log_dir
        logger = self.logger
        if logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
            return folder
        own = os.path.join(folder or self.default_root_dir, str(logger.name), str(logger.version))
        found: str = self.strategy.broadcast(own)
        return found
