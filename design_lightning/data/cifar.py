"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009)."""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torchvision import datasets

from design_lightning.data.base import ImageData
from design_lightning.data.folders import labelled_images, split_folder
from design_lightning.data.samples import Samples, TensorSamples, decode_into_memory, numbered

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100_NAMES.split())


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numpy arrays, strings and lists, and refuses the rest: any other pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        of_numpy = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if of_numpy or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR batch holds arrays, not {module}.{name}")


class _CIFAR(ImageData):
    """What CIFAR-10 and CIFAR-100 share; a subclass says what its files are called."""

    classes: ClassVar[tuple[str, ...]]
    folder: ClassVar[str]
    batches: ClassVar[dict[str, tuple[str, ...]]]
    label_key: ClassVar[str]
    torchvision_class: ClassVar[Any]

    def __init__(self, root: str, download: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Downloads and checks the archive if that is asked for and neither layout is there."""
        if self.download and not self._has_folders and not self._has_pickles:
            self.torchvision_class(self.root, download=True)

    @property
    def _has_folders(self) -> bool:
        return (Path(self.root) / "train").is_dir()

    @property
    def _has_pickles(self) -> bool:
        return (Path(self.root) / self.folder).is_dir()

    def _find_class_names(self) -> tuple[str, ...]:
        return self.classes

    def _load(self, split: str) -> Samples:
        if self._has_folders:
            return decode_into_memory(labelled_images(split_folder(Path(self.root), split), self.classes), size=32)
        if not self._has_pickles:
            raise FileNotFoundError(
                f"no {type(self).__name__} in {self.root!r}: expected train/<class>/ and val/<class>/ folders, or {self.folder}/; "
                "set download=True to fetch it, or root to where it is"
            )
        return self.samples("test") if split == "val" else self._read(split)

    def _read(self, split: str) -> TensorSamples:
        images, labels = [], []
        for name in self.batches[split]:
            path = Path(self.root) / self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{str(path)!r} is missing: delete {str(path.parent)!r} and set download=True")
            with path.open("rb") as file:
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            images.append(np.asarray(batch["data"], dtype=np.uint8))
            labels += batch[self.label_key]
        pixels = torch.from_numpy(np.concatenate(images)).reshape(-1, 3, 32, 32)
        return TensorSamples(pixels, torch.tensor(labels), numbered(split, len(labels)))


class CIFAR10(_CIFAR):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Reads class folders (`root/train/<class>/`, `root/val/<class>/`) or torchvision's `root/cifar-10-batches-py/`, all
    into memory: 184 MB. With `val_size` null, validation uses the 10,000 test images, as papers on binary networks do;
    set `val_size=5000` to choose between models on held-out training images.

    Args:
        root: the folder of either layout.
        download: fetch the archive into `root` if neither layout is there.
        image_size: height and width of the model's input, in pixels; the images are resized if it is not 32.
        padding: as in `ImageData`.
        color_jitter: as in `ImageData`.
        crop_pct: as in `ImageData`.
        mean: as in `ImageData`.
        std: as in `ImageData`.
        **kwargs: the other options of `ImageData`.

    Raises:
        FileNotFoundError: at the first use of the images, if they are missing.
        ValueError: as `ImageData`; and if the class folders are not those of CIFAR-10.
    """

    classes = CIFAR10_CLASSES
    folder = "cifar-10-batches-py"
    batches: ClassVar = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
    label_key = "labels"
    torchvision_class = datasets.CIFAR10

    def __init__(
        self,
        root: str = "data/cifar10",
        download: bool = False,
        image_size: int = 32,
        padding: int | None = 4,
        color_jitter: float = 0.0,
        crop_pct: float | None = 1.0,
        mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
        std: tuple[float, ...] = (0.2470, 0.2435, 0.2616),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root,
            download,
            image_size=image_size,
            padding=padding,
            color_jitter=color_jitter,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
            **kwargs,
        )


class CIFAR100(_CIFAR):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes.

    Reads class folders (`root/train/<class>/`, `root/val/<class>/`) or torchvision's `root/cifar-100-python/`, all into
    memory: 184 MB. With `val_size` null, validation uses the 10,000 test images, as papers on binary networks do; set
    `val_size=5000` to choose between models on held-out training images.

    Args:
        root: the folder of either layout.
        download: fetch the archive into `root` if neither layout is there.
        image_size: height and width of the model's input, in pixels; the images are resized if it is not 32.
        padding: as in `ImageData`.
        color_jitter: as in `ImageData`.
        crop_pct: as in `ImageData`.
        mean: as in `ImageData`.
        std: as in `ImageData`.
        **kwargs: the other options of `ImageData`.

    Raises:
        FileNotFoundError: at the first use of the images, if they are missing.
        ValueError: as `ImageData`; and if the class folders are not those of CIFAR-100.
    """

    classes = CIFAR100_CLASSES
    folder = "cifar-100-python"
    batches: ClassVar = {"train": ("train",), "test": ("test",)}
    label_key = "fine_labels"
    torchvision_class = datasets.CIFAR100

    def __init__(
        self,
        root: str = "data/cifar100",
        download: bool = False,
        image_size: int = 32,
        padding: int | None = 4,
        color_jitter: float = 0.0,
        crop_pct: float | None = 1.0,
        mean: tuple[float, ...] = (0.5071, 0.4866, 0.4409),
        std: tuple[float, ...] = (0.2673, 0.2564, 0.2762),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root,
            download,
            image_size=image_size,
            padding=padding,
            color_jitter=color_jitter,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
            **kwargs,
        )
