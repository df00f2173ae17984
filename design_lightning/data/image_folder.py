"""One folder a class, ImageNet's layout."""

from pathlib import Path
from typing import Any

from design_lightning.data.base import ImageData
from design_lightning.data.folders import class_folders, labelled_images, split_folder
from design_lightning.data.samples import Samples

HOW_TO_GET = (
    "ImageFolder reads <root>/train/<class>/<image> and <root>/val/<class>/<image> (or validation/, test/). ImageNet: register at "
    "https://image-net.org, unpack ILSVRC2012, and sort the validation images into their class folders."
)


class ImageFolder(ImageData):
    """Images in `root/train/<class>/`, `root/val/<class>/` and, optionally, `root/test/<class>/`; ImageNet too.

    The defaults are ImageNet's: 224 pixels, random resized crops, its mean and standard deviation. `validation/` stands
    in for `val/`; a data set with one held-out folder is validated and tested on it. Class names are the names of the
    folders, sorted.

    Args:
        root: the folder that holds `train/` and `val/`.
        **kwargs: the options of `ImageData`.

    Raises:
        FileNotFoundError: at the first use of the data, if a folder is missing.
        ValueError: at the first use of the data, if a class is empty or the classes of the splits differ; and as
            `ImageData`.
    """

    def __init__(self, root: str = "data/imagenet", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def _folder(self, split: str) -> Path:
        try:
            return split_folder(Path(self.root), split)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. {HOW_TO_GET}") from None

    def _find_class_names(self) -> tuple[str, ...]:
        # Without train/, the held-out images can still be evaluated.
        has_train = (Path(self.root) / "train").is_dir()
        return class_folders(self._folder("train" if has_train else "val"))

    def _load(self, split: str) -> Samples:
        return labelled_images(self._folder(split), self.class_names)
