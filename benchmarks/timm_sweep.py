"""Binarizes every architecture of timm, and says of each whether it works: benchmarks/results/timm_sweep.csv.

    python benchmarks/timm_sweep.py                     # goes on where it stopped
    python benchmarks/timm_sweep.py --shard 1/4         # the first of four processes, which share the table
    python benchmarks/timm_sweep.py --only 'resnet*'    # some of them, again
    python benchmarks/timm_sweep.py --any-code          # goes on, and lets rows of earlier code count

A row counts as done if it passed with this version of timm and this code (the column `code`: a hash over the sources of kernels,
layers, surgery and checks). The exit code is 1 if a row failed. What is asked of each architecture: `benchmarks/zoo`.
"""

import argparse
import csv
import fcntl
import fnmatch
import hashlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import timm
import torch
from zoo import CODE, Row, architectures, check_architecture

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
    with _locked(path):
        rows = read(path)
        rows[row.name] = {key: str(value) for key, value in asdict(row).items()}
        aside = path.with_suffix(".part")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))
        aside.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from the table; the lock is a file in the system's folder for such."""
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"timm_sweep_{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def passed(path: Path, any_code: bool = False) -> set[str]:
    """The architectures that need not run again."""
    codes = {row["name"]: row.get("code") for row in read(path).values() if _passed_with_this_timm(row)}
    return {name for name, code in codes.items() if any_code or code == CODE}


def _passed_with_this_timm(row: dict[str, str]) -> bool:
    return row["status"] == "pass" and row["timm"] == timm.__version__


def shard(text: str) -> tuple[int, int]:
    """I and N of `I/N`."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/4") from None
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: I is one of 1 to N")
    return index, count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shard", type=shard, default=(1, 1), metavar="I/N", help="take each N-th architecture, from the I-th"
    )
    parser.add_argument("--only", metavar="GLOB", help="names that match, even if they passed before")
    parser.add_argument("--any-code", action="store_true", help="skip what passed with this timm, whatever the code")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of this process; default: %(default)s")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    index, count = given.shard
    names = [n for n in architectures() if fnmatch.fnmatchcase(n, given.only or "*")]
    if not names:
        parser.error(f"no architecture has such a name: {given.only!r}")
    done = set() if given.only else passed(given.out, given.any_code)
    results: Counter[str] = Counter()
    for name in names[index - 1 :: count]:
        if name in done:
            results["passed before"] += 1
            continue
        start = time.perf_counter()
        row = check_architecture(name)
        add(given.out, row)
        results[row.status] += 1
        print(f"{name}: {row.status} in {time.perf_counter() - start:.0f} s {row.reason}".rstrip(), flush=True)
    print(", ".join(f"{n} {status}" for status, n in results.items()) or "nothing falls to this shard")
    return int(results["fail"] > 0)


if __name__ == "__main__":
    sys.exit(main())
