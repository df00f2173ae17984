"""Shards out of folders of images, indexes of shards that others made, and whether a set is still what it was made as.

Every shard is a piece of work of its own, whose result is kept: what is stopped goes on with the shards that are missing.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from design_lightning._files import written_whole
from design_lightning.data.folders import SPLIT_FOLDERS, class_folders, labelled_images
from design_lightning.data.shards.index import INDEX, SampleTable, ShardIndex, SplitIndex, StoredFile
from design_lightning.data.shards.store import ShardStore, is_url, local_copy

T = TypeVar("T")
UNFINISHED = ".unfinished"
"""The folder, beside the shards, that keeps the tables of those that are done until the index is written."""
Advance = Callable[[int, int], None]
"""Told how many shards are done, and of how many, including those of an earlier run."""


@dataclass(frozen=True)
class _Shard:
    """What one tar file is made of."""

    name: str
    folder: str
    members: tuple[tuple[str, str, int], ...]
    """Of each image its path in `folder`, its key and its label."""


def make_shards(
    root: Path, out: Path, images: int = 1000, workers: int = 1, seed: int = 0, advance: Advance = lambda done, of: None
) -> ShardIndex:
    """Packs an image folder, `root/train/<class>/<image>` and `root/val/...`, into shards and an index.

    Images are stored as they are. Those of `train` are shuffled first, so that each shard has all classes; their order, and so
    every byte, follows from the paths and the seed.

    Args:
        root: with the folders of splits.
        out: the folder for the shards, made if missing. One that an earlier run left half done is completed.
        images: a shard.
        workers: processes.
        seed: of the order.
        advance: called after each shard.

    Raises:
        FileNotFoundError: if there is no split folder.
        ValueError: if the classes of the splits differ, or `out` has shards of other images.
        OSError: if an image cannot be read, or a shard not be written.
    """
    class_names, splits = _plan(root, images, seed)
    source = _digest([class_names, {split: [s.members for s in shards] for split, shards in splits.items()}])
    kept = out / UNFINISHED
    jobs = {
        split: [_Job(_write, (shard, out), kept / shard.name, out / shard.name) for shard in shards]
        for split, shards in splits.items()
    }
    return _run(jobs, class_names, source, out, workers, advance)


def index_shards(
    splits: Mapping[str, Sequence[str]],
    out: Path,
    class_names: Sequence[str] | None = None,
    workers: int = 1,
    advance: Advance = lambda done, of: None,
) -> ShardIndex:
    """Makes the index of WebDataset shards that are there; reads each of them once, and copies none.

    The label of a sample is that of its `.cls` file, or `label` of its `.json`.

    Args:
        splits: of each split the paths or URLs of its shards.
        out: the folder for the index, made if missing.
        class_names: in the order of the labels; if not given, the numbers in use: `0`, `1`, ...
        workers: processes.
        advance: called after each shard.

    Raises:
        ValueError: if a shard is no tar file, is cut short, or has no images with labels; and as `make_shards`.
        OSError: if one cannot be read.
    """
    names = {s: [u if is_url(u) else os.path.abspath(u) for u in urls] for s, urls in splits.items()}
    source = _digest([class_names, names])
    kept = out / UNFINISHED
    jobs = {
        split: [
            _Job(_scan, (url,), kept / f"{split}-{n:06d}", None if is_url(url) else Path(url))
            for n, url in enumerate(urls)
        ]
        for split, urls in names.items()
    }
    return _run(jobs, None if class_names is None else tuple(class_names), source, out, workers, advance)


def damaged_files(store: ShardStore, workers: int = 1, advance: Advance = lambda done, of: None) -> list[str]:
    """The names of a set's files that are missing or not what the index says, by size and SHA-256; reads all of them."""
    files = [file for split in store.index.splits.values() for file in (split.table, *split.shards)]
    whole = _results([partial(store.is_whole, file) for file in files], workers, advance)
    return [file.name for file, is_whole in zip(files, whole, strict=True) if not is_whole]


# The plan of a set


