"""Data sets of the Hugging Face hub, and what the `datasets` library reads from a disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from design_lightning._names import did_you_mean
from design_lightning.data.base import ImageData
from design_lightning.data.samples import Samples, unreadable

IMAGE_COLUMNS = ("image", "img", "pixel_values", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
HUB_SPLITS = {"val": ("validation", "val", "valid", "dev", "test"), "test": ("test", "validation", "val", "valid")}


class TableSamples(Samples):
    """Rows of a `datasets.Dataset`.

    Args:
        table: of N rows.
        image_column: holds Pillow images, or arrays of bytes `[H, W]` or `[H, W, C]`.
        labels: int64 `[N]`.
        split: the name of the split, for the names of the rows.
        rows: of each sample, its row; None for all in order.
    """

    def __init__(self, table: Any, image_column: str, labels: Tensor, split: str, rows: Tensor | None = None) -> None:
        self.table = table.select_columns([image_column])
        self.image_column = image_column
        self.labels = labels
        self.split = split
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def image(self, index: int) -> Image.Image:
        """The image of a row, decoded.

        Raises:
            OSError: if it is missing or is no image; names the row.
        """
        try:
            value = self.table[int(self.rows[index])][self.image_column]
            return value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value, dtype=np.uint8))
        except Exception as error:  # a decoder may raise anything
            raise unreadable(self.name(index), error) from error

    def name(self, index: int) -> str:
        """The split and the row."""
        return f"{self.split}/{int(self.rows[index]):06d}"

    def subset(self, indices: Tensor) -> Self:
        """The samples at `indices`, in that order."""
        return type(self)(self.table, self.image_column, self.labels[indices], self.split, self.rows[indices])


class HuggingFace(ImageData):
    """A data set of the Hugging Face hub, or one on disk: of `save_to_disk`, of parquet files, or of an image folder.

    The classes are those of the label column; where it holds strings, they are the sorted strings. Reading them
    downloads a data set of the hub.

    Args:
        dataset: a name on the hub, or the path of a folder.
        config_name: of the data set's configuration, where it has several.
        cache_dir: where downloads go; null is the library's own place.
        image_column: null finds `image`, `img`, `pixel_values` or `picture`.
        label_column: null finds `label`, `labels`, `fine_label`, `class` or `target`.
        train_split: the name of the training split.
        val_split: the name of the validation split; null finds `validation`, `val`, `valid` or `dev`, and else takes
            the test split.
        test_split: the name of the test split; null finds `test`, and else takes the validation split.
        **kwargs: the options of `ImageData`.

    Raises:
        ModuleNotFoundError: if the `datasets` package is missing.
        ValueError: at the first use of the data, if a column or a split is not there; names those that are. And as
            `ImageData`.
    """

    def __init__(
        self,
        dataset: str,
        config_name: str | None = None,
        cache_dir: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _import_datasets()
        self.dataset = dataset
        self.config_name = config_name
        self.cache_dir = cache_dir
        self.image_column = image_column
        self.label_column = label_column
        self._splits = {"train": train_split, "val": val_split, "test": test_split}
        self._tables: Any = None

    def prepare_data(self) -> None:
        """Downloads the data set, where it is one of the hub."""
        self._all_tables()

    def _all_tables(self) -> Any:
        if self._tables is None:
            library, path = _import_datasets(), Path(self.dataset)
            if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
                tables = library.load_from_disk(self.dataset)
            elif path.is_dir() or not _looks_like_a_path(self.dataset):
                tables = library.load_dataset(self.dataset, self.config_name, cache_dir=self.cache_dir)
            else:
                raise FileNotFoundError(f"no folder {self.dataset!r}, and it is no name on the hub either")
            self._tables = tables if isinstance(tables, dict) else {self._splits["train"]: tables}
        return self._tables

    def _table(self, split: str) -> Any:
        tables, asked = self._all_tables(), self._splits[split]
        candidates = HUB_SPLITS[split] if asked is None else (asked,)
        for candidate in candidates:
            if candidate in tables:
                return tables[candidate]
        way_out = "; set val_size to carve a validation split from the training images" if split == "val" else ""
        raise ValueError(
            f"{self.dataset!r} has no split {' or '.join(map(repr, candidates))}, only {', '.join(map(repr, tables))}; "
            f"name it with {split}_split{way_out}"
        )

    def _find_class_names(self) -> tuple[str, ...]:
        feature, labels = self._labels(self._table("train"))
        if isinstance(feature, _import_datasets().ClassLabel):
            return tuple(feature.names)
        distinct = set(labels)
        if all(isinstance(label, int) for label in distinct):
            return tuple(str(label) for label in range(max(distinct, default=-1) + 1))
        return tuple(sorted(map(str, distinct)))

    def _labels(self, table: Any) -> tuple[Any, Sequence[Any]]:
        column = self._column(table, self.label_column, LABEL_COLUMNS, "label_column")
        return table.features[column], table[column][:]

    def _load(self, split: str) -> Samples:
        table = self._table(split)
        image_column = self._column(table, self.image_column, IMAGE_COLUMNS, "image_column")
        _, values = self._labels(table)
        if values and not all(isinstance(value, int) for value in values):
            number = {name: index for index, name in enumerate(self.class_names)}
            unknown = sorted({str(value) for value in values} - set(number))
            if unknown:
                raise ValueError(
                    f"the {split} split of {self.dataset!r} has labels that training lacks: {', '.join(map(repr, unknown))}"
                )
            values = [number[str(value)] for value in values]
        return TableSamples(table, image_column, torch.tensor(values, dtype=torch.int64), split)

    def _column(self, table: Any, asked: str | None, usual: tuple[str, ...], option: str) -> str:
        there = table.column_names
        for column in usual if asked is None else (asked,):
            if column in there:
                return column
        if asked is None:
            raise ValueError(
                f"{self.dataset!r} has no column {' or '.join(usual)}, only {', '.join(there)}; name it with {option}"
            )
        raise ValueError(f"{option}={asked!r} is no column of {self.dataset!r}: {did_you_mean(asked, there)}")


def _looks_like_a_path(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or dataset.count("/") > 1


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'HuggingFace needs the package "datasets": pip install "design-lightning[data]"', name="datasets"
        ) from error
    return datasets
