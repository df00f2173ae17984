"""Pictures of kernels: one image through ReLU, Sign and threshold kernels, and the outcome of a search."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.published import PUBLISHED_LEVELS
from design_lightning.kernels.search.scores import SCORES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from design_lightning.kernels.search.result import Candidate, SearchResult

_LEVEL_NAMES = {threshold: str(code) for code, threshold in PUBLISHED_LEVELS.items()}
_MARKS = ("#c44e52", "#4c72b0", "#55a868", "#8172b3", "#937860")


def check_figure(path: str | Path) -> None:
    """Refuses a figure's file that could not be written, before the work is done.

    Raises:
        ValueError: if its suffix is none that matplotlib writes here, or it is a folder itself.
        FileNotFoundError: if its folder does not exist.
    """
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"figure {str(path)!r}: use a name that ends in .png, .pdf or .svg")
    if Path(path).is_dir():
        raise ValueError(f"figure {str(path)!r} is a folder: give the name of a file")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"figure {str(path)!r}: there is no folder {str(Path(path).parent)!r}")


def standardised(grey: Tensor) -> Tensor:
    """A grey image [H, W] with mean 0 and standard deviation 1: what stands in for a batch-normalised pre-activation."""
    return (grey - grey.mean()) / grey.std().clamp_min(1e-6)


def through(kernel: ThresholdKernel | None, pre_activation: Tensor) -> Tensor:
    """The bits [H, W] in {0, 1} of a pre-activation [H, W]; of Sign without a kernel; of a 3-D kernel, their mean over channels."""
    if kernel is None:
        return (pre_activation >= 0).float()
    thresholds = kernel.tile(kernel.shape[0], *pre_activation.shape)
    return (pre_activation >= thresholds).float().mean(0)


def draw_gallery(image: Tensor, kernels: Mapping[str, ThresholdKernel], path: str | Path, title: str = "") -> None:
    """Draws a grey image [H, W] in [0, 1], its ReLU and Sign, and the bits that each kernel makes of it.

    The image is standardised and taken as the pre-activation. A kernel of several channels is shown as the mean over them.
    """
    from matplotlib.figure import Figure

    panels = _panels(image, kernels)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    ratio = image.shape[0] / image.shape[1]
    side = 3.1
    figure = Figure(figsize=(side * columns, rows * (side * ratio + 0.3) + 0.4), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        _show(axes, *panel)
    for axes in figure.axes[len(panels) :]:
        axes.axis("off")
    if title:
        figure.suptitle(_plain(title), fontsize=11)
    figure.savefig(path, dpi=150)


def draw_result(found: "SearchResult", image: Tensor, path: str | Path) -> None:
    """Draws the best kernels, the curve of the score with the published ones on it, and an image [H, W] through both."""
    from matplotlib.figure import Figure

    ratio = image.shape[0] / image.shape[1]
    shown = {"best": found.best.kernel, **{c.kernel.name: c.kernel for c in found.published[:4]}}
    panels = _panels(image, shown)
    panel_height = min(13 / len(panels) * ratio, 3.2)
    figure = Figure(figsize=(13, 6.6 + panel_height), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=[2.2, 3.7, panel_height + 0.7])
    top, middle, bottom = rows
    score = SCORES[found.config.score]
    best = found.top[:6]
    for axes, candidate in zip(top.subplots(1, max(6, len(best))).flat, [*best, *[None] * 6], strict=False):
        _show_kernel(axes, candidate, found.config.score)
    slices = "" if found.config.family == "none" else f" and their family by {found.config.family}: first slices"
    top.suptitle(
        f"best of {found.candidates:,} kernels of {found.config.size}{slices}, under {score.title}, on {found.images:,} images",
        fontsize=12,
    )
    _draw_curve(middle.subplots(), found)
    for axes, panel in zip(bottom.subplots(1, len(panels)).flat, panels, strict=True):
        _show(axes, *panel)
    bottom.suptitle("one image, standardised as by a batch norm, and what each activation makes of it", fontsize=12)
    figure.savefig(path, dpi=150)


def _panels(image: Tensor, kernels: Mapping[str, ThresholdKernel]) -> list[tuple[Tensor, str]]:
    z = standardised(image.float())
    named = {
        f"{name} (mean of {kernel.shape[0]})" if kernel.shape[0] > 1 else name: through(kernel, z)
        for name, kernel in kernels.items()
    }
    return [
        (image, "image"),
        (z.relu() / z.max().clamp_min(1e-6), "ReLU"),
        (through(None, z), "Sign"),
        *((bits, name) for name, bits in named.items()),
    ]


def _show(axes: "Axes", picture: Tensor, title: str) -> None:
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(_plain(title), fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def _show_kernel(axes: "Axes", candidate: "Candidate | None", score: str) -> None:
    """A kernel's first slice as a picture: a bright place has a low threshold, and is on first."""
    axes.axis("off")
    if candidate is None:
        return
    levels = candidate.kernel.tensor()[0]
    highest = max(PUBLISHED_LEVELS.values())
    axes.imshow(-levels.numpy(), cmap="gray", vmin=-0.85 * highest, vmax=-0.1 * highest)
    for i, row in enumerate(candidate.kernel.levels[0]):
        for j, level in enumerate(row):
            color = "black" if level < 0.5 * highest else "white"
            text = _LEVEL_NAMES.get(level, f"{level:.2f}")
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=15 if len(text) == 1 else 11)
    axes.set_title(f"rank {candidate.ranks[score]:,}\n{candidate.shown(score)}", fontsize=10)


def _draw_curve(axes: "Axes", found: "SearchResult") -> None:
    """Score over rank, of the candidates kept; the published kernels as marks, the excluded ones as lines."""
    name = found.config.score
    ranks, values = zip(*found.curve(), strict=True)
    axes.step(ranks, values, where="post", color="0.25", linewidth=1.6)
    axes.fill_between(ranks, values, min(values), step="post", color="0.25", alpha=0.08, linewidth=0)
    axes.plot([1], [found.best.scores[name]], "o", color="black", markersize=7)
    axes.annotate(f"best: {found.best.pattern.partition(' | ')[0]}", (1, found.best.scores[name]), **_beside(10, 8))
    for i, candidate in enumerate(sorted(found.published, key=lambda c: c.ranks[name])):
        color, value = _MARKS[i % len(_MARKS)], candidate.scores[name]
        if candidate.excluded:
            axes.axhline(value, color=color, linewidth=1.2, linestyle=(0, (5, 4)))
            axes.annotate(
                f"{candidate.kernel.name} (excluded)",
                (0.995, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                **_beside(0, 5, color),
            )
        else:
            axes.plot([candidate.ranks[name]], [value], "o", color=color, markersize=8)
            label = f"{candidate.kernel.name}: rank {candidate.ranks[name]:,}"
            axes.annotate(label, (candidate.ranks[name], value), ha="right", **_beside(-9, -12 - 15 * (i % 3), color))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"rank among the {found.kept:,} kernels without an entry that never switches")
    axes.set_ylabel(SCORES[name].title)
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _beside(x: float, y: float, color: str = "black") -> dict[str, Any]:
    return {"xytext": (x, y), "textcoords": "offset points", "fontsize": 10, "color": color}


def _plain(text: str) -> str:
    """Without the mathematics that matplotlib would see in dollar signs."""
    return text.replace("$", r"\$")