def _plan(root: Path, images: int, seed: int) -> tuple[tuple[str, ...], dict[str, list[_Shard]]]:
    if images < 1:
        raise ValueError(f"images={images} must be at least 1 a shard")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r} with images")
    folders = {split: next((root / n for n in names if (root / n).is_dir()), None) for split, names in _OWN.items()}
    found = {split: folder for split, folder in folders.items() if folder is not None}
    if not found:
        raise FileNotFoundError(f"no folder train/, val/ or test/ with one folder a class in {str(root)!r}")
    class_names = class_folders(next(iter(found.values())))
    splits = {}
    for split, folder in found.items():
        samples = labelled_images(folder, class_names)
        paths = [os.path.relpath(samples.name(index), folder) for index in range(len(samples))]
        members = list(zip(paths, _keys(paths), samples.labels.tolist(), strict=True))
        if split == "train":
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
            members = [members[index] for index in order.tolist()]
        parts = [tuple(members[first : first + images]) for first in range(0, len(members), images)]
        splits[split] = [_Shard(f"{split}-{n:06d}.tar", str(folder), part) for n, part in enumerate(parts)]
    return class_names, splits


_OWN = {"train": SPLIT_FOLDERS["train"], "val": ("val", "validation"), "test": ("test",)}
"""The folders of each split alone: one with images for two splits is packed once."""


def _keys(paths: Sequence[str]) -> list[str]:
    """A key for each path, all different. WebDataset ends a key at the first dot of its last part."""
    keys: dict[str, None] = {}
    for path in paths:
        folder, _, name = path.rpartition(os.sep)
        stem = f"{folder}/{name.rpartition('.')[0].replace('.', '_')}"
        keys[next(key for n in count(1) if (key := stem if n == 1 else f"{stem}-{n}") not in keys)] = None
    return list(keys)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


# Running


@dataclass(frozen=True)
class _Job:
    """One shard's work: `run(*arguments)` gives its file and its table, which `kept` keeps; `file` is it, where on this machine."""

    run: Callable[..., tuple[StoredFile, SampleTable]]
    arguments: tuple[Any, ...]
    kept: Path
    file: Path | None = None

    def __call__(self) -> tuple[StoredFile, SampleTable]:
        """The result, of an earlier run where it is kept."""
        described, tabled = self.kept.with_suffix(".json"), self.kept.with_suffix(".npz")
        if described.exists():
            stored = StoredFile(**json.loads(described.read_text()))
            if self.file is None or (self.file.exists() and self.file.stat().st_size == stored.bytes):
                return stored, SampleTable.from_bytes(tabled.read_bytes(), str(tabled))
        stored, table = self.run(*self.arguments)
        _write_file(tabled, table.to_bytes())
        _write_file(described, json.dumps(stored.__dict__).encode())
        return stored, table


def _run(
    jobs: Mapping[str, Sequence[_Job]],
    class_names: tuple[str, ...] | None,
    source: str,
    out: Path,
    workers: int,
    advance: Advance,
) -> ShardIndex:
    """Does what is not done yet of the shards of each split, and writes the index."""
    if (out / INDEX).exists():
        store = ShardStore(str(out))
        if store.index.source != source:
            raise ValueError(f"{str(out)!r} has shards of other images, or made otherwise: choose another folder")
        for split in store.index.splits:
            store.check_sizes(split)
        return store.index
    mark = out / UNFINISHED / "source"
    mark.parent.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        _write_file(mark, source.encode())
    if mark.read_text() != source:
        raise ValueError(
            f"{str(out)!r} has unfinished shards of other images, or made otherwise: choose another folder, or remove it"
        )
    results = _results([job for work in jobs.values() for job in work], workers, advance)
    splits, highest = {}, 0
    for split, work in jobs.items():
        shards, tables = zip(*(next(results) for _ in work), strict=True)
        table = SampleTable.joined(tables)
        _check_labels(split, table, class_names)
        highest = max(highest, int(table.label.max()))
        contents = table.to_bytes()
        _write_file(out / f"{split}.npz", contents)
        stored = StoredFile(f"{split}.npz", len(contents), hashlib.sha256(contents).hexdigest())
        splits[split] = SplitIndex(stored, shards)
    if class_names is None:
        class_names = tuple(map(str, range(highest + 1)))
    index = ShardIndex(class_names, source, splits)
    _write_file(out / INDEX, index.to_json().encode())
    shutil.rmtree(mark.parent)
    return index


