"""`design-train shard`: images in folders as WebDataset shards, an index for shards that others made, and a check of either."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from design_lightning.cli import fail
from design_lightning.commands.options import Options


def main(command: str, args: Sequence[str]) -> None:
    """Makes, indexes or checks shards."""
    options = Options(
        command,
        "Packs an image folder (train/<class>/<image>, val/...) into WebDataset shards, for `--data WebDataset "
        "--data.root OUT`. What was stopped goes on where it was.",
    )
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--root", help="the image folder")
    what.add_argument(
        "--tars",
        nargs="+",
        metavar="SPLIT=TARS",
        help="index shards that are there, paths or URLs: 'train=DIR/train-{0000..1023}.tar' 'val=DIR/val-{00..63}.tar'",
    )
    what.add_argument("--check", metavar="DIR", help="compare a set of shards, a folder or URL, with its index")
    options.add_argument("--out", help="the folder for the shards or the index")
    options.add_argument("--images", type=int, default=1000, help="images a shard (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the order of training images (%(default)s)")
    options.add_argument("--class_names", help="with --tars: a file with a name a line, in the order of the labels")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    given = options.parse_args(args)
    if given.check:
        _check(given.check, given.workers)
        return
    if not given.out:
        options.error("--out is missing: the folder for the result")
    out = Path(given.out)
    from design_lightning.data.shards.making import index_shards, make_shards

    with _progress("shards") as advance:
        if given.root:
            index = make_shards(Path(given.root), out, given.images, given.workers, given.seed, advance)
        else:
            names = None if given.class_names is None else Path(given.class_names).read_text().split("\n")
            names = None if names is None else [name for name in names if name]
            index = index_shards(_splits(given.tars), out, names, given.workers, advance)
    for split, stored in index.splits.items():
        size = sum(shard.bytes for shard in stored.shards)
        print(f"{split}: {len(stored.shards)} shards, {size / 1e9:.3g} GB")
    print(f"{len(index.class_names)} classes; index: {out / 'index.json'}")
    print(f"next: design-train fit --config ... --data WebDataset --data.root {out}")


def _splits(given: Sequence[str]) -> dict[str, list[str]]:
    from webdataset.shardlists import expand_urls

    splits: dict[str, list[str]] = {}
    for text in given:
        split, _, tars = text.partition("=")
        if not tars or split not in ("train", "val", "test"):
            raise ValueError(f"--tars {text}: expected train=, val= or test= and the shards")
        splits.setdefault(split, []).extend(expand_urls(tars))
    return splits


def _check(root: str, workers: int) -> None:
    from design_lightning.data.shards.making import damaged_files
    from design_lightning.data.shards.store import ShardStore

    store = ShardStore(root)
    with _progress("files") as advance:
        damaged = damaged_files(store, workers, advance)
    if damaged:
        fail(f"{len(damaged)} files of {root} are missing or damaged: {', '.join(damaged)}")
    print(f"every file of {root} is as it was made")


@contextmanager
def _progress(unit: str) -> Iterator:
    """A bar on a terminal, silence elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
