"""STL-10 (Coates, Lee and Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning", 2011)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from design_lightning.data.base import ImageData
from design_lightning.data.samples import Samples, TensorSamples, numbered

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
FOLDER = "stl10_binary"


class STL10(ImageData):
    """STL-10: 5,000 training and 8,000 test images of 96x96 pixels in 10 classes, held in memory (360 MB).

    With `val_size` null, validation uses the test images. The 100,000 unlabelled images are not read.

    Args:
        root: the folder that holds `stl10_binary/`.
        download: fetch the archive (2.6 GB) into `root` if `stl10_binary/` is not there.
        image_size: height and width of the model's input, in pixels; the images are resized if it is not 96.
        padding: as in `ImageData`.
        color_jitter: as in `ImageData`.
        crop_pct: as in `ImageData`.
        mean: as in `ImageData`.
        std: as in `ImageData`.
        **kwargs: the other options of `ImageData`.

    Raises:
        FileNotFoundError: at the first use of the images, if they are missing.
        ValueError: as `ImageData`; and if a file has been cut short.
    """

    def __init__(
        self,
        root: str = "data/stl10",
        download: bool = False,
        image_size: int = 96,
        padding: int | None = 12,
        color_jitter: float = 0.0,
        crop_pct: float | None = 1.0,
        mean: tuple[float, ...] = (0.4467, 0.4398, 0.4066),
        std: tuple[float, ...] = (0.2603, 0.2566, 0.2713),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_size=image_size,
            padding=padding,
            color_jitter=color_jitter,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
            **kwargs,
        )
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Downloads and checks the archive if that is asked for and `stl10_binary/` is not there."""
        if self.download and not (Path(self.root) / FOLDER).is_dir():
            datasets.STL10(self.root, split="test", download=True)

    def _find_class_names(self) -> tuple[str, ...]:
        return STL10_CLASSES

    def _load(self, split: str) -> Samples:
        if split == "val":
            return self.samples("test")
        pixels, labels = (self._bytes(f"{split}_{part}.bin") for part in ("X", "y"))
        if len(pixels) != len(labels) * 3 * 96 * 96:
            raise ValueError(
                f"{split}_X.bin in {self.root!r} has {len(pixels)} bytes, where the {len(labels)} labels of {split}_y.bin need "
                f"{len(labels) * 3 * 96 * 96}: delete {FOLDER}/ and set download=True"
            )
        # The file holds columns; labels count from 1.
        images = torch.from_numpy(pixels).reshape(-1, 3, 96, 96).transpose(2, 3).contiguous()
        return TensorSamples(images, torch.from_numpy(labels).long() - 1, numbered(split, len(labels)))

    def _bytes(self, name: str) -> np.ndarray:
        path = Path(self.root) / FOLDER / name
        if not path.is_file():
            raise FileNotFoundError(
                f"no STL10 in {self.root!r}: {str(path)!r} is missing; set download=True, or root to where it is"
            )
        return np.fromfile(path, dtype=np.uint8)