def _results(jobs: Sequence[Callable[[], T]], workers: int, advance: Advance) -> Iterator[T]:
    """What each job returns, in order; after an error no further one is begun."""
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if workers == 1:
        for done, job in enumerate(jobs):
            result = job()
            advance(done + 1, len(jobs))
            yield result
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("forkserver"))
    try:
        for done, future in enumerate([pool.submit(job) for job in jobs]):
            result = _result(future)
            advance(done + 1, len(jobs))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[T]) -> T:
    """What a process returned; an error of its work is raised from here, as if the work had been done here."""
    try:
        return future.result()
    except (ValueError, OSError) as error:
        raise error.with_traceback(None) from None
    except BrokenProcessPool:
        raise OSError(
            "a process was killed, as a system does where memory runs out; run the same again, with fewer --workers"
        ) from None


def _write_file(place: Path, contents: bytes) -> None:
    with written_whole(place, place.with_name(f".{place.name}.partial")) as file:
        file.write(contents)


def _check_labels(split: str, table: SampleTable, class_names: Sequence[str] | None) -> None:
    wrong = (table.label < 0) | (table.label >= (2**31 if class_names is None else len(class_names)))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        classes = "" if class_names is None else f" of {len(class_names)} class names"
        raise ValueError(
            f"the {split} sample {table.key[first].decode()!r} has label {table.label[first]}, which is none{classes}"
        )


# One shard, in a process of its own


def _write(shard: _Shard, out: Path) -> tuple[StoredFile, SampleTable]:
    """Writes a shard, and reads back what it holds."""
    from webdataset import TarWriter

    place = out / shard.name
    with written_whole(place, place.with_name(f".{shard.name}.partial")) as file, TarWriter(file, mtime=0) as writer:
        for path, key, label in shard.members:
            image = Path(shard.folder, path).read_bytes()
            suffix = path.rpartition(".")[2].lower()
            writer.write({"__key__": key, suffix: image, "cls": str(label).encode()})
    size, digest, table = _contents(str(place), shard.name)
    if len(table) != len(shard.members):
        raise OSError(f"{place} has {len(table)} of {len(shard.members)} images after it was written")
    return StoredFile(shard.name, size, digest), table


def _scan(url: str) -> tuple[StoredFile, SampleTable]:
    """What lies where in a shard that others made."""
    with local_copy(url) as path:
        size, digest, table = _contents(path, url)
    return StoredFile(url, size, digest), table


def _contents(path: str, name: str) -> tuple[int, str, SampleTable]:
    """The size, SHA-256 and samples of a tar file."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int]] = {}
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
                    if not (member.isfile() and match):
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends behind the end of the file")
                    key, suffix = match[1], match[2].lower()
                    if f".{suffix}" in IMG_EXTENSIONS:
                        images.setdefault(key, (member.offset_data, member.size))
                    elif suffix in ("cls", "json"):
                        label = _label(tar.extractfile(member).read(), suffix)  # type: ignore[union-attr]
                        if label is not None:
                            labels.setdefault(key, {})[suffix] = label
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{name} is no whole, uncompressed tar file: {error}") from None
    if not images or images.keys() != labels.keys():
        odd = sorted(images.keys() ^ labels.keys())
        example = f"{odd[0]!r} has no {'label' if odd[0] in images else 'image'}" if odd else "it has none"
        raise ValueError(f"{name}: expected samples of KEY.jpg and KEY.cls, but {example}")
    rows = [(0, *place, labels[key].get("cls", labels[key].get("json", -1)), key) for key, place in images.items()]
    return size, digest, SampleTable.of(rows)


def _label(contents: bytes, suffix: str) -> int | None:
    """The label in a `.cls` or `.json` file, or None if there is none."""
    try:
        label = int(contents) if suffix == "cls" else int(json.loads(contents)["label"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return label if abs(label) < 2**63 else None
