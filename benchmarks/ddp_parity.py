"""Whether two processes train as one does with the same global batch: benchmarks/results/ddp_parity.json.

    python benchmarks/ddp_parity.py

A small binary ResNet-18 is trained by `design-train fit` for 20 steps of 16 images each, in ways that ought to be one:

    one         one process, 16 images a step
    two         two processes (gloo), 8 images each
    accumulate  one process, two batches of 8 images a step
    sharded     two processes, each with half of every weight (FSDP2, by `ModelParallelStrategy`)

With augmentation, an annealed kernel scale, temperature and tau, clipping that bites, and a switch of stages after ten steps.
Batch norm is frozen, or replaced by group norm: else the statistics are those of a process's own images, and torch's synchronised
batch norm runs on GPUs alone. (Group norm of one group: small groups on maps of one pixel make gradients that no two orders of
summing agree on.) Nor does anything draw numbers for a whole batch, as dropout and mixup do: two processes draw others.

Reported: the largest differences from `one` in the latent weights, in the other weights, in the annealed values and in the metrics,
and how many signs differ. In float64 they are those of summing in another order; in float32 such a difference turns the sign of
some activation sooner or later, and from there on the runs go apart.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor, nn

from design_lightning.training import DesignClassifier
from design_lightning.training.step_benchmark import machine

Way = Literal["one", "two", "accumulate", "sharded"]
Norm = Literal["frozen", "group", "synchronised"]
WAYS, PRECISIONS = get_args(Way), ("64-true", "32-true")
NORMS_ON_CPU: tuple[Norm, ...] = ("frozen", "group")
STEPS, BATCH = 20, 16
RESULTS = Path(__file__).parent / "results" / "ddp_parity.json"

CONFIG = f"""
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  limit_train_batches: {STEPS // 2}
  limit_val_batches: 4
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  logger: {{class_path: CSVLogger, init_args: {{save_dir: ., name: null, version: log}}}}
  callbacks:
    - {{class_path: ModelCheckpoint, init_args: {{dirpath: ., filename: final}}}}
    - {{class_path: TwoStageTraining, init_args: {{switch: 0.5}}}}
    - {{class_path: LatentWeightClipping, init_args: {{bound: 0.04}}}}
    - {{class_path: KernelAnnealing, init_args: {{path: cosine}}}}
    - {{class_path: EstimatorAnnealing, init_args: {{name: temperature, start: 0.1, end: 10, path: geometric}}}}
    - {{class_path: EstimatorAnnealing, init_args: {{name: tau, start: 0.85, end: 0.99, path: exponential, every: epoch}}}}
model:
  class_path: DesignClassifier
  init_args:
    backbone: resnet18
    backbone_args: {{channels: [32, 32, 64, 64]}}
    binary:
      kernel: 2x2_v1
      estimator: ede
      weight: xnor
      shortcut: bireal
      overrides: {{"layer2.*": {{weight: recu}}, "layer3.*": {{weight: learned}}}}
    optimizer: {{class_path: Adam, init_args: {{lr: 2.0e-3}}}}
    scheduler: CosineDecay
    warmup_steps: 3
data:
  class_path: FashionMNISTSubset
  init_args: {{batch_size: {BATCH}, num_workers: 0, image_size: 28, padding: 2}}
"""


class FrozenBatchNorm(Callback):
    """Keeps every batch norm in eval mode: it computes with its running statistics, and leaves them as they are."""

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


class DoubleClassifier(DesignClassifier):
    """A classifier in float64 for a strategy that knows nothing of it, as Lightning's `ModelParallelStrategy`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


@dataclass(frozen=True)
class Run:
    """What a training left.

    Args:
        stages: the stage of each step, from 1.
        state: the checkpoint's tensors by name.
        metrics: of the log, those of a step by `name at step N`.
    """

    stages: list[int]
    state: dict[str, Tensor]
    metrics: dict[str, float]

    def named(self, *ends: str) -> dict[str, Tensor]:
        return {name: value for name, value in self.state.items() if name.endswith(ends)}

    @property
    def latent(self) -> dict[str, Tensor]:
        """The latent weights, those of the layers that have a DeSign."""
        layers = [name.removesuffix(".activation.scale") for name in self.named(".activation.scale")]
        return {f"{layer}.weight": self.state[f"{layer}.weight"] for layer in layers}

    @property
    def annealed(self) -> dict[str, Tensor]:
        return self.named("activation.scale", ".temperature", ".tau")


@dataclass(frozen=True)
class Agreement:
    """How far a run is from another: largest absolute differences."""

    norm: str
    precision: str
    way: str
    latent: float
    other: float
    annealed: float
    metrics: float
    signs_differ: int
    of_signs: int


def config(way: Way, norm: Norm, precision: str) -> dict[str, Any]:
    """The configuration of a run: on CPUs, or on GPUs with synchronised batch norm."""
    found: dict[str, Any] = yaml.safe_load(CONFIG)
    trainer, model, data = found["trainer"], found["model"]["init_args"], found["data"]["init_args"]
    trainer["precision"] = precision
    backend = "gloo"
    if norm == "frozen":
        trainer["callbacks"].append({"class_path": "ddp_parity.FrozenBatchNorm"})
    elif norm == "group":
        model["backbone_args"]["norm_layer"] = "groupnorm1"
    else:
        backend = "nccl"
        trainer |= {"accelerator": "gpu", "sync_batchnorm": way == "two"}
    trainer["devices"] = 2 if way in ("two", "sharded") else 1
    if way == "two":
        trainer["strategy"] = {"class_path": "DDPStrategy", "init_args": {"process_group_backend": backend}}
    if way == "sharded":
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
        arguments = {**sizes, "process_group_backend": backend}
        trainer["strategy"] = {"class_path": "ModelParallelStrategy", "init_args": arguments}
        if precision == "64-true":
            trainer["precision"], found["model"]["class_path"] = "32-true", "ddp_parity.DoubleClassifier"
    if way != "one":
        data["batch_size"] //= 2
    if way == "accumulate":
        trainer["accumulate_grad_batches"] = 2
        trainer["limit_train_batches"] *= 2
        trainer["limit_val_batches"] *= 2
    return found


def fit(folder: Path, settings: dict[str, Any], *arguments: str) -> None:
    """Runs `design-train fit` in a process of its own, or two, within a folder.

    Raises:
        RuntimeError: if it fails; with the end of what it said.
    """
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "design_lightning", "fit", "--config", "run.yaml", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")


def train(way: Way, norm: Norm, precision: str, **changes: Any) -> Run:
    """Trains, with changes of the data's arguments.

    Raises:
        RuntimeError: if training fails; with the end of what it said.
    """
    settings = config(way, norm, precision)
    settings["data"]["init_args"] |= changes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit(folder, settings)
        state = torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]
        with (folder / "log" / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    metrics = {
        f"{name} at step {row['step']}": float(value)
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "epoch", "stage") and not name.startswith(("train/images", "train/waiting"))
    }
    stages = [int(float(row["stage"])) for row in rows if row.get("stage")]
    return Run(stages, {name: value for name, value in state.items() if isinstance(value, Tensor)}, metrics)


