"""Latent weights kept in a bound, so that each can still change its sign."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from design_lightning.callbacks._layers import chosen_layers, refuse_sharding


class LatentWeightClipping(Callback):
    """After each optimizer step, clips the latent weights of binary layers to [-bound, bound].

        w <- max(-bound, min(bound, w))

    A latent weight far from zero takes many steps to change its sign, and the size of it means nothing to the sign. Layers
    whose weights are real in the present stage are left alone. Weights are clipped at the start of training, too: a
    checkpoint that a signal wrote between a step and its clipping goes on as if nothing had happened.

    The bound is 1.0 in BinaryConnect (Courbariaux et al., NeurIPS 2015, arXiv:1511.00363), 1.25 in QuickNet (Bannink et
    al., "Larq Compute Engine", MLSys 2021, arXiv:2011.09398), and 1.5 in BNext (Guo et al., 2022, arXiv:2211.12933).

    Args:
        bound: what no latent weight exceeds in size.
        layers: the binary layers that are clipped: a name in the backbone, a glob, or `re:` and a regular expression; null is
            all of them.

    Raises:
        ValueError: if the bound is not positive, no binary layer matches, an averaging callback stands before this one, or
            the strategy shards weights.
    """

    def __init__(self, bound: float = 1.0, layers: str | None = None) -> None:
        if not bound > 0:
            raise ValueError(f"bound must be positive, not {bound}; 1.0 is BinaryConnect's")
        self.bound = float(bound)
        self.layers = layers
        self._step = 0

    @property
    def state_key(self) -> str:
        """Tells two instances apart in a checkpoint."""
        return f"{type(self).__qualname__}[bound={self.bound}, layers={self.layers}]"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        refuse_sharding(self, trainer)
        chosen_layers(self, pl_module, self.layers)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it in a connector
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, WeightAveraging):
                raise ValueError(
                    f"{type(other).__name__} stands before LatentWeightClipping, so it would average weights that are not "
                    "clipped yet: swap the two in the list of callbacks"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._step = trainer.global_step
        self._clip(pl_module)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # not after a batch whose gradients are only accumulated
            self._step = trainer.global_step
            self._clip(pl_module)

    @torch.no_grad()
    def _clip(self, pl_module: LightningModule) -> None:
        for layer in chosen_layers(self, pl_module, self.layers).values():
            if layer.stage == "both":
                layer.weight.clamp_(-self.bound, self.bound)
