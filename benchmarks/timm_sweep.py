"""Binarizes every architecture of timm, and says of each whether it works: benchmarks/results/timm_sweep.csv.

    python benchmarks/timm_sweep.py                     # goes on where it stopped
    python benchmarks/timm_sweep.py --shard 1/4         # the first of four processes, which share the table
    python benchmarks/timm_sweep.py --only 'resnet*'    # some of them, again

What is asked of each architecture: `benchmarks/zoo.py`.
"""

import argparse
import csv
import fcntl
import fnmatch
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import timm
import torch
from zoo import Row, as_dict, check_architecture

RESULTS = Path(__file__).parent / "results" / "timm_sweep.csv"
COLUMNS = [field.name for field in fields(Row)]


def read(path: Path) -> dict[str, dict[str, str]]:
    """The rows by name."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def add(path: Path, row: Row) -> None:
    """Puts a row into the table, in its place; other processes may do the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read(path)
        rows[row.name] = {key: str(value) for key, value in as_dict(row).items()}
        aside = path.with_suffix(".part")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))
        aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="take each N-th architecture, from the I-th")
    parser.add_argument("--only", metavar="GLOB", help="names that match, even if they passed before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    index, count = (int(part) for part in arguments.shard.split("/"))
    if not 1 <= index <= count:
        parser.error(f"--shard {arguments.shard}: I is one of 1 to N")
    passed = {
        n for n, row in read(arguments.out).items() if row["status"] == "pass" and row["timm"] == timm.__version__
    }
    names = [n for n in timm.list_models() if fnmatch.fnmatchcase(n, arguments.only or "*")][index - 1 :: count]
    results: Counter[str] = Counter()
    for name in names:
        if name in passed and not arguments.only:
            results["passed before"] += 1
            continue
        start = time.perf_counter()
        row = check_architecture(name)
        add(arguments.out, row)
        results[row.status] += 1
        print(f"{name}: {row.status} in {time.perf_counter() - start:.0f} s {row.reason}".rstrip(), flush=True)
    print(", ".join(f"{n} {status}" for status, n in results.items()) or "no architecture has such a name")


if __name__ == "__main__":
    main()
