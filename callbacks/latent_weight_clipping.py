"""Latent weights kept in a bound, so that each can still change its sign."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from design_lightning.callbacks._layers import chosen_layers, refuse_sharding
from design_lightning.callbacks.two_stage_training import TwoStageTraining


class LatentWeightClipping(Callback):
    """After each optimizer step, clips the latent weights of binary layers to [-bound, bound].

        w <- max(-bound, min(bound, w))

    A latent weight far from zero takes many steps to change its sign, and the size of it means nothing to the sign. Layers
    whose weights are real in the present stage are left alone, and clipped when they become binary, before the first step with
    them: a learned scale starts from the clipped weights. Weights are clipped at the start of training, too: a checkpoint that a
    signal wrote between a step and its clipping goes on with what the clipping would have left.

    The bound is 1.0 in BinaryConnect (Courbariaux et al., NeurIPS 2015, arXiv:1511.00363), 1.25 in QuickNet (Bannink et
    al., "Larq Compute Engine", MLSys 2021, arXiv:2011.09398), and 1.5 in BNext (Guo et al., 2022, arXiv:2211.12933).

    Args:
        bound: what no latent weight exceeds in size.
        layers: the binary layers that are clipped: a name in the backbone, a glob, or `re:` and a regular expression; null is
            all of them.

    Raises:
        ValueError: if the bound is not positive, no binary layer matches, an averaging callback stands before this one or
            `TwoStageTraining` behind it, or the strategy is DeepSpeed or FSDP1.
    """

    def __init__(self, bound: float = 1.0, layers: str | None = None) -> None:
        if not bound > 0:
            raise ValueError(f"bound must be positive, not {bound}; 1.0 is BinaryConnect's")
        self.bound = float(bound)
        self.layers = layers
        self._step = 0
        self._clipped: set[str] = set()

    @property
    def state_key(self) -> str:
        """Tells two instances apart in a checkpoint."""
        return f"{type(self).__qualname__}[bound={self.bound}, layers={self.layers}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        refuse_sharding(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        chosen_layers(self, pl_module, self.layers)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it in a connector
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, WeightAveraging):
                raise ValueError(
                    f"{type(other).__name__} stands before LatentWeightClipping, so it would average weights that are not "
                    "clipped yet: swap the two in the list of callbacks"
                )

        if any(isinstance(other, TwoStageTraining) for other in callbacks[callbacks.index(self) :]):
            raise ValueError(
                "TwoStageTraining stands behind LatentWeightClipping, so weights would be clipped a step after they become "
                "binary: swap the two in the list of callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._step = trainer.global_step
        self._clipped = set()
        self._clip(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: D102
        layers = chosen_layers(self, pl_module, self.layers)
        new = {name for name, layer in layers.items() if layer.stage == "both"} - self._clipped
        if new:
            self._clip(pl_module)
            for name in new:
                layers[name].weight_binarizer.reset_scale(layers[name].latent_weight())

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # not after a batch whose gradients are only accumulated
            self._step = trainer.global_step
            self._clip(pl_module)

    @torch.no_grad()
    def _clip(self, pl_module: LightningModule) -> None:
        for name, layer in chosen_layers(self, pl_module, self.layers).items():
            if layer.stage == "both":
                layer.weight.clamp_(-self.bound, self.bound)
                self._clipped.add(name)
