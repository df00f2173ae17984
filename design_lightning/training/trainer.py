"""The Trainer of `design-train`: Lightning's own. A subcommand of the command line is a method of this class."""

from lightning.pytorch import Trainer


class DesignTrainer(Trainer):
    """Lightning's Trainer, to which commands such as `export` add a method each."""
