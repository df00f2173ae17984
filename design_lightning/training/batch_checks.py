"""What a classifier refuses to compute with."""

from typing import Any

import torch
from torch import Tensor


def check_batch(images: Tensor, labels: Any, num_classes: int, where: str, training: bool) -> None:
    """Refuses NaN, infinity and labels out of range.

    A NaN compares false, so a binarizer would make it -1 and train on in silence.

    Args:
        images: [B, ...].
        labels: [B], or something that is no tensor and is not looked at.
        num_classes: labels are below it.
        where: the batch, in the words of an error.
        training: whether labels below 0, the padding of an evaluation, are an error too.

    Raises:
        ValueError: names the images or the label.
    """
    # One sum costs a small part of isfinite().all(), and is finite only if everything is (or nearly overflows).
    if images.is_floating_point() and images.numel() and not bool(torch.isfinite(images.float().sum())):
        bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"NaN or infinity in {len(bad)} of {len(images)} images of the {where}: numbers {bad[:8]} of the batch; "
                "look for a division by a zero std, or a damaged file"
            )
    if training and isinstance(labels, Tensor) and labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"label {int(labels.min())} in the {where}; only evaluation pads with labels below 0")
    if isinstance(labels, Tensor) and labels.numel() and int(labels.max()) >= num_classes:
        raise ValueError(
            f"label {int(labels.max())} in the {where}, but the model has {num_classes} classes, 0 to "
            f"{num_classes - 1}; set num_classes, or look at the labels"
        )


def check_floats(images: Tensor) -> None:
    """Refuses the bytes of a loader that was read without its data module.

    Raises:
        ValueError: if the images are no floats; names their type.
    """
    if not images.is_floating_point():
        raise ValueError(
            f"the images are {images.dtype}, where a network takes normalized floats: give the Trainer the data module itself "
            "(datamodule=data), which normalizes them, or read its loader with data.normalize(images)"
        )
