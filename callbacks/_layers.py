"""What the callbacks share: which layers they look at, and where they do not work."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from design_lightning.binary import BinaryLayer
from design_lightning.surgery import binary_layers
from design_lightning.surgery.plan import matches


def network_of(pl_module: LightningModule) -> nn.Module:
    """The part of a LightningModule that surgery binarized: its `backbone` if it has one, else all of it."""
    backbone = getattr(pl_module, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else pl_module


def chosen_layers(callback: Callback, pl_module: LightningModule, pattern: str | None) -> dict[str, BinaryLayer]:
    """The binary layers of the network whose name matches a pattern, or all.

    Raises:
        ValueError: if there is none.
    """
    network, name = network_of(pl_module), type(callback).__name__
    layers = binary_layers(network)
    if not layers:
        raise ValueError(
            f"{name} needs binary layers, and {type(network).__name__} has none: binarize it (binarize_, or `binary` of the "
            f"model), or take {name} out of the callbacks"
        )
    chosen = {key: layer for key, layer in layers.items() if pattern is None or matches(pattern, key)}
    if not chosen:
        raise ValueError(
            f"{name}: no binary layer matches layers={pattern!r}; they are {', '.join(list(layers)[:5])}"
            f"{' and so on' if len(layers) > 5 else ''}, and a pattern is a name, a glob, or 're:' and a regular expression"
        )
    return chosen


def is_sharded(trainer: Trainer) -> bool:
    """Whether no process holds the whole weights: with DeepSpeed, FSDP and model parallelism."""
    return isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy)


def refuse_sharding(callback: Callback, trainer: Trainer) -> None:
    """Raises where a process does not hold the whole weights.

    Raises:
        ValueError: with DeepSpeed, FSDP and model parallelism.
    """
    if is_sharded(trainer):
        raise ValueError(
            f"{type(callback).__name__} does not work with {type(trainer.strategy).__name__}, where no process holds the "
            "whole weights: use strategy 'ddp'"
        )
