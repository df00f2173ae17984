"""Where the files of a set of shards are: in a folder, or at URLs, whose files are copied to a cache when they are needed."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from design_lightning._files import written_whole
from design_lightning.data.shards.index import INDEX, SampleTable, ShardIndex, StoredFile

ATTEMPTS = 3
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write says where there is no room for it."""
HOW_TO_GET = "design-train shard --root IMAGES --out DIR makes shards of images in folders"


def is_url(name: str) -> bool:
    """Whether a name is one of another system: `https://...`, `s3://...`."""
    return re.match(r"[a-z0-9+.-]{2,}://", name, re.IGNORECASE) is not None


def default_cache() -> Path:
    """`design-lightning/shards` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "design-lightning" / "shards"


class ShardStore:
    """The files of one set of shards.

    Args:
        root: the folder or URL with `index.json`. What `fsspec` reads serves as a URL, given the package of its protocol.
        cache: the folder for copies of files at URLs, on a disk of this machine; None is `default_cache()`. Processes share it.
        cache_gb: the copies that were read longest ago are deleted beyond so many gigabytes (1e9 bytes), not counting what is
            being copied; None keeps all.
    """

    def __init__(self, root: str, cache: str | None = None, cache_gb: float | None = None) -> None:
        self.root = root
        self.cache = default_cache() if cache is None else Path(cache)
        self.cache_gb = cache_gb

    @cached_property
    def index(self) -> ShardIndex:
        """What `index.json` says.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged.
        """
        place = self._place(INDEX)
        if is_url(place):
            with _reading(place) as file:
                contents = file.read()
        elif not Path(place).is_file():
            raise FileNotFoundError(f"no {INDEX} in {self.root!r}: {HOW_TO_GET}")
        else:
            contents = Path(place).read_bytes()
        try:
            return ShardIndex.from_json(contents.decode(), place)
        except UnicodeDecodeError as error:
            raise ValueError(f"{place} is no index of shards: {error}; {HOW_TO_GET}") from None

    def table(self, split: str) -> SampleTable:
        """Where the images of a split lie.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not the one of the index.
        """
        stored = self.index.splits[split].table
        path = self.path(stored)
        contents = Path(path).read_bytes()
        if hashlib.sha256(contents).hexdigest() != stored.sha256:
            way_out = "delete it, and it is copied anew" if self.is_remote(stored) else "copy it again"
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of {INDEX}; {way_out}")
        return SampleTable.from_bytes(contents, self._place(stored.name))

    def check_sizes(self, split: str) -> None:
        """Looks whether the shards of a split are there, where they are files of this machine.

        Raises:
            OSError: if one is missing or has another size; names some.
        """
        shards = self.index.splits[split].shards
        wrong = [shard.name for shard in shards if not self.is_remote(shard) and self._size(shard) != shard.bytes]
        if wrong:
            raise OSError(
                f"{len(wrong)} of {len(shards)} {split} shards in {self.root!r} are missing or not of the size that {INDEX} says, "
                f"for example {', '.join(wrong[:3])}; copy them again, or remove {INDEX} and have design-train shard make it anew"
            )

    def is_remote(self, stored: StoredFile) -> bool:
        """Whether a file has to be copied before it is read."""
        return is_url(self._place(stored.name))

    def path(self, stored: StoredFile) -> str:
        """A file's path on this machine; copies it to the cache first, where it is at a URL and not there yet.

        Raises:
            ConnectionError: if it cannot be copied, or the copy is not what the index says; names the URL. It says nothing of
                the images.
            ImportError: if the package for that kind of URL is missing; names it.
        """
        place = self._place(stored.name)
        if not is_url(place):
            return place
        name = place.partition("?")[0].rpartition("/")[2]  # what a signed URL asks is longer than a file's name may be
        copy = self.cache / f"{stored.sha256[:16]}-{name}"
        try:
            if not _touched(copy, stored.bytes):
                self.cache.mkdir(parents=True, exist_ok=True)
                with _locked(self.cache / f".{stored.sha256[:16]}.lock"):
                    if not _touched(copy, stored.bytes):  # by another process, while this one waited
                        _download(place, stored, copy)
                        self._delete_oldest()
        except ConnectionError:
            raise
        except OSError as error:
            raise ConnectionError(
                f"{place} cannot be copied to the cache {self.cache}: {error}; make room there, or set data.cache to another "
                "folder, or data.cache_gb to a limit"
            ) from None
        return str(copy)

    def is_whole(self, stored: StoredFile) -> bool:
        """Whether a file is there, of the size and SHA-256 that the index says; reads all of it, whatever the cache has.

        Raises:
            OSError: if its URL cannot be reached.
        """
        try:
            with local_copy(self._place(stored.name)) as path, open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
        except FileNotFoundError:
            return False

    def _place(self, name: str) -> str:
        if is_url(name) or os.path.isabs(name):
            return name
        return f"{self.root.rstrip('/')}/{name}"

    def _size(self, stored: StoredFile) -> int:
        try:
            return os.stat(self._place(stored.name)).st_size
        except OSError:
            return -1

    def _delete_oldest(self) -> None:
        if self.cache_gb is None:
            return
        with _locked(self.cache / ".limit.lock"):
            copies = sorted(
                ((path.stat(), path) for path in self.cache.glob("*.tar")), key=lambda copy: copy[0].st_mtime_ns
            )
            excess = sum(stat.st_size for stat, _ in copies) - self.cache_gb * 1e9
            for stat, path in copies:
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)  # who has it open can read on
                excess -= stat.st_size


@lru_cache(maxsize=64)
def opened(path: str) -> BinaryIO:
    """A file, kept open by this process."""
    return open(path, "rb", buffering=0)


def _touched(copy: Path, size: int) -> bool:
    """Whether a copy is there, of so many bytes; marks it as in use."""
    try:
        os.utime(copy)
        return copy.stat().st_size == size
    except FileNotFoundError:
        return False


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with place.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(
                file, fcntl.LOCK_UN
            )  # a worker that was forked meanwhile has the file open, too, and would keep it


@contextmanager
def local_copy(place: str) -> Iterator[str]:
    """A path to read a file from: its own, or that of a copy of what is at a URL, which is gone afterwards."""
    if not is_url(place):
        yield place
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        with _reading(place) as source:
            shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        yield copy.name


def _download(url: str, stored: StoredFile, copy: Path) -> None:
    for attempt in range(ATTEMPTS):
        try:
            digest, size = hashlib.sha256(), 0
            with written_whole(copy, copy.with_name(f".{copy.name}.partial")) as file, _reading(url) as source:
                while block := source.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                if (size, digest.hexdigest()) != (stored.bytes, stored.sha256):
                    raise OSError(
                        f"{url} is not what {INDEX} says: {size:,} bytes of {stored.bytes:,}"
                        if size != stored.bytes
                        else f"{url} is not what {INDEX} says: its SHA-256 differs"
                    )
            return
        except OSError as error:
            if error.errno in FULL:
                raise
            if attempt == ATTEMPTS - 1 or isinstance(error, FileNotFoundError):
                raise ConnectionError(str(error)) from None
            time.sleep(4**attempt)


@contextmanager
def _reading(url: str) -> Iterator[Any]:
    """A file at a URL, to be read from its start.

    Raises:
        OSError: whatever goes wrong; names the URL, except where the disk to write to is full.
        ImportError: if the package for that kind of URL is missing; names it.
    """
    try:
        with fsspec.open(url, "rb", **_options(url)) as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} does not exist") from None
    except ImportError as error:
        raise ImportError(f"{url} cannot be read: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        if url in str(error):
            raise OSError(str(error)) from None
        raise OSError(f"{url} cannot be read: {error or type(error).__name__}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("aiohttp", "asyncio", "botocore", "fsspec"):
            raise
        raise OSError(f"{url} cannot be read: {type(error).__name__}: {error}") from None


def _options(url: str) -> dict[str, Any]:
    """Files are read once from start to end, so as a stream where the protocol has one."""
    return {"block_size": 0} if url.lower().startswith(("http://", "https://")) else {}
