"""Weights of which each process holds a part: FSDP2, by Lightning's `ModelParallelStrategy`; and what else is refused.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023, arXiv:2304.11277.
"""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from design_lightning.binary import BinaryLayer


def is_sharded(trainer: Trainer) -> bool:
    """Whether a process holds only a part of each weight."""
    return isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))


def check_strategy(trainer: Trainer) -> None:
    """Refuses strategies in which binary layers do not work.

    Raises:
        ValueError: names those that do.
    """
    if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
        raise ValueError(
            f"{type(trainer.strategy).__name__} has not been tried with binary layers and their callbacks: use strategy ddp, or "
            "ModelParallelStrategy, which shards weights as FSDP2 does"
        )


def shard_(module: nn.Module, strategy: ModelParallelStrategy) -> None:
    """Shards the weights of a module over all processes: each binary layer is gathered by itself, all the rest at once.

    Raises:
        ValueError: if the strategy would split layers, or save what no network is rebuilt from.
    """
    if isinstance(module, FSDPModule):
        return
    name, mesh = type(strategy).__name__, strategy.device_mesh
    if mesh["tensor_parallel"].size() != 1:
        raise ValueError(
            f"{name} has tensor_parallel_size {mesh['tensor_parallel'].size()}, and binary layers are not split over processes: "
            f"set tensor_parallel_size to 1, and data_parallel_size to all {mesh.size()} processes"
        )
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            f"{name} would save a folder for each checkpoint, from which no network is rebuilt: set save_distributed_checkpoint "
            "to false for one file"
        )
    if strategy._layer_sync is not None:  # Lightning's own setup leaves synchronised batch norm out
        strategy._layer_sync.apply(module)
    for part in module.modules():
        if isinstance(part, BinaryLayer):
            fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])


@torch.no_grad()
def take_buffers_of_first_process_(module: nn.Module) -> None:
    """Gives all processes the buffers of process 0, batch-norm statistics above all, as DDP does before each forward."""
    for buffer in module.buffers():
        torch.distributed.broadcast(buffer, 0)
