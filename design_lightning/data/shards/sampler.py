"""`ShardSampler`: an order for training that reads each shard once an epoch, mixed with its neighbours."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch.utils.data import Dataset

from design_lightning.data.sampling import EpochSampler

FETCHING = 4
"""How many shards are copied at a time."""


class ShardSampler(EpochSampler):
    """Deals samples in shards to processes, so that a process reads its own shards, few at a time.

    The shards are shuffled and laid end to end; every process takes a part of equal length, whose samples are then shuffled over a
    window of so many shards: sample i comes at the rank of i + u among all, with u uniform in 0..window. Where the parts cannot be
    of equal length, the first samples of the epoch come again in the last process.

    Args:
        dataset: of N samples.
        num_replicas: the number of processes.
        rank: of this process.
        seed: of the order, together with the epoch that `set_epoch` sets.
        shards: int `[N]`, the shard of each sample.
        window: shards that are read at a time; with as many as there are, any order is as likely as another.
        fetch: called with the number of a shard, in a thread, some time before its first sample; None for shards at hand.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_replicas: int,
        rank: int,
        seed: int,
        shards: np.ndarray,
        window: int,
        fetch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed)
        self.shards = shards
        self.window = window
        self.fetch = fetch

    def order(self) -> list[int]:
        """The indices of this process's samples in this epoch."""
        numbers, shard = np.unique(self.shards, return_inverse=True)
        place = np.random.default_rng([self.seed, self.epoch]).permutation(len(numbers))
        stream = np.argsort(place[shard], kind="stable")
        part = np.resize(stream, self.total_size)[self.rank * self.num_samples : (self.rank + 1) * self.num_samples]
        generator = np.random.default_rng([self.seed, self.epoch, self.rank])
        width = self.window * len(shard) / len(numbers)
        if width >= len(part):
            return list(generator.permutation(part).tolist())
        return list(part[np.argsort(np.arange(len(part)) + width * generator.random(len(part)))].tolist())

    def __iter__(self) -> Iterator[int]:
        if self.fetch is None:
            yield from super().__iter__()
            return
        places = list(super().__iter__())
        waiting = self._first_uses(places)
        # As many samples ahead as lie in the shards that are copied at a time.
        ahead = FETCHING * len(self.shards) // len(np.unique(self.shards))
        pool = ThreadPoolExecutor(FETCHING, thread_name_prefix="shards")
        try:
            for number, place in enumerate(places):
                while waiting and waiting[0][0] <= number + ahead:
                    pool.submit(self.fetch, waiting.popleft()[1])  # who needs it and finds it missing reports why
                yield place
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _first_uses(self, places: list[int]) -> deque[tuple[int, int]]:
        """In the order of their first samples, the position of that sample and the shard."""
        shards, first = np.unique(self.shards[np.array(places, dtype=np.int64) % len(self.shards)], return_index=True)
        by_use = np.argsort(first)
        return deque(zip(first[by_use].tolist(), shards[by_use].tolist(), strict=True))
