"""`design-train recipes`: the packaged configurations, and how `--config NAME` finds one."""

import argparse
import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from design_lightning._names import did_you_mean

FIELDS = ("network", "data", "source", "published")


@dataclass(frozen=True)
class Recipe:
    """A packaged configuration.

    Args:
        name: what `--config` takes: the path below `configs/` without `.yaml`.
        text: the file's content. Lines `# network: ...`, `# data:`, `# source:` and `# published:` at its top describe it.
    """

    name: str
    text: str

    @property
    def facts(self) -> dict[str, str]:
        """What the comments at the top say under each of `FIELDS`; empty where they do not."""
        found = dict.fromkeys(FIELDS, "")
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            key, _, value = line.lstrip("# ").partition(":")
            if key in found:
                found[key] = value.strip()
        return found


def recipes() -> dict[str, Recipe]:
    """Every packaged configuration, by name."""
    return {name: Recipe(name, file.read_text(encoding="utf-8")) for name, file in _files()}


def _files() -> Iterator[tuple[str, Traversable]]:
    def below(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir() and not item.name.startswith("_"):
                yield from below(item, f"{prefix}{item.name}/")
            elif item.name.endswith(".yaml"):
                yield f"{prefix}{item.name.removesuffix('.yaml')}", item

    yield from below(importlib.resources.files("design_lightning.configs"), "")


def find_config(name: str) -> str:
    """The path of a configuration: a file of that name, else the packaged recipe.

    Raises:
        FileNotFoundError: if there is neither; names the nearest recipe.
    """
    if Path(name).is_file():
        return name
    files = dict(_files())
    known = name.removesuffix(".yaml").removeprefix("configs/")
    if known not in files:
        raise FileNotFoundError(
            f"no configuration {name!r}, neither a file nor a packaged recipe: {did_you_mean(known, files)}"
        )
    return str(files[known])


def main(command: str, args: Sequence[str]) -> None:
    """Prints the recipes."""
    parser = argparse.ArgumentParser(prog=f"design-train {command}", description="Lists the packaged configurations.")
    parser.parse_args(args)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A line for each fact: as columns, the sources would be broken in mid-word at 80 columns.
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains, and where that comes from")
    for recipe in recipes().values():
        table.add_row(recipe.name, Text("\n".join(f"{field}: {fact}" for field, fact in recipe.facts.items())))
    console = Console()
    console.print(table)
    console.print("\ntrain one with: design-train fit --config RECIPE", highlight=False)
