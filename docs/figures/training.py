"""The pictures of docs/callbacks.md, from real trainings: a narrow binary ResNet-20 on the Fashion-MNIST subset of the package.

    python docs/figures/training.py             # all of them, some minutes on one core
    python docs/figures/training.py clipping    # one of them

Pictures go beside this file, the numbers behind them to benchmarks/results/callbacks.json.
"""

import argparse
import json
import logging
import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor

import design_lightning as dl
from design_lightning.binary import EDE
from design_lightning.callbacks import (
    BatchNormRecalibration,
    BinaryWeightAveraging,
    ConfusionMatrixReport,
    EstimatorAnnealing,
    KernelAnnealing,
    LatentWeightClipping,
    SignFlipMonitor,
    TwoStageTraining,
)
from design_lightning.data import FashionMNISTSubset
from design_lightning.surgery import binary_layers

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "callbacks.json"
BLUE, RED, GREY = "#3b5b92", "#c44e52", "0.45"
EPOCHS = 4
NETWORK = "resnet20_cifar, a quarter as wide, DeSign 2x2_v1, XNOR weights, AdamW 1e-2 with a cosine, batches of 100"

Curve = list[tuple[float, float]]


class Record(Callback):
    """Keeps what is logged, by name: (optimizer step, value)."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = defaultdict(list)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for name in ("train/loss", "kernel/scale", "estimator/temperature"):
            if name in trainer.callback_metrics:
                self.curves[name].append((trainer.global_step, float(trainer.callback_metrics[name])))
        for callback in trainer.callbacks:
            if isinstance(callback, SignFlipMonitor) and trainer.global_step % callback.every_n_steps == 0:
                for name, value in callback.metrics.items():
                    self.curves[name].append((trainer.global_step, value))

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.curves["val/top1"].append((trainer.global_step, 100 * float(trainer.callback_metrics["val/top1"])))


class Run:
    """A training from a seed: the module, the data and what was logged."""

    def __init__(self, *callbacks: Callback, epochs: int = EPOCHS, seed: int = 0, **binary: Any) -> None:
        seed_everything(seed, verbose=False)
        self.data = FashionMNISTSubset(batch_size=100, image_size=28, padding=1, num_workers=0)
        self.module = dl.DesignClassifier(
            "resnet20_cifar",
            num_classes=10,
            binary=dl.BinaryConfig(**binary),
            backbone_args={"width": 0.25},
            input_size=(1, 28, 28),
            class_names=self.data.class_names,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=1e-4),
        )
        record = Record()
        self.trainer = dl.DesignTrainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[*callbacks, record],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tempfile.mkdtemp(),
            num_sanity_val_steps=0,
        )
        self.trainer.fit(self.module, self.data)
        self.curves = record.curves

    @property
    def latent_weights(self) -> Tensor:
        return torch.cat([layer.weight.detach().flatten() for layer in binary_layers(self.module).values()])


@cache
def plain() -> Run:
    """The training that the others are compared with."""
    return Run()


def clipping() -> dict[str, Any]:
    """Latent weights at the end, with and without a bound."""
    bound = 0.25
    free, clipped = plain().latent_weights, Run(LatentWeightClipping(bound)).latent_weights
    edge = float(free.abs().max())
    figure, axes = panels(1, sharey=True)
    bins = torch.linspace(-edge, edge, 121).tolist()
    axes[0].hist(free.numpy(), bins=bins, color=GREY, alpha=0.55, label="without")
    axes[0].hist(clipped.numpy(), bins=bins, color=BLUE, histtype="step", linewidth=1.6, label=f"with, bound {bound}")
    axes[0].set(yscale="log", xlabel="latent weight after training", ylabel="weights")
    axes[0].legend(frameon=False)
    save(figure, "clipping")
    beyond = float((free.abs() > bound).float().mean())
    return {
        "bound": bound,
        "greatest_without": edge,
        "greatest_with": float(clipped.abs().max()),
        "beyond_without": beyond,
        "at_bound_with": float((clipped.abs() >= bound).float().mean()),
    }


def kernel_annealing() -> dict[str, Any]:
    """The scale over the steps, and the share of activations at +1 that follows it."""
    every = 10
    runs = {
        "none (scale 1)": Run(SignFlipMonitor(every, images=0)),
        "linear": Run(KernelAnnealing(), SignFlipMonitor(every, images=0)),
        "cosine, until 0.5": Run(KernelAnnealing(path="cosine", until=0.5), SignFlipMonitor(every, images=0)),
    }
    figure, (left, right) = panels(2)
    found = {}
    for color, (name, run) in zip((GREY, BLUE, RED), runs.items(), strict=True):
        scale = run.curves["kernel/scale"] or [(step, 1.0) for step, _ in run.curves["train/loss"]]
        plot(left, scale, color, name)
        positive = run.curves["positive/mean"]
        plot(right, positive, color, name)
        found[name] = {"positive_first": positive[0][1], "positive_last": positive[-1][1], "top1": last(run)}
    left.set(xlabel="optimizer step", ylabel="scale of the kernels")
    right.set(xlabel="optimizer step", ylabel="share of activations at +1")
    left.legend(frameon=False)
    save(figure, "kernel_annealing")
    return found


def estimator_annealing() -> dict[str, Any]:
    """EDE's temperature over the steps, and the derivative at five moments."""
    run = Run(EstimatorAnnealing("temperature", 0.1, 10, path="geometric"), estimator="ede")
    temperatures = run.curves["estimator/temperature"]
    figure, (left, right) = panels(2)
    plot(left, temperatures, BLUE)
    left.set(yscale="log", xlabel="optimizer step", ylabel="temperature t of EDE")
    u = torch.linspace(-2, 2, 801)
    moments = {}
    for i in range(5):
        step, t = temperatures[round(i * (len(temperatures) - 1) / 4)]
        moments[int(step)] = t
        shade = 0.75 - 0.17 * i
        right.plot(u, EDE(t).derivative(u), color=str(shade), label=f"step {step:.0f}: t = {t:.2g}")
        left.plot([step], [t], "o", color=str(shade), markersize=6)
    right.set(xlabel="u", ylabel="derivative")
    right.legend(frameon=False)
    save(figure, "estimator_annealing")
    return {"temperature_at_step": moments, "top1": last(run)}


