"""`design-train benchmark KIND`: what a binary network takes beside the float one, in training or as exported files."""

import importlib
from collections.abc import Sequence

KINDS = {
    "training": "design_lightning.commands.benchmark_training",
    "inference": "design_lightning.commands.benchmark_inference",
}
"""From a kind of benchmark to the module whose `main(command, args)` runs it."""


def main(command: str, args: Sequence[str]) -> None:
    """Runs the benchmark that the first argument names; `training` if that is an option."""
    if args and args[0] in ("-h", "--help"):
        print(f"usage: design-train {command} {{{','.join(KINDS)}}} [options]")
        print(f"a benchmark's options:    design-train {command} inference --help")
        return
    if args and not args[0].startswith("-"):
        kind, args = args[0], args[1:]
    else:
        kind = "training"
    if kind not in KINDS:
        raise ValueError(f"unknown benchmark {kind!r}: use one of {', '.join(KINDS)}")
    importlib.import_module(KINDS[kind]).main(f"{command} {kind}", args)
