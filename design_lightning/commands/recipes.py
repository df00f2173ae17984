"""`design-train recipes`: the packaged configurations, and how `--config NAME` finds one.

A recipe is a whole configuration. An overlay changes a few values of a recipe, and is given after it:

    design-train fit --config RECIPE --config OVERLAY
"""

import argparse
import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from design_lightning._names import did_you_mean

FIELDS = ("network", "data", "source", "published", "measured")


@dataclass(frozen=True)
class Recipe:
    """A packaged configuration.

    Args:
        name: what `--config` takes: the path below `configs/` without `.yaml`.
        text: the file's content. Lines `# network: ...`, `# data:`, `# source:`, `# published:` and `# measured:` at its top
            describe a recipe, a line `# overlay: ...` an overlay.
    """

    name: str
    text: str

    @property
    def facts(self) -> dict[str, str]:
        """What the comments at the top say under each of `FIELDS`; empty where they do not."""
        found = self._comments
        return {field: found.get(field, "") for field in FIELDS}

    @property
    def overlay(self) -> str:
        """What an overlay changes; empty for a recipe."""
        return self._comments.get("overlay", "")

    @property
    def _comments(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            key, _, value = line.lstrip("# ").partition(":")
            found.setdefault(key, value.strip())
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
        ValueError: if the file is no text.
    """
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the configuration {name!r} is no text: byte {error.start} is no UTF-8") from None
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
    from rich.padding import Padding
    from rich.text import Text

    found = recipes()
    name, figure = (max(map(len, texts)) for texts in (found, (r.facts["published"] for r in found.values())))
    console = Console(highlight=False)

    def line(*cells: str, style: str = "") -> None:
        console.print(Text(f"{cells[0]:<{name}}  {cells[1]:<{figure}}  {cells[2]}".rstrip(), style=style))

    # The facts stand below their recipe: as columns, the sources would be broken in mid-word at 80 columns.
    line("recipe", "published", "measured", style="bold")
    for recipe in found.values():
        facts = recipe.facts
        if recipe.overlay:
            line(recipe.name, "(overlay)", "")
            text = recipe.overlay
        else:
            line(recipe.name, facts.pop("published"), facts.pop("measured"))
            text = "\n".join(f"{field}: {fact}" for field, fact in facts.items())
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False))
    console.print("\ntop-1 in per cent; published: by the source named; measured: by us, with the file")
    console.print("train one with: design-train fit --config RECIPE [--config OVERLAY]", markup=False)
