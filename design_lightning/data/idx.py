"""The IDX format of MNIST and its kin: a header of big-endian sizes, then bytes; gzipped or not."""

import gzip
import math
import struct
from pathlib import Path
from typing import Protocol

import numpy as np

_UINT8 = 0x08


class _Readable(Protocol):
    """A file, or a file inside a package."""

    def read_bytes(self) -> bytes: ...


def read_idx(path: _Readable) -> np.ndarray:
    """Reads an IDX file of bytes, gzipped or not.

    Args:
        path: a `Path`, or a file of `importlib.resources`.

    Returns:
        uint8, writable, of the shape in the header: `[N, H, W]` for images, `[N]` for labels.

    Raises:
        ValueError: if it is no IDX file of bytes, or was cut short; names it.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4].hex()}")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    start = 4 + 4 * len(shape)
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(content) - start} bytes, where its header promises {math.prod(shape)}: fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes uint8 data as a gzipped IDX file, the same bytes every time (no date, no file name)."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, _UINT8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8, copy=False).tobytes(), compresslevel=9, mtime=0))
