"""Training images beside training: read so that training notices nothing of it."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from design_lightning.callbacks._forward import images_of
from design_lightning.data.sampling import ResumableLoader

FEW = 64
"""Random generators are looked for in containers of at most so many elements: a longer one is data."""


@contextmanager
def training_images(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Iterator[Tensor]]:
    """The images of the first `count` training batches of this epoch, on the device of the run.

    They come from a loader of their own over the same data set, with a copy of the sampler, so the training loader keeps
    its place and its workers. Random generators that the data holds are set back afterwards; the global ones are the
    business of `aside`.

    Raises:
        ValueError: if the run has no training data, or several loaders of it, or they can be read only once.
    """
    loader = _training_loader(trainer, pl_module)
    restore = [_restorer(generator) for generator in _generators(loader)]
    plugin, strategy = trainer.precision_plugin, trainer.strategy
    batches = (plugin.convert_input(images_of(strategy.batch_to_device(batch))) for batch in _twin(loader))
    try:
        yield islice(batches, count)
    finally:
        for each in restore:
            each()


def _training_loader(trainer: Trainer, pl_module: LightningModule) -> Iterable[Any]:
    loader: Any = trainer.train_dataloader
    data = getattr(trainer, "datamodule", None)
    if loader is None and data is not None and is_overridden("train_dataloader", data):
        data.setup("fit")
        loader = data.train_dataloader()
    elif loader is None and is_overridden("train_dataloader", pl_module):
        loader = pl_module.train_dataloader()
    if loader is None:
        raise ValueError(
            "batch-norm statistics are estimated on training batches, and this run has none: pass a datamodule, or leave "
            f"the {trainer.state.fn} without a re-estimation"
        )
    if isinstance(loader, list | tuple | dict):
        raise ValueError(
            f"batch-norm statistics are estimated on the batches of one training loader, and this run has {len(loader)}"
        )
    if not isinstance(loader, DataLoader) and iter(loader) is loader:
        raise ValueError(
            f"the training data is a {type(loader).__name__}, which can be read only once, so it has no batches to spare for "
            "batch-norm statistics; use a DataLoader"
        )
    batches: Iterable[Any] = loader
    return batches


def _twin(loader: Iterable[Any]) -> Iterable[Any]:
    """A loader of the same batches. One that is not torch's own is asked for another iterator instead."""
    if not isinstance(loader, DataLoader):
        return loader
    if type(loader).__iter__ is not DataLoader.__iter__ and not isinstance(loader, ResumableLoader):
        return loader
    same = ("num_workers", "collate_fn", "worker_init_fn", "timeout", "multiprocessing_context", "prefetch_factor")
    options = {name: getattr(loader, name) for name in same}
    dataset = loader.dataset
    kept = {id(dataset): dataset}  # a sampler may refer to the data set, which is not copied
    if isinstance(dataset, IterableDataset):
        options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is None:
        options |= {"batch_size": None, "sampler": copy.deepcopy(loader.sampler, kept)}
    else:
        options["batch_sampler"] = copy.deepcopy(loader.batch_sampler, kept)
    return DataLoader(dataset, generator=torch.Generator().manual_seed(0), **options)


def _generators(root: Any) -> Iterator[Any]:
    """The random generators that an object holds, itself or in what it holds."""
    seen: set[int] = set()
    left = [root]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            yield each
        elif isinstance(each, list | tuple | dict):
            if len(each) <= FEW:
                left.extend(each.values() if isinstance(each, dict) else each)
        elif not isinstance(each, type | ModuleType | Tensor | nn.Module | Trainer) and hasattr(each, "__dict__"):
            left.extend(vars(each).values())


def _restorer(generator: Any) -> Callable[[], Any]:
    """What sets a random generator back to the state that it has now."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
