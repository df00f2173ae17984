"""A callback that logs how many latent weights are about to change their sign."""

from lightning.pytorch import Callback, LightningModule, Trainer

from design_lightning.surgery import binary_layers


class UndecidedWeights(Callback):
    """Logs `train/undecided` at the end of each epoch: the share of latent weights closer to 0 than a bound.

    Args:
        bound: in the unit of the weights, above 0.
    """

    def __init__(self, bound: float = 1e-3) -> None:
        if not bound > 0:
            raise ValueError(f"bound must be positive, not {bound}")
        self.bound = bound

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts and logs."""
        weights = [layer.weight.detach().flatten() for layer in binary_layers(pl_module).values()]
        undecided = sum((w.abs() < self.bound).sum() for w in weights)
        pl_module.log("train/undecided", undecided / max(sum(w.numel() for w in weights), 1))
