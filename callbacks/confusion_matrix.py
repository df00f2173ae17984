"""The test's outcome class by class: accuracy and confusion matrix as a table, a CSV and a picture."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, Group
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor

FEW = 20
"""Up to so many classes, tables and pictures show each by name."""

SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
"""The marks of the picture's colour scale."""


class ConfusionMatrixReport(Callback):
    """After `test`, prints the accuracy of each class and writes `confusion.csv`, `confusion.png` and `per_class.csv`.

    The LightningModule gives the matrix as `test_confusion` [K, K] (rows: the true class), and may give `class_names`.
    With more than twenty classes the terminal shows the ten best and the ten worst, and says so. It shows the matrix where
    that fits.

    Args:
        folder: where the files go; the log folder of the run if null.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        log_dir = trainer.log_dir  # asks the other processes, so all of them have to come here
        matrix = getattr(pl_module, "test_confusion", None)
        if not isinstance(matrix, Tensor) or not trainer.is_global_zero:
            return
        names = getattr(pl_module, "class_names", None) or [str(i) for i in range(len(matrix))]
        console = Console()
        console.print(per_class_table(matrix, names))
        if len(names) <= FEW:
            table = confusion_table(matrix, names)
            if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
                console.print(table)
        folder = Path(self.folder or log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(matrix, names, folder)
        draw(matrix, names, folder / "confusion.png")
        print(f"written: {folder}/confusion.png, confusion.csv, per_class.csv")


def per_class_accuracy(matrix: Tensor) -> list[float]:
    """The share of each true class that was recognised; NaN for a class without images."""
    counts = matrix.sum(1)
    return [float(matrix[i, i]) / float(n) if n else float("nan") for i, n in enumerate(counts)]


def per_class_table(matrix: Tensor, names: Sequence[str]) -> Group:
    """Accuracy, number of images and commonest mistake of each class, the best first, those without images last."""
    accuracies = per_class_accuracy(matrix)
    tested = sorted((i for i, a in enumerate(accuracies) if not math.isnan(a)), key=lambda i: -accuracies[i])
    untested = [i for i, a in enumerate(accuracies) if math.isnan(a)]
    title = "accuracy by class"
    if len(names) <= FEW:
        order = [*tested, *untested]
    elif len(tested) <= FEW:
        title += f" (the {len(tested)} of {len(names)} with images; all are in per_class.csv)"
        order = tested
    else:
        without = f" with images, {len(names)} in all" if untested else ""
        title += f" (the ten best and the ten worst of {len(tested)}{without}; all are in per_class.csv)"
        order = [*tested[:10], *tested[-10:]]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("class", "images", "accuracy", "most often taken for"):
        table.add_column(column, justify="right" if column in ("images", "accuracy") else "left")
    for i in order:
        mistakes = matrix[i].clone()
        mistakes[i] = 0
        worst = int(mistakes.argmax())
        taken = f"{names[worst]} ({int(mistakes[worst])})" if mistakes[worst] else ""
        accuracy = "-" if math.isnan(accuracies[i]) else f"{accuracies[i]:.1%}"
        table.add_row(escape(names[i]), str(int(matrix[i].sum())), accuracy, escape(taken))
    return Group(Text(title, style="italic"), table)


def confusion_table(matrix: Tensor, names: Sequence[str]) -> Group:
    """The matrix with a numbered column for each class, so that it fits a terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True, max_width=16, overflow="ellipsis")
    for j in range(len(names)):
        table.add_column(str(j), justify="right", no_wrap=True)
    for i, name in enumerate(names):
        cells = [
            f"[bold green]{int(v)}[/]" if i == j else (str(int(v)) if v else "[dim]·[/]")
            for j, v in enumerate(matrix[i])
        ]
        table.add_row(escape(f"{i} {name}"), *cells)
    return Group(Text("rows: the class; columns: what it was taken for", style="italic"), table)


def write_csv(matrix: Tensor, names: Sequence[str], folder: Path) -> None:
    """Writes `confusion.csv` (a row for each true class) and `per_class.csv`."""
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *names])
        writer.writerows([name, *map(int, row)] for name, row in zip(names, matrix, strict=True))
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "accuracy"])
        for name, accuracy, row in zip(names, per_class_accuracy(matrix), matrix, strict=True):
            writer.writerow([name, int(row.sum()), f"{accuracy:.6f}"])


def draw(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """Draws the matrix as a picture, each row as shares of its class."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shares = matrix.float() / matrix.sum(1, keepdim=True).clamp_min(1)
    count = len(names)
    few = count <= FEW
    side = 2.5 + 0.55 * count if few else 11.0
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    # The root of a share, since a mistake worth seeing is a share of a few per cent.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    picture = axes.imshow(shares.numpy(), cmap="Blues", norm=norm)
    figure.colorbar(picture, ax=axes, label="share of the class", fraction=0.046, pad=0.03, ticks=SHARES)
    step = 1 if count <= 100 else -(-count // 50)
    ticks = list(range(0, count, step))
    labels = [_label(names[i]) for i in ticks]
    size = 9 if few else 6
    axes.set_xticks(ticks, labels, fontsize=size, rotation_mode="anchor", rotation=45 if few else 90, ha="right")
    axes.set_yticks(ticks, labels, fontsize=size)
    if not few:
        for text in axes.get_xticklabels():
            text.set_verticalalignment("center")
    if few:
        for i in range(count):
            for j in range(count):
                if matrix[i, j]:
                    color = "white" if norm(float(shares[i, j])) > 0.6 else "black"
                    axes.text(j, i, str(int(matrix[i, j])), ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title(f"top-1 {float(matrix.trace() / matrix.sum().clamp_min(1)):.2%} of {int(matrix.sum()):,} images")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _label(name: str) -> str:
    """A name short enough for an axis; matplotlib reads what stands between dollars as mathematics."""
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")
