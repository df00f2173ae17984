"""`search_kernels`: from images, or a model's pre-activations, to the kernels that score best on them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from design_lightning.kernels.search.config import SearchConfig
from design_lightning.kernels.search.images import ImageFolder, ImageTensor
from design_lightning.kernels.search.maps import Maps, SimulatedMaps
from design_lightning.kernels.search.moments import Moments, collect_moments_of_shapes
from design_lightning.kernels.search.ranking import Progress, rank_candidates
from design_lightning.kernels.search.result import SearchResult

Source = str | Path | Tensor | ImageFolder | ImageTensor | Maps


def search_kernels(
    images: Source, config: SearchConfig | None = None, progress: Progress | None = None
) -> SearchResult:
    """Searches for the threshold kernel that scores best on images, as the authors of DeSign designed theirs.

    Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.

    Args:
        images: a folder; images [N, H, W], [N, 1, H, W] or [N, 3, H, W] (uint8, or real numbers in [0, 1]); or `Maps` in
            place of simulated ones, such as `Preactivations` of a model.
        config: how to search.
        progress: called with a stage (`deviation`, `images`, `candidates`), how much of it is done, and how much there is.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
        ValueError: if the images do not serve, or every candidate has an entry that never switches.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = torch.rand(8, 16, 16, generator=generator)
    >>> search_kernels(noise, SearchConfig(ties="off", filters=4)).best.pattern
    '0 5; 5 0'
    """
    config = config or SearchConfig()
    shape = (config.rows, config.columns)
    moments, maps = _gather(images, config, [shape, *(kernel.shape[1:] for kernel in config.others)], progress)
    return rank_candidates(moments.pop(shape), config, maps.units, maps.image_count, progress, moments)


def search_per_unit(
    images: Source, config: SearchConfig | None = None, progress: Progress | None = None
) -> dict[str, SearchResult]:
    """A search for each unit by itself, such as each layer of a model, after one pass over the images; as `search_kernels`.

    Published kernels of other rows and columns are left without scores.
    """
    config = config or SearchConfig()
    shape = (config.rows, config.columns)
    moments, maps = _gather(images, config, [shape], progress)
    return {
        unit: rank_candidates(moments[shape].unit(number), config, [unit], maps.image_count, progress)
        for number, unit in enumerate(maps.units)
    }


def _gather(
    images: Source, config: SearchConfig, shapes: Sequence[tuple[int, int]], progress: Progress | None
) -> tuple[dict[tuple[int, int], Moments], Maps]:
    """The moments of all maps for kernels of some (rows, columns), and where they came from."""
    if isinstance(images, str | Path):
        images = ImageFolder(images, seed=config.seed)
    if isinstance(images, Tensor):
        images = ImageTensor(images)
    alphabet = config.alphabet
    maps: Maps
    if isinstance(images, ImageFolder | ImageTensor):
        seeds = range(config.seed, config.seed + config.seeds)
        maps = SimulatedMaps(
            images, alphabet, config.reference, config.filters, seeds, config.device, _stage(progress, "deviation")
        )
    else:
        maps = images
        if config.reference != "relu" or not alphabet.standardised:
            raise ValueError(
                f"reference {config.reference!r} and levels {config.levels!r}: maps of a model go with the reference 'relu' "
                "and with levels in standard deviations, 'published' or 'exact'"
            )
    moments = collect_moments_of_shapes(
        maps,
        shapes,
        alphabet.values,
        ties=config.ties == "on",
        groups=config.groups,
        exact_bins=config.reference == "relu",
        progress=_stage(progress, "images"),
    )
    return moments, maps


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(stage, done, total)) if progress else None
