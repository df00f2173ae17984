"""Images in folders: `root/train/<class>/*.jpg`, `root/val/<class>/*.jpg`, and any images below one folder."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from design_lightning.data.samples import FileSamples
from design_lightning.data.sampling import IGNORE_LABEL

SPLIT_FOLDERS = {
    "train": ("train",),
    "val": ("val", "validation", "test"),
    "test": ("test", "val", "validation"),
}
"""Where a split is looked for, in this order: a data set with one held-out folder validates and tests on it."""


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split, by `SPLIT_FOLDERS`.

    Raises:
        FileNotFoundError: if there is none; names the root and what was looked for.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {str(root)!r}")
    for name in SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    looked_for = " or ".join(f"{name}/" for name in SPLIT_FOLDERS[split])
    has_train = any((root / name).is_dir() for name in SPLIT_FOLDERS["train"])
    way_out = "; set val_size to carve a validation split from train/" if split == "val" and has_train else ""
    raise FileNotFoundError(f"no folder {looked_for} with one folder a class in {str(root)!r}{way_out}")


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the class folders, sorted; their order numbers the classes.

    Raises:
        FileNotFoundError: if there are none.
    """
    names = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))
    if not names:
        raise FileNotFoundError(f"{str(folder)!r} holds no class folders: expected {folder}/<class>/<image>")
    return names


def images_below(folder: Path) -> list[str]:
    """The paths of all images below a folder, relative to it and sorted; hidden files and folders are left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in files
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def labelled_images(folder: Path, class_names: Sequence[str]) -> FileSamples:
    """The images of one split, labelled by their class folder.

    Raises:
        ValueError: if the class folders are not `class_names`, or one has no image; names the classes.
    """
    found = class_folders(folder)
    if set(found) != set(class_names):
        differences = [
            f"{what} {', '.join(map(repr, sorted(names)))}"
            for what, names in (("lacks", set(class_names) - set(found)), ("also has", set(found) - set(class_names)))
            if names
        ]
        raise ValueError(
            f"the class folders of {str(folder)!r} differ from the {len(class_names)} classes: it {'; it '.join(differences)}"
        )
    paths, labels = [], []
    for label, name in enumerate(class_names):
        images = images_below(folder / name)
        if not images:
            raise ValueError(f"class {name!r} is empty: no image below {str(folder / name)!r}")
        paths += [os.path.join(name, image) for image in images]
        labels += [label] * len(images)
    return FileSamples(str(folder), paths, torch.tensor(labels))


def unlabelled_images(folder: Path) -> FileSamples:
    """All images below a folder, labelled `IGNORE_LABEL`.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to predict")
    paths = images_below(folder)
    if not paths:
        raise FileNotFoundError(f"no images below {str(folder)!r}; looked for {', '.join(IMG_EXTENSIONS)}")
    return FileSamples(str(folder), paths, torch.full((len(paths),), IGNORE_LABEL))
