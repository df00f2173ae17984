"""What `scale.py` measures on a CPU: steps of the recipes' networks, gloo's all-reduce, steps of one process and of two."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import design_lightning as dl
import design_lightning.configs

CONFIGS = Path(design_lightning.configs.__path__[0])
SIZES = [2**power for power in range(10, 27, 2)]
"""Of an all-reduce, in bytes."""


def recipes() -> dict[str, dict[str, Any]]:
    """The ImageNet recipes by name."""
    found = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(CONFIGS.glob("*imagenet.yaml"))}
    return {name: recipe for name, recipe in found.items() if recipe["data"]["class_path"] == "ImageFolder"}


def network(recipe: dict[str, Any] | None) -> nn.Module:
    """The network of a recipe as it is in its last stage; float ResNet-18 without one."""
    torch.manual_seed(0)
    arguments = {"backbone": "resnet18"} if recipe is None else recipe["model"]["init_args"]
    model: nn.Module = timm.create_model(arguments["backbone"], **arguments.get("backbone_args", {}))
    if recipe is not None:
        dl.binarize_(model, dl.BinaryConfig(**arguments["binary"]))
    return model.train()


class Steps:
    """Training steps of a network on the same images again and again."""

    def __init__(self, model: nn.Module, batch: int, size: int = 224) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.images, self.labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def __call__(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def recipe_steps(batch: int, rounds: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of each recipe's network, and the median of its ratio to the float network's in the same round.

    One process of one thread; the networks take turns.
    """
    torch.set_num_threads(1)
    steps = {"float resnet18": Steps(network(None), batch)}
    steps |= {name: Steps(network(recipe), batch) for name, recipe in recipes().items()}
    for each in steps.values():
        each()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        say(f"networks: round {number + 1} of {rounds}")
        for name, each in steps.items():
            times[name].append(each())
    first = times["float resnet18"]
    return {
        name: {
            "step_ms": 1000 * statistics.median(found),
            "of_float": statistics.median(a / b for a, b in zip(found, first, strict=True)),
            "parameters": sum(p.numel() for p in steps[name].model.parameters()),
            "batch_norms": sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in steps[name].model.modules()),
        }
        for name, found in times.items()
    }


def two_processes(recipe: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Steps of one process, of two side by side, and of two by DDP; and all-reduces by size: medians, of a process of one thread.

    All take turns within a round.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.pt"
        arguments = (recipe, batch, size, rounds, f"file://{folder}/rendezvous", str(out))
        torch.multiprocessing.spawn(_worker, args=arguments, nprocs=2)  # type: ignore[no-untyped-call]
        found: dict[str, Any] = torch.load(out)
    return found


def _worker(rank: int, recipe: str, batch: int, size: int, rounds: int, where: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    plain = Steps(network(recipes()[recipe]), batch, size)
    ddp = Steps(DistributedDataParallel(network(recipes()[recipe])), batch, size)
    buffers = [torch.randn(size // 4) for size in SIZES]
    times: dict[str, list[float]] = {"one": [], "beside": [], "ddp": []}
    reduces: list[list[float]] = [[] for _ in SIZES]
    for number in range(rounds + 1):
        found = {"one": plain() if rank == 0 else 0.0}
        dist.barrier()
        found["beside"] = _slowest(plain())
        dist.barrier()
        found["ddp"] = _slowest(ddp())
        found_sizes = [_reduce(buffer) for buffer in buffers]
        if number:
            for name, value in found.items():
                times[name].append(value)
            for all_of, value in zip(reduces, found_sizes, strict=True):
                all_of.append(value)
        dist.barrier()
    if rank == 0:
        gradient = 4 * sum(parameter.numel() for parameter in plain.model.parameters())
        medians = {f"{name}_ms": 1000 * statistics.median(value) for name, value in times.items()}
        spread = {f"{name}_quartiles_ms": _quartiles(value) for name, value in times.items()}
        by_size = {str(size): 1000 * statistics.median(value) for size, value in zip(SIZES, reduces, strict=True)}
        torch.save({**medians, **spread, "gradient_bytes": gradient, "all_reduce_ms": by_size}, out)
    dist.destroy_process_group()


def _slowest(seconds: float) -> float:
    """A step ends for all when it has ended for the last."""
    value = torch.tensor(seconds)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _reduce(buffer: Tensor, repeats: int = 5) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(buffer)
        buffer /= 2
    return (time.perf_counter() - start) / repeats


def _quartiles(seconds: list[float]) -> list[float]:
    return [1000 * value for value in statistics.quantiles(seconds, n=4)[::2]]
