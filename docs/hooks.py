"""What mkdocs runs while it builds: tables from configs/, and the folder that the API is read from.

A page that holds `<!-- table: recipes -->` or `<!-- table: overlays -->` gets the table in its place: none can go stale. The table
of docs/export.md stands in the page, so that it is read where no site is built; a test compares it with `inference_table`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from design_lightning.commands.recipes import Recipe, recipes

ROOT = Path(__file__).resolve().parents[1]
INFERENCE = ROOT / "benchmarks" / "results" / "inference.json"
SOURCES = ROOT / "build" / "docs_sources" / "design_lightning"


def on_startup(**_: Any) -> None:
    """Lays the package out as it is imported (callbacks/ stands at the top of the repository), before mkdocstrings looks for it."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    only_code = shutil.ignore_patterns("__pycache__", "fashion_mnist_subset")
    shutil.copytree(ROOT / "design_lightning", SOURCES, ignore=only_code)
    shutil.copytree(ROOT / "callbacks", SOURCES / "callbacks", ignore=only_code)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables where a page asks for them."""
    found = recipes().values()
    tables = {
        "recipes": lambda: recipe_table([recipe for recipe in found if not recipe.overlay]),
        "overlays": lambda: overlay_table([recipe for recipe in found if recipe.overlay]),
    }
    for name, table in tables.items():
        if (place := f"<!-- table: {name} -->") in markdown:
            markdown = markdown.replace(place, table())
    return markdown


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


def inference_table() -> str:
    """A row for each network, timed on one thread, and below it how it was measured: the table of docs/export.md."""
    measured = json.loads(INFERENCE.read_text(encoding="utf-8"))
    config, machine = measured["config"], measured["machine"]
    rows = [
        "| network | MB | ms | quartiles | times as fast as float in ONNX Runtime "
        "| as float in OpenVINO | as int8 in OpenVINO |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["results"]:
        if row["threads"] == 1:
            times = (f"{row['speedup'][twin]:.2f}" for twin in ("float_onnx", "float_openvino", "float_openvino_int8"))
            quartiles = f"{row['low']:.1f} to {row['high']:.1f}"
            cells = (f"`{row['name']}`", f"{row['bytes'] / 1e6:.2f}", f"{row['median']:.1f}", quartiles, *times)
            rows.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino"))
    how = (
        f"{config['model']}, {config['classes']:,} classes, one image, one thread of an {machine['processor']}, {versions}; "
        f"medians of {config['rounds']} rounds in which all networks took turns: `{measured['command']}`."
    )
    return "\n".join([*rows, "", how])
