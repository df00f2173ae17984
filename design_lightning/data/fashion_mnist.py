"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747), and an embedded subset of it."""

from abc import abstractmethod
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision import datasets

from design_lightning.data.base import ImageData
from design_lightning.data.idx import read_idx
from design_lightning.data.samples import Samples, TensorSamples, numbered

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = 0.2860, 0.3530
_FILE_PREFIX = {"train": "train", "test": "t10k"}


class _FashionMNIST(ImageData):
    """28x28 grey images, at 32x32 with a border of black; a subclass says where the files are."""

    def __init__(self, channels: Literal[1, 3], **kwargs: Any) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 1 (grey), or 3 (the same values in red, green and blue)")
        self.channels = channels
        super().__init__(mean=(MEAN,) * channels, std=(STD,) * channels, **kwargs)

    def _find_class_names(self) -> tuple[str, ...]:
        return FASHION_MNIST_CLASSES

    @abstractmethod
    def _file(self, name: str) -> Path | Traversable:
        """One of the four files, by its name without `.gz`."""

    def _load(self, split: str) -> Samples:
        if split == "val":
            return self.samples("test")
        prefix = _FILE_PREFIX[split]
        labels = torch.from_numpy(read_idx(self._file(f"{prefix}-labels-idx1-ubyte"))).long()
        images = torch.from_numpy(read_idx(self._file(f"{prefix}-images-idx3-ubyte")))[:, None]
        if self.image_size == 32:
            images = torch.nn.functional.pad(images, (2, 2, 2, 2))
        return TensorSamples(images.expand(-1, self.channels, -1, -1), labels, numbered(split, len(labels)))


class FashionMNIST(_FashionMNIST):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 grey pixels in 10 classes of clothing.

    With `val_size` null, validation uses the test images.

    Args:
        root: the folder that holds torchvision's `FashionMNIST/raw/`, or the four IDX files themselves, gzipped or not.
        download: fetch the files into `root` if they are not there.
        channels: 1, or 3 for networks that expect colour.
        image_size: height and width of the model's input, in pixels: 32 adds a border of two black pixels, 28 adds
            none, and any other size is resized.
        padding: as in `ImageData`.
        color_jitter: as in `ImageData`.
        crop_pct: as in `ImageData`.
        **kwargs: the other options of `ImageData`.

    Raises:
        FileNotFoundError: at the first use of the images, if they are missing.
        ValueError: as `ImageData`; and if a file was cut short.
    """

    def __init__(
        self,
        root: str = "data/fashion-mnist",
        download: bool = False,
        channels: Literal[1, 3] = 1,
        image_size: int = 32,
        padding: int | None = 2,
        color_jitter: float = 0.0,
        crop_pct: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            channels, image_size=image_size, padding=padding, color_jitter=color_jitter, crop_pct=crop_pct, **kwargs
        )
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Downloads and checks the files if that is asked for and they are not there."""
        if self.download and self._found("train-images-idx3-ubyte") is None:
            datasets.FashionMNIST(self.root, download=True)

    def _found(self, name: str) -> Path | None:
        folders = (Path(self.root), Path(self.root) / "FashionMNIST" / "raw")
        paths = (folder / (name + suffix) for folder in folders for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    def _file(self, name: str) -> Path:
        path = self._found(name)
        if path is None:
            raise FileNotFoundError(
                f"no FashionMNIST in {self.root!r}: neither {name} nor {name}.gz is there or in FashionMNIST/raw/; "
                "set download=True to fetch it, or root to where it is"
            )
        return path


class FashionMNISTSubset(_FashionMNIST):
    """6,000 training and 1,000 validation images of Fashion-MNIST, equally many a class, embedded in this package.

    For a first run without a download: an epoch of data takes a fraction of a second. Validation and test are the same
    1,000 images, from Fashion-MNIST's test images. `benchmarks/make_fashion_mnist_subset.py` makes the files.

    Args:
        channels: 1, or 3 for networks that expect colour.
        image_size: height and width of the model's input, in pixels: 32 adds a border of two black pixels, 28 adds
            none, and any other size is resized.
        num_workers: as in `ImageData`.
        padding: as in `ImageData`.
        color_jitter: as in `ImageData`.
        crop_pct: as in `ImageData`.
        **kwargs: the other options of `ImageData`.

    Raises:
        ValueError: as `ImageData`.
    """

    def __init__(
        self,
        channels: Literal[1, 3] = 1,
        image_size: int = 32,
        num_workers: int = 0,
        padding: int | None = 2,
        color_jitter: float = 0.0,
        crop_pct: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            channels,
            image_size=image_size,
            num_workers=num_workers,
            padding=padding,
            color_jitter=color_jitter,
            crop_pct=crop_pct,
            **kwargs,
        )

    def _file(self, name: str) -> Traversable:
        return resources.files("design_lightning.data") / "fashion_mnist_subset" / f"{name}.gz"
