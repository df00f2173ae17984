"""Reading images of which some are damaged: they are left out, counted and named, and too many end the run."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from design_lightning.data.samples import Samples

LONGEST = 100
"""How many times as long as wide an image may be: resized to a network's input, one of 1 x 10,000 pixels would take gigabytes."""
NAMED = 10
"""How many damaged images are named one by one; the rest are counted."""


class ImageReader:
    """Reads the images of a split, and keeps account of those that cannot be read.

    A loader's workers share the account with the process that they load for, and each image counts once, however often it is
    asked for. An image that failed is not tried again. Damage that a decoder does not notice, such as a flipped bit, stays.

    Args:
        samples: N images.
        channels: C: 1 for grey, 3 for red, green and blue.
        split: what the images are called in messages.
        max_damaged: the share of the N that may be damaged; never all, and None allows all but the last one.
    """

    def __init__(self, samples: Samples, channels: int, split: str, max_damaged: float | None) -> None:
        self.samples = samples
        self.channels = channels
        self.split = split
        self.max_damaged = max_damaged
        self.damaged = torch.zeros(len(samples), dtype=torch.bool).share_memory_()
        """bool `[N]`: which images could not be read so far."""
        self._seen = torch.zeros(0, dtype=torch.int64)

    @property
    def count(self) -> int:
        """How many images could not be read so far."""
        return int(self.damaged.count_nonzero())

    @property
    def has_too_many(self) -> bool:
        """Whether more images are damaged than may be."""
        total = len(self.samples)
        allowed = total if self.max_damaged is None else round(self.max_damaged * total, 6)
        return self.count > min(allowed, total - 1)

    def read(self, index: int) -> Tensor | None:
        """The pixels of an image, uint8 `[C, H, W]`, not to be written to; None if it is damaged."""
        if self.damaged[index]:
            return None
        try:
            return self._pixels(index)
        except ConnectionError:  # says nothing of the image
            raise
        except OSError:
            self.damaged[index] = True
            return None

    def read_next(self, index: int) -> tuple[int, Tensor] | None:
        """The first readable image at or behind an index (behind the last comes the first); None if too many are damaged."""
        for place in range(index, index + len(self.samples)):
            place %= len(self.samples)
            pixels = self.read(place)
            if pixels is not None:
                return place, pixels
            if self.has_too_many:
                return None
        return None

    def _pixels(self, index: int) -> Tensor:
        pixels = self.samples.pixels(index, self.channels)
        height, width = pixels.shape[-2:]
        if max(height, width) > LONGEST * min(height, width):
            raise OSError(
                f"cannot use the image {self.samples.name(index)}: it has {width}x{height} pixels, one side more than {LONGEST} "
                "times the other"
            )
        return pixels

    def names(self, most: int | None = None) -> list[str]:
        """The names of the damaged images, of the first `most` only if that is given."""
        return [self.samples.name(index) for index in self.damaged.nonzero()[:most, 0].tolist()]

    def add(self, damaged: Tensor) -> None:
        """Takes over what other processes found, and named: bool `[N]`.

        Raises:
            ValueError: if too many are damaged.
        """
        self.damaged |= damaged
        self._seen = self.damaged.nonzero()[:, 0]
        if self.has_too_many:
            raise ValueError(self._too_many())

    def check(self) -> None:
        """Warns of each image that is damaged and was not named before: of `NAMED` of them.

        Raises:
            ValueError: if too many are damaged.
        """
        if self.count == len(self._seen):
            return
        found = self.damaged.nonzero()[:, 0]
        new = found[~torch.isin(found, self._seen)].tolist()
        left = max(0, NAMED - len(self._seen))
        self._seen = found
        if self.has_too_many:
            raise ValueError(self._too_many())
        for index in new[:left]:
            warnings.warn(f"{self._reason(index)}; it is left out", stacklevel=3)
        if len(new) > left > 0:
            warnings.warn(
                f"more {self.split} images are damaged; they are counted, and no longer named here", stacklevel=3
            )

    def _reason(self, index: int) -> str:
        try:
            self._pixels(index)
        except OSError as error:
            return str(error)
        return f"the image {self.samples.name(index)} could not be read a moment ago"

    def _too_many(self) -> str:
        reasons = "; ".join(self._reason(index) for index in self.damaged.nonzero()[:3, 0].tolist())
        allowed, way_out = "", ""
        if self.max_damaged is not None and self.count < len(self.samples):
            allowed = f", where max_damaged={self.max_damaged:g} is allowed"
            way_out = ", or set data.max_damaged higher"
        return (
            f"{self.count:,} of {len(self.samples):,} {self.split} images cannot be read{allowed}: {reasons}; look whether the "
            f"disk is there, and mend the files or take them away{way_out}"
        )


class ImageLoader(DataLoader):
    """A loader over `Batches` that names damaged images as they come, and ends where they are too many.

    An iteration starts its workers at the first batch, not before.

    Raises:
        ValueError: while it is read, if more images are damaged than may be.
        ConnectionError: while it is read, if where images are cannot be reached.
    """

    def __iter__(self) -> Any:  # a generator; `DataLoader` declares its own iterator class
        reader: ImageReader | None = cast(Any, self.dataset).reader
        batches: Iterator[Any] = super().__iter__()
        try:
            for batch in batches:
                if reader is not None:
                    reader.check()
                yield batch
        except ConnectionError as error:
            # From a worker it comes with the worker's traceback, which ends with what it says.
            raise ConnectionError(str(error).rstrip().rpartition("\n")[2].removeprefix("ConnectionError: ")) from None
