"""How long one image takes: a network as float, as int8, and as the 1-bit files that this project writes, in one run.

In every round the variants take turns in a shuffled order, so that whatever else the machine does meets them alike. A turn is one
image that is not timed, for threads of the variant before may still spin and its weights fill the caches, and three that are: their
median counts. Times are medians over rounds; a speed-up is the median of the ratios within a round. What is not int8 is float32:
OpenVINO would choose bfloat16 on some CPUs.
"""

import importlib.metadata
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import design_lightning.models  # noqa: F401  timm knows them then
from design_lightning._names import did_you_mean
from design_lightning.export.graph import require
from design_lightning.export.inference_variants import TWINS, VARIANTS, Subject, needed_packages, of_files, of_model
from design_lightning.training.step_benchmark import machine

CALLS = 3
"""Timed images in a turn."""
_PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf", "numpy")


@dataclass(frozen=True)
class InferenceConfig:
    """What is measured.

    Args:
        model: a network of timm or of `design_lightning.models`; None for files alone.
        classes: of it.
        size: height and width of its images, and of those for a file that names none; the network's own if None.
        binary: fields of `BinaryConfig`.
        variants: some of `VARIANTS`, of the network.
        files: exported files beside it.
        threads: numbers of CPU threads; one after the other, each by itself.
        rounds: turns of each variant.
        seed: of weights, images and order.

    Raises:
        ValueError: if a number is too small, a variant unknown, or there is nothing to measure.
        ImportError: if a package that a variant needs is missing.
    """

    model: str | None = "resnet18"
    classes: int = 1000
    size: int | None = None
    binary: dict[str, Any] = field(default_factory=dict)
    variants: Sequence[str] = VARIANTS
    files: Sequence[str] = ()
    threads: Sequence[int] = (1,)
    rounds: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("classes", "size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"threads={list(self.threads)}: give numbers of at least 1, or all")
        if self.model is None and not self.files:
            raise ValueError("there is nothing to measure: give a model, or files")
        if self.model is not None and not timm.is_model(self.model):
            raise ValueError(
                f"timm has no network {self.model!r}: {did_you_mean(self.model, timm.list_models(), show_all_below=0)}"
            )
        for variant in self.variants if self.model is not None else ():
            if variant not in VARIANTS:
                raise ValueError(f"unknown variant {variant!r}: {did_you_mean(variant, VARIANTS)}")
            require(*needed_packages(variant), what=f"variant {variant!r}")
        for file in self.files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"{file!r} is no file; give one that design-train export or dl.save wrote")


@dataclass(frozen=True)
class InferenceResult:
    """What one image took. Times in milliseconds.

    Args:
        name: the variant, or the file.
        threads: of the CPU.
        median, low, high: over the rounds; the two latter are its quartiles.
        speedup: from another name to how many times as fast this is as that one in the same round: the float variants, or the
            first file where there are none.
        bytes: of its files; of its tensors for `float_pytorch`.
        one_bit_layers: how many of its layers the engine runs as 1-bit.
        primitives: what OpenVINO calls their kernels.
        difference, top1: from the network in PyTorch that it was made of, on 16 images of noise: the largest difference of the
            outputs relative to the largest output of the image, and the share of equal classes. None for a file.
    """

    name: str
    threads: int
    median: float
    low: float
    high: float
    speedup: dict[str, float]
    bytes: int
    one_bit_layers: int
    primitives: tuple[str, ...]
    difference: float | None
    top1: float | None


def measure_inference(
    config: InferenceConfig, progress: Callable[[str], None] = lambda text: None
) -> list[InferenceResult]:
    """Times every variant and file.

    Args:
        config: what is measured.
        progress: is told what happens next.

    Raises:
        ValueError: if a network cannot be exported, or a file is none of ours.
        ImportError: if the engine of a file is missing.
    """
    before = torch.get_num_threads()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        subjects = [*of_model(config, Path(folder), progress), *of_files(config, progress)]
        try:
            for threads in config.threads:
                results += _measure(config, subjects, threads, progress)
        finally:
            torch.set_num_threads(before)
    return results


def as_dict(config: InferenceConfig, results: Sequence[InferenceResult]) -> dict[str, Any]:
    """Everything about a measurement as plain values."""
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "config": {**asdict(config), "batch": 1, "precision": "float32, where it is not int8 or 1-bit"},
        "machine": {**machine("cpu", all_threads()), **versions, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")},
        "results": [_rounded(asdict(result)) for result in results],
    }


def _rounded(value: Any) -> Any:
    """With four digits of each float, which is more than repeats."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def all_threads() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure(
    config: InferenceConfig, subjects: Sequence[Subject], threads: int, progress: Callable[[str], None]
) -> list[InferenceResult]:
    torch.set_num_threads(threads)  # the process's own; the other engines' are each session's
    forwards = {subject.name: subject.open(threads) for subject in subjects}
    order = random.Random(config.seed)
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for number in range(config.rounds + 1):
        progress(f"threads {threads}: round {number} of {config.rounds}")
        for subject in order.sample(subjects, len(subjects)):
            taken = _turn(forwards[subject.name], subject.image)
            if number > 0:  # the first settles memory
                times[subject.name].append(taken)
    references = [subject.name for subject in subjects if subject.name in TWINS] or [subjects[0].name]
    return [_result(subject, threads, times, references) for subject in subjects]


def _turn(forward: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Milliseconds of an image."""
    forward(image)
    taken = []
    for _ in range(CALLS):
        start = time.perf_counter()
        forward(image)
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def _result(
    subject: Subject, threads: int, times: Mapping[str, Sequence[float]], references: Sequence[str]
) -> InferenceResult:
    own = times[subject.name]
    low, median, high = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else (own[0], own[0], own[0])
    return InferenceResult(
        subject.name,
        threads,
        median,
        low,
        high,
        speedup={
            name: statistics.median(theirs / ours for theirs, ours in zip(times[name], own, strict=True))
            for name in references
        },
        bytes=subject.bytes,
        one_bit_layers=len(subject.primitives),
        primitives=tuple(sorted(set(subject.primitives))),
        difference=subject.difference,
        top1=subject.top1,
    )
