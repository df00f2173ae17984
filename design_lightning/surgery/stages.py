"""Stages of a whole network: what is binary is a flag of its layers, not another network."""

from torch import nn

from design_lightning.binary import BinaryLayer, Stage


def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """The binary layers of a model by name, in the order of the module tree."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryLayer)}


def set_stage_(model: nn.Module, stage: Stage) -> None:
    """Sets the stage of every binary layer: `float`, `activations` (binary input, latent weights) or `both`.

    Same parameters, same state-dict keys, same optimizer.

    Raises:
        ValueError: if the model has no binary layer, or the stage is unknown.
    """
    layers = binary_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no binary layer; call binarize_(model) first")
    for layer in layers.values():
        layer.set_stage(stage)
