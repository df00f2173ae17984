"""Makes the subset of Fashion-MNIST that the package embeds, the same bytes every time.

    apt-get install dataset-fashion-mnist
    python benchmarks/make_fashion_mnist_subset.py

Takes 600 training images a class from the 60,000, and 100 validation images a class from the 10,000 test images.
"""

import argparse
from pathlib import Path

import numpy as np

from design_lightning.data.idx import read_idx, write_idx

PER_CLASS = {"train": 600, "t10k": 100}
EMBEDDED = Path(__file__).resolve().parents[1] / "design_lightning" / "data" / "fashion_mnist_subset"


def make_subset(source: Path, output: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    output.mkdir(parents=True, exist_ok=True)
    for prefix, per_class in PER_CLASS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        members = [np.flatnonzero(labels == label) for label in range(10)]
        chosen = np.sort(np.concatenate([rng.choice(indices, per_class, replace=False) for indices in members]))
        write_idx(output / f"{prefix}-images-idx3-ubyte.gz", images[chosen])
        write_idx(output / f"{prefix}-labels-idx1-ubyte.gz", labels[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the four IDX files"
    )
    parser.add_argument("--output", type=Path, default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_subset(arguments.source, arguments.output, arguments.seed)
    size = sum(path.stat().st_size for path in arguments.output.glob("*.gz"))
    print(f"wrote {size:,} bytes to {arguments.output}")


if __name__ == "__main__":
    main()
