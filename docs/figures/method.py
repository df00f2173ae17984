"""The pictures of docs/method.md: thresholds, bits of a real image, scales, and the estimators' derivatives.

    python docs/figures/method.py     # seconds; the pictures go beside this file

The image is the photograph of Grace Hopper that matplotlib ships as sample data: public domain.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import cbook
from matplotlib.figure import Figure
from torch import Tensor

from design_lightning.binary import EDE, STE, ApproxSign, Estimator, ReSTE, SwishSign
from design_lightning.kernels import ThresholdKernel
from design_lightning.kernels.search import read_grey
from design_lightning.kernels.search.figures import standardised, through

HERE = Path(__file__).parent
KERNEL = ThresholdKernel.named("2x2_v1")
BLUE, RED, GREY = "#3b5b92", "#c44e52", "0.45"


def thresholds() -> Figure:
    """The kernel, the map of thresholds that it tiles, a feature map, and its bits."""
    z = standardised(_image()[96:108, 60:76])
    tiled = KERNEL.tile(1, *z.shape)[0]
    figure = Figure(figsize=(10, 2.7), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[0.55, 1, 1, 1])
    for each, values, title in zip(
        axes,
        (KERNEL.tensor()[0], tiled, z, through(KERNEL, z)),
        ("kernel 2x2_v1", "thresholds: the kernel, tiled", "pre-activation, 12 x 16", "bits: 1 where it reaches them"),
        strict=True,
    ):
        _map(each, values, title)
    for i, row in enumerate(KERNEL.levels[0]):
        for j, level in enumerate(row):
            dark = level > 0.5
            axes[0].text(
                j, i, f"{level:.2f}", ha="center", va="center", color="black" if dark else "white", fontsize=11
            )
    return figure


def bits() -> Figure:
    """An image through ReLU, Sign and DeSign."""
    z = standardised(_image())
    return _row(
        {
            "pre-activation": z,
            "ReLU": z.relu(),
            "Sign": through(None, z),
            "DeSign 2x2_v1": through(KERNEL, z),
            "DeSign 2x2_v2": through(ThresholdKernel.named("2x2_v2"), z),
        }
    )


def scales() -> Figure:
    """DeSign's bits at several scales, which KernelAnnealing goes through."""
    z = standardised(_image())
    bits = {f"scale {scale:g}": through(_scaled(scale), z) for scale in (0, 0.25, 0.5, 1, 1.5)}
    return _row({f"{name}: {float(values.mean()):.0%} at +1": values for name, values in bits.items()})


def estimators() -> Figure:
    """What each estimator takes for the derivative of the sign."""
    u = torch.linspace(-2, 2, 1601)
    kinds: dict[str, list[tuple[str, Estimator]]] = {
        "ste": [("clip 1", STE()), ("clip 1.25", STE(1.25))],
        "approx_sign": [("", ApproxSign())],
        "swish_sign": [("b = 5", SwishSign()), ("b = 2", SwishSign(2))],
        "ede": [(f"t = {t:g}", EDE(t)) for t in (0.1, 1, 3, 10)],
        "reste": [(f"o = {o:g}", ReSTE(o)) for o in (1, 2, 3)],
    }
    figure = Figure(figsize=(12, 2.9), layout="constrained")
    for axes, (name, variants) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
        for i, (label, estimator) in enumerate(variants):
            color = BLUE if i == 0 else str(0.75 - 0.6 * i / len(variants))
            axes.plot(u, estimator.derivative(u), color=color, label=label, linewidth=1.6)
        axes.set_title(name, fontsize=12)
        axes.set_xlabel("u = x - threshold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if variants[0][0]:
            axes.legend(frameon=False, fontsize=9, handlelength=1)
    return figure


def _image() -> Tensor:
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return read_grey(file.name, 256)


def _scaled(scale: float) -> ThresholdKernel:
    return ThresholdKernel(scale * KERNEL.tensor())


def _row(images: dict[str, Tensor]) -> Figure:
    height, width = next(iter(images.values())).shape
    figure = Figure(figsize=(12, 12 / len(images) * height / width + 0.35), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        _map(axes, values, title)
    return figure


def _map(axes: Any, values: Tensor, title: str) -> None:
    axes.imshow(values.numpy(), cmap="gray", interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.axis("off")


FIGURES: dict[str, Callable[[], Figure]] = {
    "thresholds": thresholds,
    "bits": bits,
    "scales": scales,
    "estimators": estimators,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        draw().savefig(HERE / f"{name}.png", dpi=160 if name in ("bits", "scales") else 110)
        print(f"written: docs/figures/{name}.png")
