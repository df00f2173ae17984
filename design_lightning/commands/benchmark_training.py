"""`design-train benchmark training`: time and memory of a training step, beside the float network's."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from design_lightning.commands.options import Options

if TYPE_CHECKING:
    from design_lightning.training.step_benchmark import StepConfig, StepResult


def main(command: str, args: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = Options(
        command,
        "Times training steps of a timm network as float, binary the naive way, and binary with bits for the backward "
        "pass, in turns; counts their memory by the allocator's events.",
    )
    options.add_argument("--model", default="resnet18", help="a timm network (%(default)s)")
    options.add_argument("--batch", type=int, default=32, help="images a step (%(default)s)")
    options.add_argument("--size", type=int, help="their height and width; the network's own by default")
    options.add_argument("--estimator", default="ste", help="the pseudo-gradient (%(default)s)")
    options.add_argument("--companion", default="identity", help="what replaces float activations (%(default)s)")
    options.add_argument("--policy", default="conservative", help="of the surgery (%(default)s)")
    options.add_argument("--variants", default="float,naive,bits,sign", help="some of %(default)s")
    options.add_argument("--modes", default="eager", help="eager, compiled, or eager,compiled (%(default)s)")
    options.add_argument("--rounds", type=int, default=10, help="timed steps of each (%(default)s)")
    options.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    options.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    options.add_argument("--channels_last", action="store_true", help="lay images and weights out so")
    options.add_argument("--out", help="a JSON file for the results as well")
    options.add_argument("--json", action="store_true", help="print JSON in place of the table")
    given = options.parse_args(args)
    from design_lightning.training.step_benchmark import StepConfig, as_dict, measure_steps

    config = StepConfig(
        model=given.model,
        batch=given.batch,
        size=given.size,
        binary={"estimator": given.estimator, "companion": given.companion, "policy": given.policy},
        variants=tuple(given.variants.split(",")),
        modes=tuple(given.modes.split(",")),
        rounds=given.rounds,
        threads=given.threads,
        device=given.device,
        channels_last=given.channels_last,
    )
    if given.out and not Path(given.out).resolve().parent.is_dir():
        raise ValueError(f"--out {given.out}: there is no folder {Path(given.out).parent}; make it first")
    results = measure_steps(config, lambda text: print(text, file=sys.stderr, flush=True))
    everything: dict[str, Any] = {"command": f"design-train {command} {' '.join(args)}", **as_dict(config, results)}
    if given.out:
        Path(given.out).write_text(json.dumps(everything, indent=2) + "\n")
    print(json.dumps(everything, indent=2)) if given.json else _print_table(config, results, everything["machine"])


def _print_table(config: "StepConfig", results: "Sequence[StepResult]", machine: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"training step of {config.model}, {config.batch} images", caption=_caption(config, machine))
    table.add_column("network")
    for name in ("fwd", "bwd", "step", "+-", "ratio", "img/s", "saved", "peak"):
        table.add_column(name, justify="right")
    for r in results:
        name = r.variant if len(config.modes) == 1 else f"{r.variant}, {r.mode}"
        times = (f"{value:.0f}" for value in (r.forward, r.backward, r.step, r.spread))
        memory = f"{r.saved_per_image / 1e6:.2f}", f"{r.peak / 1e6:.0f}"
        table.add_row(name, *times, f"{r.ratio:.3f}", f"{r.images_per_second:.1f}", *memory)
    Console().print(table)


def _caption(config: "StepConfig", machine: dict[str, Any]) -> str:
    return (
        "fwd, bwd, step: milliseconds, medians; +-: their interquartile range; ratio: of the first network's step in "
        "the same round; saved: MB an image that wait for the backward pass; peak: MB in a step. "
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    )