def agreement(norm: Norm, precision: str, way: Way, run: Run, one: Run) -> Agreement:
    """How far a run is from that of one process."""
    latent = set(one.latent)
    floats = {name for name, value in one.state.items() if value.is_floating_point()}
    # Micro-batches have losses of their own.
    metrics = {name for name in one.metrics if way != "accumulate" or not name.startswith("train/loss")}
    signs = [(run.state[name] > 0) != (one.state[name] > 0) for name in latent]
    return Agreement(
        norm,
        precision,
        way,
        latent=_largest(run.state, one.state, latent),
        other=_largest(run.state, one.state, floats - latent - set(one.annealed)),
        annealed=_largest(run.state, one.state, set(one.annealed)),
        metrics=max(abs(run.metrics.get(name, math.nan) - one.metrics[name]) for name in metrics),
        signs_differ=sum(int(each.sum()) for each in signs),
        of_signs=sum(each.numel() for each in signs),
    )


def _largest(first: dict[str, Tensor], second: dict[str, Tensor], names: set[str]) -> float:
    return max((float((first[name].double() - second[name].double()).abs().max()) for name in names), default=0.0)


def table(found: list[Agreement]) -> str:
    lines = [
        f"{'norm':<7}{'precision':<11}{'way':<12}{'latent':>9}{'other':>9}{'annealed':>10}{'metrics':>9}{'signs':>17}"
    ]
    for each in found:
        signs = f"{each.signs_differ} of {each.of_signs:,}"
        values = f"{each.latent:>9.0e}{each.other:>9.0e}{each.annealed:>10.0e}{each.metrics:>9.0e}"
        lines.append(f"{each.norm:<7}{each.precision:<11}{each.way:<12}{values}{signs:>17}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found: list[Agreement] = []
    for norm in NORMS_ON_CPU:
        for precision in PRECISIONS:
            one = train("one", norm, precision)
            for way in WAYS[1:]:
                found.append(agreement(norm, precision, way, train(way, norm, precision), one))
                print(f"{norm}, {precision}, {way}: {found[-1].latent:.1e}", file=sys.stderr)
    settings = {"steps": STEPS, "images_a_step": BATCH}
    results = {"config": settings, "machine": machine("cpu"), "results": [asdict(each) for each in found]}
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
