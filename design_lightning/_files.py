"""Files that are written whole or not at all, whatever kills the process or fills the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(place: Path, partial: Path) -> Iterator[BinaryIO]:
    """Writes to a file aside, has the disk confirm it, and renames it: what stood in its place stands until then.

    Args:
        place: of the file, whose folder exists.
        partial: of the file while it is written, in the same folder; gone after an error.

    Raises:
        OSError: if it cannot be written; names the place.
    """
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(place)
        _sync_folder(place.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(place)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Has the disk confirm a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
