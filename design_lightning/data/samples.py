"""What a split is, before any transform: images that can be opened by index, their labels and their names."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.functional import pil_to_tensor


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

    def pixels(self, index: int, channels: int) -> Tensor:
        """The image as bytes.

        Args:
            index: of the sample.
            channels: C: 1 for grey, 3 for red, green and blue.

        Returns:
            uint8 `[C, H, W]`; not to be written to.

        Raises:
            OSError: if the image is missing or cannot be decoded; names it.
        """
        return pil_to_tensor(self.image(index).convert("L" if channels == 1 else "RGB"))

    @abstractmethod
    def name(self, index: int) -> str:
        """A path, or `split/number` where the images are not files."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """The samples at `indices` (int64 `[M]`), in that order."""


def unreadable(name: str, error: Exception) -> OSError:
    """What to raise for an image that a decoder refused."""
    unknown = isinstance(error, UnidentifiedImageError)  # which names the buffer that it was given
    return OSError(f"cannot read the image {name}: {'it is no image of a known format' if unknown else error}")


class EncodedSamples(Samples):
    """Images in their files' own encoding: JPEG, PNG, and what else Pillow reads."""

    @abstractmethod
    def encoded(self, index: int) -> np.ndarray:
        """The bytes of the file, uint8 `[L]`.

        Raises:
            ConnectionError: if where it is cannot be reached, which says nothing of the image.
            OSError: if it is missing or cut short.
        """

    def image(self, index: int) -> Image.Image:
        """Reads and decodes the image.

        Raises:
            ConnectionError: as `encoded`.
            OSError: if it is missing or is no image; names it.
        """
        try:
            with Image.open(io.BytesIO(self.encoded(index))) as image:  # type: ignore[arg-type]  # an array is a buffer, too
                image.load()
                return image
        except ConnectionError:
            raise
        except Exception as error:  # a decoder may raise anything
            raise unreadable(self.name(index), error) from error

    def pixels(self, index: int, channels: int) -> Tensor:
        """The image decoded by torchvision, which gives Pillow's very pixels in less time, or by Pillow.

        Pillow reads what torchvision does not (BMP, TIFF, AVIF, PNG of 16 bits, animations), what is to be grey (their
        greys differ), and what is damaged, so that errors are those of `image`. Pillow looks at the size first: torchvision
        would decode an image of any.

        Raises:
            ConnectionError: as `encoded`.
            OSError: if it is missing or is no image; names it.
        """
        if channels == 3:
            try:
                # torchvision calls its decoders deprecated since 0.29, in favour of torchcodec's.
                encoded = self.encoded(index)
                Image.open(io.BytesIO(encoded)).close()  # type: ignore[arg-type]
                decoded: Tensor = decode_image(torch.from_numpy(encoded), "RGB")
            except ConnectionError:
                raise
            except (OSError, RuntimeError, Image.DecompressionBombError):
                return super().pixels(index, channels)
            if decoded.dtype == torch.uint8 and decoded.shape[:-2] == (3,):
                return decoded
        return super().pixels(index, channels)


class FileSamples(EncodedSamples):
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

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of the file, uint8 `[L]`."""
        return np.fromfile(self.name(index), dtype=np.uint8)

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

    def pixels(self, index: int, channels: int) -> Tensor:
        """The image itself, where it has so many channels."""
        return self.images[index] if self.images.shape[1] == channels else super().pixels(index, channels)

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
        OSError: if an image is missing or damaged; names it.
        ValueError: if an image has another size; names it.
    """
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for index in range(len(files)):
        image = files.pixels(index, 3)
        height, width = image.shape[1:]
        if (height, width) != (size, size):
            raise ValueError(
                f"{files.name(index)} is {width}x{height}, where this data set has {size}x{size}: "
                "use ImageFolder for images of other sizes"
            )
        images[index] = image
    return TensorSamples(images, files.labels, [files.name(index) for index in range(len(files))])
