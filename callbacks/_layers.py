"""What the callbacks share: which layers they look at, and where they do not work."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from design_lightning.binary import BinaryLayer
from design_lightning.surgery import binary_layers
from design_lightning.surgery.plan import matches
from design_lightning.training.sharding import check_strategy, is_sharded


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


def refuse_sharding(trainer: Trainer) -> None:
    """Raises where a process does not hold the whole weights, which the callbacks need that have `needs_whole_weights`.

    Raises:
        ValueError: names all these callbacks of the run at once; with DeepSpeed and FSDP1 whatever the callbacks are.
    """
    check_strategy(trainer)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it in a connector
    found = [type(callback).__name__ for callback in callbacks if getattr(callback, "needs_whole_weights", False)]
    if is_sharded(trainer) and found:
        raise ValueError(
            f"with {type(trainer.strategy).__name__} no process holds the whole weights, which these callbacks need: "
            f"{', '.join(found)}; leave them out, or use strategy ddp"
        )
