"""What a file says of how its network was trained."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from design_lightning.export.about import About


def about_module(module: LightningModule, checkpoint: Mapping[str, Any] | None = None) -> About:
    """Labels and normalisation of a classifier, and its training: network, epochs, steps, the best score, versions.

    Args:
        module: `DesignClassifier`, or one with such hyperparameters.
        checkpoint: what Lightning saved, if the weights are of a checkpoint.
    """
    from importlib.metadata import version

    known = dict(module.hparams)
    training: dict[str, Any] = {name: known[name] for name in ("backbone", "binary") if name in known}
    if checkpoint is not None:
        training |= {name: checkpoint[name] for name in ("epoch", "global_step") if name in checkpoint}
        training |= _best_score(checkpoint)
    training["versions"] = {name: version(name) for name in ("design-lightning", "torch", "timm", "lightning")}
    lists = {name: tuple(values) for name in ("mean", "std") if (values := known.get(name)) is not None}
    labels = known.get("class_names")
    return About(labels=None if labels is None else tuple(labels), **lists, training=training)


def _best_score(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The metric that the checkpoint was chosen by."""
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("current_score") is not None:
            score = state["current_score"]
            return {"monitor": state["monitor"], "score": float(score) if isinstance(score, Tensor) else score}
    return {}
