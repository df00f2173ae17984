"""What a training on many GPUs costs, by a model of a step: benchmarks/results/scale.json, and the tables of docs/scale.md.

    python benchmarks/scale.py                  # measures here, writes both
    python benchmarks/scale.py --keep           # writes both anew from what was measured
    python benchmarks/scale.py --step_ms 9.5    # tables on the screen from a step of yours: 64 images, one GPU

A step of n GPUs, g of them in a node, m = n / g nodes, B images a GPU:

    compute   B / throughput, at least `launch_ms`, times the measured ratio of a binary to the float network; a teacher's forward
    reduce    2 (g-1)/g G / nvlink + 2 (m-1)/m G / network of a node, G the bytes of the gradient; plus the latency of its hops
    syncbn    for each batch norm an all-gather in the forward pass and an all-reduce in the backward pass, of latency alone
    input     B / (workers / CPU time of an image)
    step      max(compute + syncbn + what of `reduce` does not fit beside the backward pass, input)

Nothing here was measured on a GPU.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scale_measured import SIZES, recipe_steps, recipes, two_processes

from design_lightning.training.step_benchmark import machine

HERE = Path(__file__).parent
RESULTS, DOC = HERE / "results" / "scale.json", HERE.parent / "docs" / "scale.md"
LOADING = HERE / "results" / "data_loading.json"
IMAGES, FILE_BYTES = 1_281_167, 110_000
GPUS = (1, 8, 64, 512)
BATCH, ROUNDS = 8, 9
GLOBAL_BATCH = {
    "adambnn_resnet18_imagenet": 256,
    "bireal_resnet18_imagenet": 128,
    "reactnet_resnet18_imagenet": 512,
    "real2binary_resnet18_imagenet": 256,
    "recu_resnet18_imagenet": 512,
    "resnet18_imagenet": 512,
}
"""Images a step, as the recipes' headers say."""
CHECKED = "resnet18_imagenet"
CHECKS = {"8 images of 224": (8, 224, 9), "2 images of 64": (2, 64, 41)}
"""What two processes are checked with: images a process, their pixels, rounds."""


