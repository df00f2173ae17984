"""Images in WebDataset shards: tar files, for clusters and stores where a million small files are slow."""

from functools import cached_property
from typing import Any, cast

from torch.utils.data import Dataset

from design_lightning.data.base import ImageData
from design_lightning.data.folders import SPLIT_FOLDERS
from design_lightning.data.samples import Samples
from design_lightning.data.sampling import EpochSampler
from design_lightning.data.shards.sampler import ShardSampler
from design_lightning.data.shards.samples import ShardSamples
from design_lightning.data.shards.store import ShardStore


class WebDataset(ImageData):
    """Images in WebDataset shards, as `design-train shard` makes them of folders, or indexes those of others.

    Each process trains on a part of the shards of its own, `window` at a time, each once an epoch. Every image is seen once an
    epoch; with several processes up to one for each of them comes twice, so that all have equally many, and the order depends on
    their number. Validation counts every image once, and has each process read all shards. A run that is resumed within an epoch
    goes on with the next batch, without reading what lies before.

    At a URL (`https://...`; `s3://...`, `gs://...` and others with the package that `fsspec` names) a shard is copied to the cache
    of the machine a few shards before it is needed, compared with its SHA-256, and shared by the processes of the machine.

    The other defaults are ImageNet's, as `ImageFolder`'s.

    Args:
        root: the folder or URL with `index.json`.
        window: shards over which training images are shuffled.
        cache: where shards at a URL are copied to, best a disk of the machine; null is a folder in the user's cache.
        cache_gb: the copies that were used longest ago are deleted beyond so many gigabytes; null keeps all.
        **kwargs: the options of `ImageData`.

    Raises:
        FileNotFoundError: at the first use of the data, if the index or a shard is missing.
        ValueError: at the first use of the data, if the index is damaged, there is no such split, or `cache_gb` is too small; and
            as `ImageData`.
    """

    def __init__(
        self,
        root: str = "data/imagenet-shards",
        window: int = 8,
        cache: str | None = None,
        cache_gb: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 shard")
        if cache_gb is not None and not cache_gb > 0:
            raise ValueError(f"cache_gb={cache_gb} must be above 0, or null to keep every copy")
        self.root = root
        self.window = window
        self._cache = cache, cache_gb

    @cached_property
    def _store(self) -> ShardStore:
        return ShardStore(self.root, *self._cache)

    def _find_class_names(self) -> tuple[str, ...]:
        return self._store.index.class_names

    def _load(self, split: str) -> Samples:
        splits = self._store.index.splits
        found = next((name for name in SPLIT_FOLDERS[split] if name in splits), None)
        if found is None:
            way_out = (
                "; set val_size to carve a validation split from it" if split == "val" and "train" in splits else ""
            )
            raise ValueError(f"the shards in {self.root!r} have no {split} split, only {', '.join(splits)}{way_out}")
        self._store.check_sizes(found)
        return ShardSamples(self._store, splits[found].shards, self._store.table(found))

    def _train_sampler(self, samples: Samples, world: int, rank: int) -> EpochSampler:
        assert isinstance(samples, ShardSamples)
        self._check_cache(samples, world)
        fetch = samples.fetch if samples.is_remote else None
        return ShardSampler(cast(Dataset, samples), world, rank, self.seed, samples.table.shard, self.window, fetch)

    def _check_cache(self, samples: ShardSamples, world: int) -> None:
        """Raises where the copies that are in use at a time do not fit."""
        cache_gb = self._cache[1]
        if cache_gb is None or not samples.is_remote:
            return
        here = world if self.trainer is None else world // self.trainer.num_nodes
        needed = min(len(samples.shards), 2 * (self.window + 1) * here) * max(s.bytes for s in samples.shards) / 1e9
        if cache_gb < needed:
            raise ValueError(
                f"cache_gb={cache_gb} is too small: {here} processes of this machine read {self.window} shards each at a time, and "
                f"as many come next, which is {needed:.1f} GB; make it larger, or window smaller"
            )