def sign_flips() -> dict[str, Any]:
    """The share of weights that changed their sign since the last look, by layer."""
    run = Run(SignFlipMonitor(20, images=0))
    layers = [name for name in run.curves if name.startswith("flips/") and name != "flips/mean"]
    figure, (left, right) = panels(2)
    for i, name in enumerate(layers):
        plot(left, run.curves[name], str(0.85 - 0.5 * i / len(layers)), linewidth=0.8)
    plot(left, run.curves["flips/mean"], RED, "mean of the layers")
    left.set(xlabel="optimizer step", ylabel="share of signs that flipped")
    left.legend(frameon=False)
    plot(right, run.curves["positive/mean"], BLUE, "at +1")
    plot(right, run.curves["dead/mean"], RED, "dead channels")
    right.set(xlabel="optimizer step", ylabel="share of activations")
    right.legend(frameon=False)
    save(figure, "sign_flips")
    flips = run.curves["flips/mean"]
    return {"layers": len(layers), "flips_first": flips[0][1], "flips_last": flips[-1][1]}


def two_stages() -> dict[str, Any]:
    """Loss and accuracy of two stages beside those of one."""
    epochs = 2 * EPOCHS
    one, two = Run(epochs=epochs), Run(TwoStageTraining(), epochs=epochs)
    switch = two.trainer.global_step / 2
    figure, (left, right) = panels(2)
    for run, color, name in ((one, GREY, "both binary from the start"), (two, BLUE, "TwoStageTraining")):
        plot(left, smooth(run.curves["train/loss"]), color, name)
        plot(right, run.curves["val/top1"], color, name, marker="o")
    for axes in (left, right):
        axes.axvline(switch, color=RED, linestyle=(0, (4, 3)), linewidth=1)
    left.annotate("switch", (switch, left.get_ylim()[1] * 0.93), textcoords="offset points", xytext=(4, 0), color=RED)
    left.set(xlabel="optimizer step", ylabel="training loss (mean of 20 steps)")
    right.set(xlabel="optimizer step", ylabel="top-1 on the 1,000 test images, %")
    left.legend(frameon=False)
    save(figure, "two_stages")
    curve = two.curves["val/top1"]
    return {
        "switch": switch,
        "one_stage_top1": last(one),
        "top1": last(two),
        "before_switch": curve[epochs // 2 - 1][1],
        "an_epoch_after_switch": curve[epochs // 2][1],
    }


def weight_averaging() -> dict[str, Any]:
    """Accuracy of the weights and of their average, epoch by epoch."""
    running, average = plain(), Run(BinaryWeightAveraging(decay=0.98, recalibration_batches=20))
    figure, (axes,) = panels(1)
    plot(axes, running.curves["val/top1"], GREY, "the weights", marker="o")
    plot(axes, average.curves["val/top1"], BLUE, "their average, decay 0.98", marker="o")
    axes.set(xlabel="optimizer step", ylabel="top-1 on the 1,000 test images, %")
    axes.legend(frameon=False)
    save(figure, "weight_averaging")
    return {"top1_by_epoch": values(running), "top1_by_epoch_of_average": values(average)}


def recalibration() -> dict[str, Any]:
    """The same training, validated with running statistics and with new ones."""
    running, anew = plain(), Run(BatchNormRecalibration(batches=20))
    same = torch.equal(running.latent_weights, anew.latent_weights)
    if not same:
        raise RuntimeError("the two trainings differ, so that their accuracies compare more than the statistics")
    figure, (axes,) = panels(1)
    plot(axes, running.curves["val/top1"], GREY, "running statistics", marker="o")
    plot(axes, anew.curves["val/top1"], BLUE, "estimated anew on 20 batches", marker="o")
    axes.set(xlabel="optimizer step", ylabel="top-1 on the 1,000 test images, %")
    axes.legend(frameon=False)
    save(figure, "recalibration")
    return {"same_weights": same, "running": values(running), "anew": values(anew)}


def confusion() -> dict[str, Any]:
    """The picture that ConfusionMatrixReport draws."""
    run = plain()
    with tempfile.TemporaryDirectory() as folder:
        run.trainer.callbacks.append(ConfusionMatrixReport(folder))
        metrics = run.trainer.test(run.module, run.data, verbose=False)[0]
        (HERE / "confusion.png").write_bytes((Path(folder) / "confusion.png").read_bytes())
    return {"top1": 100 * metrics["test/top1"]}


def panels(count: int, **options: Any) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(9.0 if count == 2 else 5.5, 3.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **options)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes


def plot(axes: Any, curve: Curve, color: str, label: str | None = None, **options: Any) -> None:
    axes.plot(
        *zip(*curve, strict=True), **{"color": color, "linewidth": 1.6, "markersize": 4, "label": label, **options}
    )


def smooth(curve: Curve, width: int = 20) -> Curve:
    """The mean of each `width` steps."""
    return [
        (curve[i + width - 1][0], math.fsum(value for _, value in curve[i : i + width]) / width)
        for i in range(0, len(curve) - width + 1, width)
    ]


def values(run: Run) -> list[float]:
    return [round(value, 2) for _, value in run.curves["val/top1"]]


def last(run: Run) -> float:
    return values(run)[-1]


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=110)


FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    "clipping": clipping,
    "kernel_annealing": kernel_annealing,
    "estimator_annealing": estimator_annealing,
    "sign_flips": sign_flips,
    "two_stages": two_stages,
    "weight_averaging": weight_averaging,
    "recalibration": recalibration,
    "confusion": confusion,
}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of docs/callbacks.md from real trainings.")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(FIGURES)}; all where none is named")
    names = parser.parse_args().names or list(FIGURES)
    for name in names:
        if name not in FIGURES:
            parser.error(f"unknown figure {name!r}: use some of {', '.join(FIGURES)}")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["figures"] if RESULTS.is_file() else {}
    for name in names:
        found[name] = rounded(FIGURES[name]())
        print(name, found[name], flush=True)
        everything = {
            "command": "python docs/figures/training.py",
            "network": f"{NETWORK}; {EPOCHS} epochs of 60 steps, two_stages {2 * EPOCHS}; seed 0",
            "figures": {name: found[name] for name in FIGURES if name in found},
        }
        RESULTS.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
