"""What mkdocs runs while it builds the pages: the tables of recipes from configs/, and the folder that the API is read from.

A page that holds `<!-- recipes -->` or `<!-- overlays -->` gets the table in its place, so that neither can go stale.
"""

import shutil
from pathlib import Path
from typing import Any

from design_lightning.commands.recipes import Recipe, recipes

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "build" / "docs_sources" / "design_lightning"


def on_config(config: Any) -> Any:
    """Lays the package out as it is imported: callbacks/ and configs/ stand at the top of the repository."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    only_code = shutil.ignore_patterns("__pycache__", "fashion_mnist_subset")
    shutil.copytree(ROOT / "design_lightning", SOURCES, ignore=only_code)
    shutil.copytree(ROOT / "callbacks", SOURCES / "callbacks", ignore=only_code)
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables where a page asks for them."""
    found = recipes()
    markdown = markdown.replace("<!-- recipes -->", recipe_table([r for r in found.values() if not r.overlay]))
    return markdown.replace("<!-- overlays -->", overlay_table([r for r in found.values() if r.overlay]))


def recipe_table(found: list[Recipe]) -> str:
    """A row for each recipe."""
    rows = ["| recipe | network and data | source | published | measured |", "|---|---|---|---|---|"]
    for recipe in found:
        facts = recipe.facts
        what = f"{facts['network']}; {facts['data']}"
        cells = (f"`{recipe.name}`", what, facts["source"], facts["published"] or "-", facts["measured"] or "-")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def overlay_table(found: list[Recipe]) -> str:
    """A row for each overlay."""
    rows = [f"| `{recipe.name}` | {recipe.overlay} |" for recipe in found]
    return "\n".join(["| overlay | what it changes |", "|---|---|", *rows])
