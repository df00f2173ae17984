"""Grey images in batches of one size, from a folder (read as they are needed) or a tensor."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as PIL's mode L."""


class Images(Protocol):
    """Images that can be gone through several times."""

    def __len__(self) -> int: ...

    def batches(self, pixels: int) -> Iterator[tuple[int, Tensor]]:
        """The number of a batch's first image, and the grey batch [B, H, W] in [0, 1]; at most `pixels` of them, or one image."""
        ...


class ImageTensor:
    """Images [N, H, W], [N, 1, H, W] or [N, 3, H, W]: uint8, or real numbers in [0, 1].

    Raises:
        ValueError: if the shape or the values are others, or there is no image.
    """

    def __init__(self, images: Tensor) -> None:
        if images.dim() == 3:
            images = images.unsqueeze(1)
        if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
            raise ValueError(f"images have shape [N, H, W], [N, 1, H, W] or [N, 3, H, W], not {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
            raise ValueError(f"images are uint8 or real numbers in [0, 1], not {images.dtype}")
        if images.dtype.is_floating_point and not bool(((images >= 0) & (images <= 1)).all()):
            low, high = float(images.min()), float(images.max())
            raise ValueError(
                f"images of real numbers lie in [0, 1], not in [{low:g}, {high:g}]; undo their normalisation"
            )
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, pixels: int) -> Iterator[tuple[int, Tensor]]:
        """As `Images.batches`."""
        size = max(1, pixels // self.images[0, 0].numel())
        for start in range(0, len(self), size):
            yield start, _grey(self.images[start : start + size])


class ImageFolder:
    """All images below a folder, in a random order.

    Args:
        folder: looked through with its subfolders, the hidden ones left out.
        limit: how many images; all if not given.
        seed: of the order, and so of which are taken.
        max_side: a larger image is reduced to it, for a network does not see it larger.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if `limit` or `max_side` is too small; while reading, if a file is no image.
    """

    def __init__(self, folder: str | Path, limit: int | None = None, seed: int = 0, max_side: int = 256) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, but there must be at least 1 image")
        _check_side(max_side)
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no image folder {str(folder)!r}")
        found = sorted(
            os.path.join(parent, name)
            for parent, folders, names in _walk(folder)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        if not found:
            raise FileNotFoundError(f"{str(folder)!r} holds no image: looked for {', '.join(SUFFIXES)}")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
        self.paths = [found[i] for i in order[:limit]]
        self.max_side = max_side

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, pixels: int) -> Iterator[tuple[int, Tensor]]:
        """As `Images.batches`."""
        start, held = 0, list[Tensor]()
        for i, path in enumerate(self.paths):
            image = read_grey(path, self.max_side)
            if held and (image.shape != held[0].shape or (len(held) + 1) * image.numel() > pixels):
                yield start, torch.stack(held)
                start, held = i, []
            held.append(image)
        yield start, torch.stack(held)


def read_image(path: str | Path, mode: Literal["L", "RGB"]) -> "Image.Image":
    """One image in 8 bits, upright as its camera says; of 16 bits the upper eight, and transparency is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or has other numbers than 8 or 16 bits.
    """
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise FileNotFoundError(f"no image file {str(path)!r}")
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image)).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is no image that can be read: {error}") from error


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """PIL's own conversion clips 16 bits at 255, which leaves a white image."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its numbers are none of 8 or 16 bits (mode {image.mode}); save it with 8")
    return Image.fromarray((values >> 8).astype(np.uint8))


def read_grey(path: str | Path, max_side: int = 256) -> Tensor:
    """One image as grey [H, W] in [0, 1], reduced to `max_side` where it is larger.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or `max_side` is too small.
    """
    import numpy as np
    from PIL import Image

    _check_side(max_side)
    grey = read_image(path, "L")
    if max(grey.size) > max_side:
        grey.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(grey)).float() / 255


def _check_side(max_side: int) -> None:
    if max_side < 8:
        raise ValueError(f"max_side is {max_side}, but an image needs at least 8 pixels")


def _walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield parent, folders, names


def _grey(images: Tensor) -> Tensor:
    real = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if images.shape[1] == 1:
        return real[:, 0]
    return (real * torch.tensor(LUMA, device=images.device).view(3, 1, 1)).sum(1)
