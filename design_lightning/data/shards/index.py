"""The index of a set of shards: `index.json`, and for each split a table of where its images lie.

    index.json       format and version, class names, what it was made of; of every file its name, size and SHA-256
    train.npz        of every training image: offset and length in its shard, label, key
    train-000000.tar WebDataset: of each sample `KEY.jpg` and `KEY.cls`, its label in digits

A shard's name is relative to the folder of the index, or a path or URL of its own. Every tool that reads WebDataset reads the
shards, without the index.
"""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Self

import numpy as np

INDEX = "index.json"
FORMAT = "design-lightning shards"
FORMAT_VERSION = 1
COLUMNS = ("shard", "offset", "length", "label", "key")


@dataclass(frozen=True)
class StoredFile:
    """A file of the set.

    Args:
        name: relative to the index, or a path or URL.
        bytes: its size.
        sha256: of its contents, in hexadecimal digits.
    """

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitIndex:
    """The files of one split.

    Args:
        table: the file of its `SampleTable`.
        shards: its tar files, in order.
    """

    table: StoredFile
    shards: tuple[StoredFile, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` holds.

    Args:
        class_names: in the order of the labels.
        source: a SHA-256 of what the shards were made of, by which a second run knows its own work.
        splits: by name: `train`, `val`, `test`.
    """

    class_names: tuple[str, ...]
    source: str
    splits: Mapping[str, SplitIndex]

    def to_json(self) -> str:
        """The text of `index.json`."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str) -> Self:
        """Reads `to_json`'s text.

        Args:
            text: of the file.
            place: where it was found, for errors.

        Raises:
            ValueError: if it is no index, or one of a later version.
        """
        try:
            stored = json.loads(text)
            if stored["format"] != FORMAT:
                raise ValueError(f"its format is {stored['format']!r}")
            if stored["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"its format version is {stored['format_version']!r}, and this release reads {FORMAT_VERSION}"
                )
            splits = {
                str(name): SplitIndex(_stored_file(split["table"]), tuple(map(_stored_file, split["shards"])))
                for name, split in stored["splits"].items()
            }
            return cls(tuple(map(str, stored["class_names"])), str(stored["source"]), splits)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place} is no index of shards: {reason}; design-train shard makes one") from None


def _stored_file(stored: Mapping[str, Any]) -> StoredFile:
    name, size, digest = stored["name"], stored["bytes"], stored["sha256"]
    if not (isinstance(name, str) and name and isinstance(digest, str) and type(size) is int and size >= 0):
        raise ValueError(f"{dict(stored)} does not describe a file")
    if ".." in PurePath(name).parts:
        raise ValueError(f"the file name {name!r} leaves the folder of the index")
    return StoredFile(name, size, digest)


@dataclass(frozen=True)
class SampleTable:
    """Where the N images of a split, or of one shard, lie.

    Args:
        shard: int32 `[N]`, the number of each image's shard, ascending.
        offset: int64 `[N]`, of its first byte in that shard.
        length: int64 `[N]`, its bytes.
        label: int64 `[N]`.
        key: bytes `[N]`, its name without a suffix, in UTF-8.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    key: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int, str]]) -> Self:
        """From rows of shard, offset, length, label and key."""
        columns: Any = tuple(zip(*rows, strict=True)) if rows else ((),) * 5
        numbers = [np.array(c, dtype=t) for c, t in zip(columns, (np.int32, *(np.int64,) * 3), strict=False)]
        shard, offset, length, label = numbers
        return cls(shard, offset, length, label, np.array([key.encode() for key in columns[4]], dtype=bytes))

    @classmethod
    def joined(cls, tables: Sequence[Self]) -> Self:
        """The tables of single shards as that of their split: the shards are numbered in this order."""
        shards = [np.full(len(table), number, dtype=np.int32) for number, table in enumerate(tables)]
        offset, length, label, key = (np.concatenate([getattr(t, name) for t in tables]) for name in COLUMNS[1:])
        return cls(np.concatenate(shards), offset, length, label, key)

    def rows(self, indices: np.ndarray) -> "SampleTable":
        """The rows at `indices`, in that order."""
        return SampleTable(*(getattr(self, name)[indices] for name in COLUMNS))

    def to_bytes(self) -> bytes:
        """An `.npz` file."""
        file = io.BytesIO()
        np.savez_compressed(file, **{name: getattr(self, name) for name in COLUMNS})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, contents: bytes, place: str) -> Self:
        """Reads `to_bytes`'s file.

        Raises:
            ValueError: if it is no such table; names `place`.
        """
        try:
            with np.load(io.BytesIO(contents), allow_pickle=False) as arrays:
                table = cls(*(arrays[name] for name in COLUMNS))
            kinds = [getattr(table, name).dtype.kind for name in COLUMNS]
            shapes = {getattr(table, name).shape for name in COLUMNS}
            if kinds != ["i", "i", "i", "i", "S"] or shapes != {(len(table),)}:
                raise ValueError("its columns are not those of a table of samples")
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{place} is no table of samples: {error}") from None
        return table
