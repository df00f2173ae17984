"""How long a training step takes and what memory it needs: the float network, the naive binary one, and ours, in one run.

The networks take turns, step by step, so that whatever else the machine does meets them alike. Times are medians, ratios are
medians of the ratios within a round. Memory is counted by the allocator's events, not by the size of the process.

    float  the float network
    naive  binary, with float tensors for the backward pass, and torch's own norms and pools
    bits   binary, with bits for the backward pass
    sign   as bits, with a plain Sign in place of DeSign
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import design_lightning as dl
import design_lightning.models
from design_lightning._names import did_you_mean
from design_lightning.binary.lean import make_plain_

Variant = Literal["float", "naive", "bits", "sign"]
Mode = Literal["eager", "compiled"]


@dataclass(frozen=True)
class StepConfig:
    """What is measured.

    Args:
        model: a timm network.
        batch: images a step.
        size: their height and width; the network's own if None.
        binary: fields of `BinaryConfig` for the binary variants.
        variants: which of those above, in the order of a round.
        modes: `eager`, `compiled`, or both.
        rounds: how many steps of each are timed, after one that is not.
        threads: of the CPU; torch's own choice if None.
        device: where it runs.
        channels_last: whether images and weights lie so.
        seed: of weights and images.
    """

    model: str = "resnet18"
    batch: int = 32
    size: int | None = None
    binary: dict[str, Any] = field(default_factory=dict)
    variants: Sequence[Variant] = ("float", "naive", "bits", "sign")
    modes: Sequence[Mode] = ("eager",)
    rounds: int = 10
    threads: int | None = None
    device: str = "cpu"
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 2), ("rounds", 1), ("size", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed")
        for name, choices in (("variants", get_args(Variant)), ("modes", get_args(Mode))):
            for value in getattr(self, name):
                if value not in choices:
                    raise ValueError(f"unknown {name} {value!r}: use some of {', '.join(choices)}")


@dataclass(frozen=True)
class StepResult:
    """What one variant took. Times in milliseconds, sizes in bytes.

    Args:
        variant, mode: of `StepConfig`.
        forward, backward, optimizer, step: medians.
        spread: the interquartile range of `step`.
        ratio: the median of `step` over the step of the first variant of its mode in the same round.
        images_per_second: the batch over `step`.
        saved_per_image: what waits for the backward pass at the end of a forward, by the slope over the batch.
        peak: the most that is allocated in a step, weights and optimizer's state included.
    """

    variant: Variant
    mode: Mode
    forward: float
    backward: float
    optimizer: float
    step: float
    spread: float
    ratio: float
    images_per_second: float
    saved_per_image: float
    peak: int


def measure_steps(config: StepConfig, progress: Callable[[str], None] = lambda text: None) -> list[StepResult]:
    """Times the steps of every variant and mode, and counts their memory.

    Args:
        config: what is measured.
        progress: is told what happens next.

    Raises:
        ValueError: if there is no such network or device.
    """
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {config.device!r}: torch finds no CUDA device here; use --device cpu")
    results = []
    with _threads(config.threads):
        for mode in config.modes:
            subjects = []
            for variant in config.variants:
                progress(f"{mode}: {variant}, memory")
                subjects.append(_Subject(config, variant, mode))
            for number in range(config.rounds + 1):
                progress(f"{mode}: round {number} of {config.rounds}")
                for subject in subjects:
                    subject.step(timed=number > 0)
            results += [subject.result(subjects[0]) for subject in subjects]
    return results


class _Subject:
    """One network, its optimizer, and the times of its steps."""

    def __init__(self, config: StepConfig, variant: Variant, mode: Mode) -> None:
        self.config, self.variant, self.mode = config, variant, mode
        torch.manual_seed(config.seed)
        if not timm.is_model(config.model):
            raise ValueError(
                f"timm has no network {config.model!r}: {did_you_mean(config.model, timm.list_models(), show_all_below=0)}"
            )
        model = timm.create_model(config.model)
        size = config.size or model.pretrained_cfg["input_size"][-1]
        self.shape = (config.batch, 3, size, size)
        if variant != "float":
            _binarize(model, variant, config.binary, size)
        model = model.to(config.device).train()
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model: nn.Module = model
        self.call: Any = torch.compile(model, dynamic=False) if mode == "compiled" else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.times: list[tuple[float, float, float]] = []
        self.images = self._images(config.batch)
        self.labels = torch.arange(config.batch, device=config.device) % 10
        self._measure_memory()

    def _images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        images = torch.randn(count, *self.shape[1:], generator=generator).to(self.config.device)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _measure_memory(self) -> None:
        half = self.config.batch // 2
        self.step(timed=False)  # the optimizer's state comes to be, and a compiler compiles
        saved, self.peak = self._memory(self.images, self.labels)
        self.saved_per_image = (saved - self._memory(self.images[:half], self.labels[:half])[0]) / (
            self.config.batch - half
        )

    def _memory(self, images: Tensor, labels: Tensor) -> tuple[int, int]:
        """What is alive at the end of a forward, and at most in the step: bytes."""
        self.optimizer.zero_grad()
        if images.is_cuda:
            return self._memory_on_cuda(images, labels)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = self._loss(images, labels)
            with record_function("BACKWARD"):
                loss.backward()
            self.optimizer.step()
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        alive = saved = most = 0
        for event in events:
            if event.name() == "BACKWARD":
                saved = alive
            elif event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return saved, most + self._resident()

    def _memory_on_cuda(self, images: Tensor, labels: Tensor) -> tuple[int, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = self._loss(images, labels)
        saved = torch.cuda.memory_allocated() - before
        loss.backward()
        self.optimizer.step()
        torch.cuda.synchronize()
        return saved, torch.cuda.max_memory_allocated() - before + self._resident()

    def _resident(self) -> int:
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.call(images), labels)

    def step(self, timed: bool) -> None:
        self.optimizer.zero_grad()
        marks = [self._now()]
        loss = self._loss(self.images, self.labels)
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        marks.append(self._now())
        if timed:
            forward, backward, optimizer = (1000 * (b - a) for a, b in pairwise(marks))
            self.times.append((forward, backward, optimizer))

    def _now(self) -> float:
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self, first: "_Subject") -> StepResult:
        forward, backward, optimizer = (statistics.median(part) for part in zip(*self.times, strict=True))
        steps, others = [sum(parts) for parts in self.times], [sum(parts) for parts in first.times]
        step = statistics.median(steps)
        low, _, high = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else (step, step, step)
        return StepResult(
            *(self.variant, self.mode, forward, backward, optimizer, step, high - low),
            ratio=statistics.median(ours / theirs for ours, theirs in zip(steps, others, strict=True)),
            images_per_second=1000 * self.config.batch / step,
            saved_per_image=self.saved_per_image,
            peak=self.peak,
        )


def _binarize(model: nn.Module, variant: Variant, binary: dict[str, Any], size: int) -> None:
    fields = dict(binary)
    if variant == "sign":
        fields["activation"] = "sign"
    if variant == "naive":
        fields["keeps"] = "floats"
    dl.binarize_(model, dl.BinaryConfig(**fields), (2, 3, size, size))
    if variant == "naive":
        make_plain_(model)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: str, threads: int | None = None) -> dict[str, Any]:
    """Where a measurement was made, without a name of the machine; by torch's number of threads if none is given."""
    return {
        "processor": (_cpu() or platform.machine()) if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "design_lightning": dl.__version__,
    }


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def as_dict(config: StepConfig, results: Sequence[StepResult]) -> dict[str, Any]:
    """Everything about a measurement as plain values."""
    where = machine(config.device, config.threads)
    return {"config": asdict(config), "machine": where, "results": [asdict(result) for result in results]}