@dataclass(frozen=True)
class Cluster:
    """A node's links, bytes a second in one direction, as published; and what is assumed of them.

    Args:
        nvlink: of a GPU to the others of its node.
        network: of a node to the others.
        gpus: of a node.
        share: of a link's bandwidth that a collective reaches.
        near_us, far_us: microseconds of latency a hop, within a node and between two.
    """

    name: str
    nvlink: float
    network: float
    gpus: int = 8
    share: float = 0.7
    near_us: float = 2.0
    far_us: float = 10.0

    def latency_ms(self, n: int) -> float:
        """Of a collective there and back: around the ring of a node, up and down a tree of nodes."""
        near, far = 2 * (min(n, self.gpus) - 1), 2 * math.ceil(math.log2(max(n // self.gpus, 1)))
        return (near * self.near_us + far * self.far_us) / 1000

    def reduce_ms(self, n: int, size: float, calls: int = 1) -> float:
        """An all-reduce of so many bytes, in so many calls."""
        g, m = min(n, self.gpus), max(n // self.gpus, 1)
        seconds = 2 * (g - 1) / g * size / (self.share * self.nvlink) + 2 * (m - 1) / m * size / (
            self.share * self.network
        )
        return 1000 * seconds + calls * self.latency_ms(n)


# DGX A100: NVLink 3 of 600 GB/s both ways, 8 ports of HDR InfiniBand. DGX H100: 900 GB/s, 8 ports of NDR.
CLUSTERS = (
    Cluster("HDR x8", nvlink=300e9, network=8 * 25e9),
    Cluster("100 GbE", nvlink=300e9, network=12.5e9),
    Cluster("10 GbE", nvlink=300e9, network=1.25e9),
)


@dataclass(frozen=True)
class Gpu:
    """One GPU's training of float ResNet-18, and what of a step does not shrink with the batch.

    Args:
        images_per_second: of training.
        launch_ms: of a step's kernels, however small: an assumption.
    """

    name: str
    images_per_second: float
    launch_ms: float = 6.0


# A100: 2,470 images a second of ResNet-50 in mixed precision (NVIDIA, DeepLearningExamples, ResNet50 v1.5 for PyTorch, 21.03),
# times ResNet-18 to ResNet-50 on an RTX 3090 (timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv).
TIMM = {"resnet18": 3481.78, "resnet34": 2036.51, "resnet50": 1218.01}
A100 = Gpu("A100", 2470 * TIMM["resnet18"] / TIMM["resnet50"])
NVIDIA_8_GPUS = 16621 / (8 * 2470)


@dataclass(frozen=True)
class Job:
    """What is trained.

    Args:
        ratio: of a step to the float network's, as measured.
        teacher: the forward of the teacher as a share of a float step.
        cpu_ms: of loading an image, as measured.
    """

    ratio: float
    teacher: float
    gradient_bytes: float
    batch_norms: int
    cpu_ms: float
    workers: int


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step, and its parts."""

    compute: float
    reduce: float
    exposed: float
    syncbn: float
    input: float
    step: float


def step(job: Job, gpu: Gpu, cluster: Cluster, n: int, batch: int, synchronised: bool = False) -> Step:
    """A step of n GPUs with so many images each."""
    compute = max(1000 * batch / gpu.images_per_second, gpu.launch_ms) * (job.ratio + job.teacher)
    backward = 2 / 3 * compute * job.ratio / (job.ratio + job.teacher)
    reduce = cluster.reduce_ms(n, job.gradient_bytes, calls=2) if n > 1 else 0.0
    exposed = max(0.0, reduce - backward)
    # An all-gather goes one way where an all-reduce goes there and back.
    syncbn = (1 / 2 + 1) * job.batch_norms * cluster.latency_ms(n) if synchronised and n > 1 else 0.0
    loading = batch * job.cpu_ms / job.workers
    return Step(compute, reduce, exposed, syncbn, loading, max(compute + exposed + syncbn, loading))


def job_of(name: str, measured: dict[str, Any], cpu_ms: float) -> Job:
    """A recipe as the model sees it."""
    recipe, found = recipes()[name], measured["recipes"][name]
    teacher = (recipe["model"]["init_args"].get("distillation") or {}).get("teacher", "").partition(".")[0]
    # A forward is a third of a step.
    share = TIMM["resnet18"] / TIMM[teacher] / 3 if teacher else 0.0
    workers = recipe["data"]["init_args"]["num_workers"]
    return Job(found["of_float"], share, 4 * found["parameters"], found["batch_norms"], cpu_ms, workers)


def fit_link(all_reduce_ms: dict[str, float]) -> tuple[float, float]:
    """Latency in ms, and bytes a ms, of an all-reduce of two: the smallest size, and the line to the largest."""
    latency = all_reduce_ms[str(SIZES[0])]
    return latency, SIZES[-1] / (all_reduce_ms[str(SIZES[-1])] - latency)


def check(two: dict[str, Any]) -> dict[str, float]:
    """A step of two processes as the model has it, and as it was."""
    latency, speed = fit_link(two["all_reduce_ms"])
    reduce = 2 * latency + two["gradient_bytes"] / speed
    predicted = two["beside_ms"] + reduce  # nothing is hidden: the CPU that computes is the one that moves bytes
    return {
        "contention": two["beside_ms"] / two["one_ms"],
        "latency_ms": latency,
        "gigabytes_a_second": speed / 1e6,
        "reduce_ms": reduce,
        "predicted_ms": predicted,
        "measured_ms": two["ddp_ms"],
        "error": predicted / two["ddp_ms"] - 1,
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown, its numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def tables(measured: dict[str, Any], cpu_ms: float, gpu: Gpu = A100) -> dict[str, str]:
    """The tables of the document."""
    checks = [(two, check(two)) for two in measured["two_processes"].values()]
    lines = {
        "one process": [two["one_ms"] for two, _ in checks],
        "two side by side, each for itself": [two["beside_ms"] for two, _ in checks],
        "all-reduce of 46.8 MB, by latency and bandwidth": [found["reduce_ms"] for _, found in checks],
        "two by DDP, predicted": [found["predicted_ms"] for _, found in checks],
        "two by DDP, measured": [found["measured_ms"] for _, found in checks],
    }
    rows = [[name, *(f"{value:,.0f}" for value in values)] for name, values in lines.items()]
    rows.append(["error of the prediction", *(f"{found['error']:+.0%}" for _, found in checks)])
    result = {"check": table(["ms", *(f"{name} pixels" for name in measured["two_processes"])], rows)}
    job = job_of(CHECKED, measured, cpu_ms)
    quick = replace(job, cpu_ms=0.0)
    rows = []
    for cluster in CLUSTERS:
        for n in GPUS[1:]:
            at = step(quick, gpu, cluster, n, 64)
            sync = step(quick, gpu, cluster, n, 64, synchronised=True)
            alone = step(quick, gpu, cluster, 1, 64).step
            shares = [f"{alone / each.step:.0%}" for each in (at, sync)]
            rows.append(
                [cluster.name, str(n), *(f"{v:.1f}" for v in (at.compute, at.reduce, at.exposed, sync.syncbn)), *shares]
            )
    head = ["network of a node", "GPUs", "compute", "reduce", "not hidden", "SyncBN", "efficiency", "with SyncBN"]
    result["links"] = table(head, rows)
    rows = []
    for n in GPUS:
        rate = 1000 * n * 64 / step(quick, gpu, CLUSTERS[0], n, 64).step
        rows.append([str(n), f"{rate:,.0f}", f"{rate * cpu_ms / 1000:,.0f}", f"{rate * FILE_BYTES / 1e9:,.1f}"])
    result["input"] = table(["GPUs", "images a second", "CPU cores", "GB read a second"], rows)
    rows = []
    for name, recipe in recipes().items():
        job, epochs = job_of(name, measured, cpu_ms), recipe["trainer"]["max_epochs"]
        batch = recipe["data"]["init_args"]["batch_size"]

        def hours(n: int, each: int, job: Job = job, epochs: int = epochs) -> str:
            return _short(epochs * IMAGES / (n * each) * step(job, gpu, CLUSTERS[0], n, each).step / 3.6e6)

        kept = GLOBAL_BATCH[name]
        at = step(job, gpu, CLUSTERS[0], 8, batch)
        grown = [hours(n, batch) for n in GPUS]
        same = [hours(n, max(kept // n, 1)) if kept >= n else "-" for n in GPUS[1:]]
        short = name.removesuffix("_imagenet").removesuffix("_resnet18")
        bound = "input" if at.step == at.input else "compute"
        rows.append(
            [
                short,
                str(epochs),
                f"{job.ratio:.2f}",
                *grown,
                *same,
                bound,
            ]
        )
    head = ["recipe", "epochs", "of float", *map(str, GPUS), *(f"{n} kept" for n in GPUS[1:]), "bound by"]
    result["recipes"] = table(head, rows)
    return result


def _short(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 20 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def cpu_ms() -> float:
    """CPU time of an image, as `benchmarks/data_loading.py` measured it: crop and flip, bytes, two workers."""
    found = json.loads(LOADING.read_text("utf-8"))["results"]
    return next(
        row["cpu_milliseconds_an_image"]
        for row in found
        if (row["way"], row["workers"], row["color_jitter"]) == ("bytes", 2, 0.0)
    )


def write_document(shown: dict[str, str], path: Path = DOC) -> None:
    """Puts the tables between their marks."""
    text = path.read_text("utf-8")
    for name, each in shown.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        text = before + start + each + "\n" + rest[rest.index(end) :]
    path.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="do not measure again")
    parser.add_argument(
        "--step_ms", type=float, help="of float ResNet-18 with 64 images on your GPU: prints tables, writes nothing"
    )
    arguments = parser.parse_args()
    if arguments.keep or arguments.step_ms:
        measured = json.loads(RESULTS.read_text("utf-8"))["measured"]
    else:
        say = lambda text: print(text, file=sys.stderr)  # noqa: E731
        measured = {
            "machine": machine("cpu", threads=1),
            "batch": BATCH,
            "rounds": ROUNDS,
            "recipes": recipe_steps(BATCH, ROUNDS, say),
            "two_processes": {name: two_processes(CHECKED, *each) for name, each in CHECKS.items()},
        }
    if arguments.step_ms:
        print("\n\n".join(tables(measured, cpu_ms(), Gpu("yours", 64_000 / arguments.step_ms, 0.0)).values()))
        return
    assumed = {"gpu": asdict(A100), "clusters": [asdict(each) for each in CLUSTERS], "cpu_ms_an_image": cpu_ms()}
    ratios = [found["of_float"] for name, found in measured["recipes"].items() if name != "float resnet18"]
    results = {
        "measured": measured,
        "check": {name: check(two) for name, two in measured["two_processes"].items()},
        "assumed": assumed,
        "median_of_float": statistics.median(ratios),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    write_document(tables(measured, cpu_ms()))


if __name__ == "__main__":
    main()
