"""Times the search for threshold kernels, and says where the published ones stand.

Writes benchmarks/results/kernel_search.csv and kernel_ranks.csv.

    python -m zipfile -e ../shared/data/cifar10-imagefolder.zip data/
    python benchmarks/kernel_search.py --images data/cifar10/train

Every search is over 1,000 images and 16 filters, reading the files included. The ranks are among the kernels kept, or among all
where the published kernel is excluded itself (column `excluded`).
"""

import argparse
import csv
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import design_lightning as dl
from design_lightning.kernels.search import SCORES, ImageFolder, SearchConfig, SearchResult, search_kernels

RESULTS = Path(__file__).parent / "results"
SEARCHES = {
    "2x2": SearchConfig("2x2"),
    "2x2, grey image": SearchConfig("2x2", reference="grey"),
    "2x2, ties off": SearchConfig("2x2", ties="off"),
    "2x2, nothing excluded": SearchConfig("2x2", min_share=0),
    "2x2, published levels": SearchConfig("2x2", levels="published"),
    "2x2x2, published levels": SearchConfig("2x2", levels="published", family="complement", min_share=0.001),
    "2x2x4, published levels": SearchConfig("2x2", levels="published", family="shift", min_share=0.001),
    "3x3 symmetric, published levels": SearchConfig("3x3", levels="published", symmetric=True),
    "3x3": SearchConfig("3x3"),
    "3x3, published levels": SearchConfig("3x3", levels="published"),
}


@dataclass(frozen=True)
class Timing:
    """A row of `kernel_search.csv`."""

    search: str
    candidates: int
    kept: int
    images: int
    filters: int
    seconds: float
    best_tv: str
    processor: str
    threads: int
    python: str
    torch: str
    design_lightning: str


def ranks(search: str, found: SearchResult) -> list[dict[str, str | int]]:
    """The rows of `kernel_ranks.csv`: a published kernel each."""
    return [
        {
            "search": search,
            "kernel": candidate.kernel.name,
            "of": found.candidates if candidate.excluded else found.kept,
            **{name: candidate.ranks[name] for name in SCORES},
            "excluded": candidate.excluded,
        }
        for candidate in found.published
    ]


def write(path: Path, rows: list[dict[str, str | int]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("data/cifar10/train"))
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(SEARCHES), default=list(SEARCHES))
    arguments = parser.parse_args()
    images = ImageFolder(arguments.images, arguments.limit)
    timings, places = [], []
    for name in arguments.only:
        config, start = SEARCHES[name], time.perf_counter()
        found = search_kernels(images, config)
        timing = Timing(
            search=name,
            candidates=found.candidates,
            kept=found.kept,
            images=found.images,
            filters=config.filters,
            seconds=round(time.perf_counter() - start, 1),
            best_tv=found.best.pattern.partition(" | ")[0],
            processor=platform.machine(),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            design_lightning=dl.__version__,
        )
        print(f"{name}: {timing.seconds} s, best {timing.best_tv}", flush=True)
        timings.append(asdict(timing))
        places += ranks(name, found)
    RESULTS.mkdir(exist_ok=True)
    write(RESULTS / "kernel_search.csv", timings)
    write(RESULTS / "kernel_ranks.csv", places)


if __name__ == "__main__":
    main()
