"""What `design-train` looks at by itself, for an error at once and in words: names, paths, classes, memory."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from design_lightning._names import did_you_mean
from design_lightning.training.checkpoint_files import read_checkpoint
from design_lightning.training.memory import capacity_of, images_that_fit

LINKED = ("num_classes", "input_size", "class_names", "mean", "std")
"""What the model is told of the data."""


def check_linked(args: Sequence[str]) -> None:
    """Refuses what the data would overrule without a word.

    Raises:
        ValueError: names the option.
    """
    for arg in args:
        option = arg.partition("=")[0]
        if option in {f"--model.{prefix}{name}" for prefix in ("", "init_args.") for name in LINKED}:
            raise ValueError(f"{option.lstrip('-')} comes from the data; leave it out, or choose other data")


def check_checkpoint(args: Sequence[str]) -> None:
    """Says at once that a checkpoint is missing, rather than after the model is built.

    Raises:
        FileNotFoundError: names it.
    """
    keywords = ("best", "last", "hpc", "registry", "null")
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        path = value if equals else "".join(args[i + 1 : i + 2])
        is_file = option == "--ckpt_path" and path not in keywords and "://" not in path
        if is_file and not Path(path).exists():
            raise FileNotFoundError(
                f"ckpt_path {path!r} does not exist; fit prints the path of the checkpoint that it saved"
            )


def check_trainer(config: Namespace) -> None:
    """Refuses names of strategies and accelerators that Lightning does not have.

    Raises:
        ValueError: with the nearest one.
    """
    known = {
        "strategy": StrategyRegistry.available_strategies(),
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
    }
    for name, names in known.items():
        value = config.get(name)
        if isinstance(value, str) and value not in ("auto", *names):
            raise ValueError(f"trainer.{name} is {value!r}: {did_you_mean(value, names)}")


def compare_classes(
    data: LightningDataModule, model: LightningModule, given: int | None, ckpt_path: str | None
) -> list[str]:
    """Compares the classes of the data with those of a checkpoint, and with the number in the configuration.

    Args:
        data: with `num_classes`, and perhaps `class_names`.
        model: as the configuration names it.
        given: the configuration's number of classes.
        ckpt_path: of the checkpoint, if there is one.

    Returns:
        What a user should know, a line each.

    Raises:
        ValueError: if a checkpoint is of another number of classes, or of the same names in another order.
    """
    count, names = (getattr(data, name, None) for name in ("num_classes", "class_names"))
    usual = inspect.signature(type(model)).parameters["num_classes"].default  # which nobody may have written
    lines = []
    if count is not None and given not in (None, count, usual):
        lines.append(f"num_classes is {count}, as the data has; the configuration's {given} is left aside")
    if not ckpt_path or not Path(ckpt_path).is_file() or count is None:
        return lines
    stored = read_checkpoint(ckpt_path, "ckpt_path").get("hyper_parameters", {})
    if stored.get("num_classes", count) != count:
        raise ValueError(
            f"the checkpoint {ckpt_path} tells {stored['num_classes']} classes apart, but the data has {count}: give it the data "
            "of its training, or train another head from its weights with --model.weights"
        )
    pairs = zip(stored.get("class_names") or (), names or (), strict=False)
    differing = [(was, now) for was, now in pairs if was != now]
    if differing:
        was, now = differing[0]
        how = (
            f"{len(differing)} of {count} class names differ, such as {was!r} in the checkpoint and {now!r} in the data"
        )
        if sorted(stored["class_names"]) == sorted(names or ()):
            raise ValueError(
                f"{how}: the same names in another order, so the labels would be others; name the folders as then"
            )
        lines.append(f"{how}: labels go by their number")
    return lines


def not_written(trainer: Trainer, error: OSError) -> str:
    """One line on a folder of a run that cannot be written; empty where an error is about something else."""
    folders = {
        "trainer.default_root_dir": trainer.default_root_dir,
        **{f"save_dir of {type(logger).__name__}": logger.save_dir for logger in trainer.loggers},
    }
    for name, folder in folders.items():
        if (
            folder
            and error.filename
            and _is_near(Path(error.filename), Path(folder))
            and not _is_writable(Path(folder))
        ):
            return f"{name} is {folder!r}, which cannot be written ({error.strerror}): choose another folder"
    return ""


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _is_near(path: Path, folder: Path) -> bool:
    path, folder = path.absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def out_of_memory(trainer: Trainer, data: LightningDataModule | None, model: LightningModule) -> str:
    """What was too large for a trainer's device, and what would fit."""
    device = trainer.strategy.root_device
    size, shape = (getattr(data, name, None) for name in ("batch_size", "input_size"))
    what = f"out of memory on {device}" + (f" with batch_size {size}" if size else "")
    network = getattr(model, "backbone", None)
    if not (size and shape and isinstance(network, torch.nn.Module)):
        return f"{what}: make the batch smaller"
    try:
        fitting = min(images_that_fit(network, shape, capacity_of(device)), size // 2)
    except (RuntimeError, MemoryError):
        return f"{what}, and with 4 images: take a smaller network or image_size"
    if not fitting:
        return f"{what}; not even one image fits: take a smaller network or image_size"
    share = -(-size // fitting)
    return (
        f"{what}: about {fitting} would fit; --data.batch_size {fitting} --trainer.accumulate_grad_batches {share} keeps the "
        "images of a step"
    )
