"""Which samples go where and when: splits, the order of an epoch and its place in it, each sample once over all processes."""

import signal
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from design_lightning.data.reading import ImageLoader

IGNORE_LABEL = -100
"""The label of padding: a model leaves samples with a negative label out of its loss and metrics."""


class PaddedEvalSampler(DistributedSampler):
    """Deals samples to processes, each sample once, the same number to each.

    Lightning's sampler evens out the processes by repeating samples, which then count twice in the metrics. To deal
    uneven numbers instead would hang: DDP broadcasts buffers in every forward. This one deals indices past the end of
    the dataset, which `PaddedBatches` answers with `IGNORE_LABEL`.

    Args:
        dataset: of N samples.
        num_replicas: the number of processes.
        rank: of this process.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False, drop_last=False)

    def __iter__(self) -> Iterator[int]:
        # One by one in turn, so that the first batches of all processes are those of one process (`limit_val_batches`).
        return iter(range(self.rank, self.total_size, self.num_replicas))


class EpochSampler(DistributedSampler):
    """Deals shuffled samples to processes, and tells the epoch with each: it yields `epoch * N + index`.

    So what a data set draws for a sample can depend on the epoch, in a worker that knows nothing of it; see
    `SeededBatches`.

    Args:
        dataset: of N samples.
        num_replicas: the number of processes.
        rank: of this process.
        seed: of the order, together with the epoch that `set_epoch` sets.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.start = 0
        """How many samples the next pass leaves out, which were seen before a resume."""

    def order(self) -> Sequence[int]:
        """The indices of this process's samples in this epoch."""
        return list(super().__iter__())

    def __iter__(self) -> Iterator[int]:
        offset = self.epoch * len(cast(Sized, self.dataset))
        order = self.order()[self.start :]
        self.start = 0
        return (offset + index for index in order)


class ResumableLoader(ImageLoader):
    """A loader over an `EpochSampler` that can start within an epoch.

    Its workers start at the first batch, and Lightning sets the epoch before. Where a run stood is kept by its data module, which
    knows how many batches were trained on; a loader knows only how many it handed out.
    """

    def start_behind(self, batches: int) -> None:
        """Has the next iteration leave out so many batches."""
        cast(EpochSampler, self.sampler).start = batches * cast(int, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Nothing; it tells Lightning that a run over this loader can be resumed within an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def leave_sigterm_to_parent(worker: int) -> None:
    """For a loader's worker: has it outlive a SIGTERM that its process outlives.

    SLURM sends SIGTERM to all processes of a job, and a worker that dies ends the run before it is saved. Where a process has a
    handler, as within `fit`, it ends its workers itself.
    """
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stratified_split(
    labels: Tensor, val_size: int | float, seed: int, class_names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Splits so that every class has the share in the validation part that it has in the whole.

    Args:
        labels: int64 `[N]`.
        val_size: the number of validation samples, or a fraction below 1.
        seed: of the choice within each class.
        class_names: named in errors.

    Returns:
        The indices of the training part and of the validation part, int64, each ascending.

    Raises:
        ValueError: if a class would have no sample in one of the parts.
    """
    total, classes = len(labels), len(class_names)
    wanted = val_size if isinstance(val_size, int) else round(val_size * total)
    if not classes <= wanted <= total - classes:
        raise ValueError(
            f"val_size={val_size} takes {wanted} of {total} training images; with {classes} classes it must leave at least one "
            f"image a class on both sides: a number from {classes} to {total - classes}, or a fraction"
        )
    counts = torch.bincount(labels, minlength=classes)
    share = counts.double() * wanted / total
    quota = share.long()
    # Largest remainders first; a stable sort, so that the split depends on nothing but the labels and the seed.
    quota[(quota - share).argsort(stable=True)[: wanted - int(quota.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(total, dtype=torch.bool)
    for label, (count, take) in enumerate(zip(counts.tolist(), quota.tolist(), strict=True)):
        if not 0 < take < count:
            raise ValueError(
                f"val_size={val_size} would put {take} of the {count} images of class {class_names[label]!r} into validation; "
                "choose one that leaves every class at least one image on both sides"
            )
        members = (labels == label).nonzero()[:, 0]
        held_out[members[torch.randperm(count, generator=generator)[:take]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
