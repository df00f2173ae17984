"""`ShardSamples`: the images of a split in tar files, each read by its place."""

import os
from typing import Self

import numpy as np
import torch
from torch import Tensor

from design_lightning.data.samples import EncodedSamples
from design_lightning.data.shards.index import SampleTable, StoredFile
from design_lightning.data.shards.store import ShardStore, opened


class ShardSamples(EncodedSamples):
    """Images in shards.

    Args:
        store: where the shards are.
        shards: the tar files.
        table: of N samples.
    """

    def __init__(self, store: ShardStore, shards: tuple[StoredFile, ...], table: SampleTable) -> None:
        self.store = store
        self.shards = shards
        self.table = table
        self.labels = torch.from_numpy(table.label)

    def encoded(self, index: int) -> np.ndarray:
        """The bytes of the image's file, uint8 `[L]`.

        Raises:
            OSError: if its shard cannot be read, or ends before it.
        """
        file = opened(self.store.path(self.shards[self.table.shard[index]]))
        wanted = int(self.table.length[index])
        data = os.pread(file.fileno(), wanted, int(self.table.offset[index]))
        if len(data) != wanted:
            raise OSError(f"its shard ends {wanted - len(data):,} bytes before it does")
        return np.frombuffer(bytearray(data), dtype=np.uint8)  # torch takes no memory that is not to be written to

    def fetch(self, shard: int) -> None:
        """Copies a shard to this machine, if it is elsewhere."""
        self.store.path(self.shards[shard])

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be copied before they are read."""
        return any(map(self.store.is_remote, self.shards))

    def name(self, index: int) -> str:
        """The shard and the key: `train-000000.tar/n01440764/n01440764_10026`."""
        return f"{self.shards[self.table.shard[index]].name}/{self.table.key[index].decode()}"

    def subset(self, indices: Tensor) -> Self:
        """The samples at `indices`, in that order."""
        return type(self)(self.store, self.shards, self.table.rows(indices.numpy()))
