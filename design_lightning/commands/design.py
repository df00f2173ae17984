"""`design-train design`: the threshold kernel that scores best on images, or on a model's own pre-activations."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from design_lightning.commands.options import Options

if TYPE_CHECKING:
    from design_lightning.kernels.search import Maps, SearchConfig, SearchResult

    Progress = Callable[[str, int, int], None]

SCORES = ("tv", "weighted_tv", "mse", "psnr", "weighted_psnr", "residual_correlation", "mutual_information")


def _options(command: str) -> Options:
    options = Options(
        command, "Searches all threshold kernels of a size for the one that scores best on images; writes it as JSON."
    )
    add = options.add_argument
    add("--images", required=True, help="a folder of images; subfolders count")
    add("--limit", type=int, default=1000, help="how many of them, taken at random (%(default)s)")
    add("--size", default="2x2", help="rows and columns: 2x2, 3x3, 1x4, ... (%(default)s)")
    add(
        "--score",
        choices=SCORES,
        default="tv",
        metavar="SCORE",
        help=f"what ranks them: {', '.join(SCORES)} (%(default)s)",
    )
    add(
        "--reference",
        choices=("relu", "grey"),
        help="of scores that compare with it: the map after ReLU, or the image (relu)",
    )
    add("--levels", help="codes, published, exact, or numbers 0.3,0.6,... (codes; with --model, published)")
    add(
        "--ties", choices=("on", "off"), default="on", help="the bit of a value that equals its threshold (%(default)s)"
    )
    add(
        "--min_share",
        type=float,
        default=0.01,
        help="exclude a kernel if an entry's rarer bit is rarer (%(default)s; 0: none)",
    )
    add("--symmetric", action="store_true", help="of 3x3, only kernels with corners alike and edges alike")
    add(
        "--family",
        choices=("none", "complement", "shift"),
        default="none",
        help="3-D kernels: a slice and its complement, or three shifts of it (%(default)s)",
    )
    add("--filters", type=int, default=16, help="random filters a seed (%(default)s)")
    add("--seeds", type=int, default=1, help="how many seeds of filters (%(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        help="the first of them; also of the images taken and the bootstrap (%(default)s)",
    )
    add("--groups", type=int, default=20, help="of images, for the standard errors (%(default)s)")
    add("--keep", type=int, default=10, help="how many of the best to show (%(default)s)")
    add("--device", default="cpu", help="where to compute: cpu, cuda, ... (%(default)s)")
    add("--model", help="a network of timm, whose own pre-activations take the place of simulated maps")
    add("--checkpoint", help="its weights: a .ckpt of design-train fit or a .safetensors of dl.save")
    add("--image_size", type=int, help="pixels of the network's input (those that it was trained with)")
    add("--per_layer", action="store_true", help="a kernel for each binary layer of the network, written as overrides")
    add("--out", help="the file to write (kernel.json; with --per_layer, overrides.yaml)")
    add("--figure", help="a picture of the outcome to write: .png, .pdf or .svg")
    add("--image", help="the image in it (the first one taken)")
    add("--json", action="store_true", help="print JSON in place of the tables")
    return options


def main(command: str, args: Sequence[str]) -> None:
    """Runs the search."""
    given = _options(command).parse_args(args)
    from design_lightning.kernels.search import ImageFolder, check_figure, read_grey, search_kernels

    from_model = bool(given.model or given.checkpoint)
    _check(given, from_model)
    if given.figure:
        check_figure(given.figure)
    config = _config(given, from_model)
    images = ImageFolder(given.images, given.limit, config.seed)
    pictured = read_grey(given.image or images.paths[0]) if given.figure else None
    with _progress(given.json) as progress:
        source: ImageFolder | Maps = images
        if from_model:
            from design_lightning.commands.design_from_model import preactivations

            source = preactivations(given.model, given.checkpoint, given.image_size, images.paths, config)
        if given.per_layer:
            from design_lightning.kernels.search import search_per_unit

            found = search_per_unit(source, config, progress)
        else:
            found = {"": search_kernels(source, config, progress)}
    _write(found, given.out)
    if pictured is not None:
        next(iter(found.values())).draw(given.figure, pictured)
    _print(found, given)


def _check(given: argparse.Namespace, from_model: bool) -> None:
    """Refuses options that would be without effect, and gives `out` its default."""
    needs = [name for name in ("image_size", "per_layer") if getattr(given, name) and not from_model]
    if needs:
        raise ValueError(f"--{needs[0]} goes with --model or --checkpoint")
    if from_model and given.reference == "grey":
        raise ValueError("--reference grey goes with simulated maps: leave it out with --model")
    if from_model and given.levels == "codes":
        raise ValueError("--levels codes goes with simulated maps: use published or exact with --model")
    if given.per_layer and given.figure:
        raise ValueError("--figure shows one kernel: leave out --per_layer")
    if given.image and not given.figure:
        raise ValueError("--image is what --figure shows: give --figure, too")
    suffix = ".yaml" if given.per_layer else ".json"
    given.out = given.out or ("overrides.yaml" if given.per_layer else "kernel.json")
    if Path(given.out).suffix != suffix:
        raise ValueError(f"--out is {given.out!r}, but what is written is a {suffix} file")
    if Path(given.out).is_dir():
        raise ValueError(f"--out {given.out!r} is a folder: give the name of a file")
    folder = next(parent for parent in Path(given.out).absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {given.out!r} cannot be written: {str(folder)!r} is no folder that one may write to")


def _config(given: argparse.Namespace, from_model: bool) -> "SearchConfig":
    from design_lightning.kernels.search import SearchConfig

    levels: Any = given.levels or ("published" if from_model else "codes")
    if "," in levels:
        try:
            levels = tuple(float(level) for level in levels.split(","))
        except ValueError:
            message = f"--levels {given.levels!r}: give numbers with commas between, such as 0.3,0.6,1.0"
            raise ValueError(message) from None
    names = [
        "size",
        "score",
        "ties",
        "min_share",
        "symmetric",
        "family",
        "filters",
        "seeds",
        "seed",
        "groups",
        "keep",
        "device",
    ]
    return SearchConfig(
        levels=levels, reference=given.reference or "relu", **{name: getattr(given, name) for name in names}
    )


@contextmanager
def _progress(quiet: bool) -> Iterator["Progress | None"]:
    """A bar for each stage on standard error, where a person looks at it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), expand=True) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _write(found: dict[str, "SearchResult"], out: str) -> None:
    """A kernel as JSON, or a kernel a layer as overrides of a configuration."""
    if "" in found:
        text = found[""].best.kernel.to_json() + "\n"
    else:
        import yaml

        kernels = {
            layer: {"kernel": [[list(row) for row in plane] for plane in result.best.kernel.levels]}
            for layer, result in found.items()
        }
        text = yaml.safe_dump({"overrides": kernels}, sort_keys=False, default_flow_style=None, width=120)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out!r} cannot be written: {error}") from error


def _print(found: dict[str, "SearchResult"], given: argparse.Namespace) -> None:
    import json

    if given.json:
        one = {layer: json.loads(result.to_json()) for layer, result in found.items()}
        print(json.dumps(one.get("", one), indent=2))
        return
    from rich.console import Console

    from design_lightning.kernels.search.tables import layer_table

    console = Console(highlight=False)
    console.print(found[""].table() if "" in found else layer_table(found))
    figure = f" and {given.figure}" if given.figure else ""
    print(f"\nwritten: {given.out}{figure}")
    use = f"kernel: {given.out}" if "" in found else f"the block of {given.out}"
    print(f"use it: {use}, below `binary:` of a configuration")
