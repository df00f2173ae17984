"""What a split is, before any transform: images that can be opened by index, their labels and their names."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Samples(ABC):
    """Images with labels and names.

    Attributes:
        labels: int64 `[N]`.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image, decoded, in whatever mode it was stored."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A path, or `split/number` where the images are not files."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The samples at `indices` (int64 `[M]`), in that order."""


class FileSamples(Samples):
    """Image files below one folder.

    Args:
        folder: what the paths are relative to.
        paths: one path an image, relative to `folder`.
        labels: int64 `[N]`.
    """

    def __init__(self, folder: str, paths: Sequence[str] | np.ndarray, labels: Tensor) -> None:
        self.folder = folder
        # One array of bytes: a list of a million strings would be copied into every worker as its reference counts change.
        self._paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths])
        self.labels = labels

    def image(self, index: int) -> Image.Image:
        """Opens and decodes the file.

        Raises:
            OSError: if the file is missing or is no image; names it.
        """
        path = self.name(index)
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except OSError as error:
            raise OSError(f"cannot read the image {path}: {error}") from error

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.path.join(self.folder, os.fsdecode(self._paths[index]))

    def subset(self, indices: Tensor) -> Self:
        """The samples at `indices`, in that order."""
        return type(self)(self.folder, self._paths[indices.numpy()], self.labels[indices])


class TensorSamples(Samples):
    """Images of one size, held in memory.

    Args:
        images: uint8 `[N, C, H, W]` with C of 1 or 3.
        labels: int64 `[N]`.
        names: N strings.
    """

    def __init__(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> None:
        self.images = images
        self.labels = labels
        self.names = names

    def image(self, index: int) -> Image.Image:
        """A copy of the image, in mode L or RGB."""
        pixels = self.images[index].permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def name(self, index: int) -> str:
        """The name of the image."""
        return self.names[index]

    def subset(self, indices: Tensor) -> Self:
        """Copies of the samples at `indices`, in that order."""
        return type(self)(self.images[indices], self.labels[indices], [self.names[i] for i in indices.tolist()])


def numbered(split: str, count: int) -> list[str]:
    """Names for images that are not files: `val/000000`, `val/000001`, ..."""
    return [f"{split}/{index:06d}" for index in range(count)]


def decode_into_memory(files: FileSamples, size: int) -> TensorSamples:
    """Decodes every file once: for small images, where decoding would otherwise take most of an epoch.

    Args:
        files: N images, all of `size` by `size` pixels.
        size: their height and width, in pixels.

    Raises:
        ValueError: if an image has another size; names it.
    """
    pixels = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for index in range(len(files)):
        image = files.image(index)
        if image.size != (size, size):
            raise ValueError(
                f"{files.name(index)} is {image.width}x{image.height}, where this data set has {size}x{size}: "
                "use ImageFolder for images of other sizes"
            )
        pixels[index] = np.asarray(image.convert("RGB"))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return TensorSamples(images, files.labels, [files.name(index) for index in range(len(files))])
