"""`design-train benchmark inference`: how long one image takes, as float, as int8, and as 1-bit files."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from design_lightning.commands.options import Options

if TYPE_CHECKING:
    from design_lightning.export.inference_benchmark import InferenceConfig, InferenceResult

_COLUMNS = {
    "float_pytorch": "torch",
    "float_onnx": "ort",
    "float_openvino": "ov",
    "float_openvino_int8": "ov8",
}
"""What a variant is called at the head of the column that compares with it."""


def main(command: str, args: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = Options(
        command,
        "Times one image on the CPU, in turns: a network with random weights as float and as int8 in each engine, and as "
        "the binary files that this project writes; or files that it wrote.",
    )
    options.add_argument("--model", help="a network of timm or of design_lightning.models (resnet18, if no files)")
    options.add_argument("--classes", type=int, default=1000, help="of the network (%(default)s)")
    options.add_argument("--size", type=int, help="height and width of its images; the network's own by default")
    options.add_argument("--files", nargs="+", default=[], help="exported files: .onnx, .xml, .safetensors or .ckpt")
    options.add_argument(
        "--variants",
        help="of the network; all by default: float_pytorch, float_onnx, float_onnx_int8, float_openvino, float_openvino_int8, "
        "packed, onnx, onnx_int8, openvino, openvino_int8",
    )
    options.add_argument("--threads", default="1,all", help="of the CPU, one after the other (%(default)s)")
    options.add_argument("--rounds", type=int, default=30, help="turns of each (%(default)s)")
    options.add_argument("--out", help="a JSON file for the results as well")
    options.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    given = options.parse_args(args)
    if given.out and not Path(given.out).resolve().parent.is_dir():
        raise ValueError(f"--out {given.out}: there is no folder {Path(given.out).parent}; make it first")
    # Read when torch is loaded. On a machine that does other things too, a thread that spins keeps the one that it waits for from
    # running: two threads then take a hundred times as long as one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from design_lightning.export.inference_benchmark import InferenceConfig, as_dict, measure_inference
    from design_lightning.export.inference_variants import VARIANTS

    config = InferenceConfig(
        model=given.model or (None if given.files else "resnet18"),
        classes=given.classes,
        size=given.size,
        variants=VARIANTS if given.variants is None else tuple(given.variants.split(",")),
        files=tuple(given.files),
        threads=_threads(given.threads),
        rounds=given.rounds,
    )
    results = measure_inference(config, lambda text: print(text, file=sys.stderr, flush=True))
    everything: dict[str, Any] = {"command": f"design-train {command} {' '.join(args)}", **as_dict(config, results)}
    if given.out:
        Path(given.out).write_text(json.dumps(everything, indent=2) + "\n")
    print(json.dumps(everything, indent=2)) if given.json else _print_tables(config, results, everything["machine"])


def _threads(words: str) -> tuple[int, ...]:
    from design_lightning.export.inference_benchmark import all_threads

    numbers = []
    for word in words.split(","):
        if word != "all" and not word.isdecimal():
            raise ValueError(f"--threads {words}: {word!r} is no number; give such as 1,all")
        numbers.append(all_threads() if word == "all" else int(word))
    return tuple(dict.fromkeys(numbers))


def _print_tables(config: "InferenceConfig", results: "Sequence[InferenceResult]", machine: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    references = [name for name in results[0].speedup if name in _COLUMNS] or list(results[0].speedup)
    for threads in config.threads:
        title = f"{config.model or 'files'}, one image, {threads} thread{'s' * (threads > 1)}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
        table.add_column("network", overflow="fold")
        for name in ("MB", "1-bit", "ms", "+-", *(_COLUMNS.get(name, "first") for name in references)):
            table.add_column(name, justify="right", no_wrap=True)
        for r in (r for r in results if r.threads == threads):
            speedups = (f"{r.speedup[name]:.2f}" for name in references)
            size, spread = f"{r.bytes / 1e6:.2f}", f"{r.high - r.low:.2f}"
            table.add_row(r.name, size, str(r.one_bit_layers or "-"), f"{r.median:.2f}", spread, *speedups)
        console.print(table)
    console.print(_caption(references, machine), style="dim", highlight=False)


def _caption(references: Sequence[str], machine: dict[str, Any]) -> str:
    meanings = ", ".join(f"{_COLUMNS.get(name, 'first')}: {name}" for name in references)
    engines = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino") if name in machine)
    return (
        "1-bit: layers that the engine runs so. ms: the median; +-: the interquartile range. On the right, how many times as "
        f"fast as, in the same round: {meanings}. Float is float32. {machine['processor']}, {engines}."
    )
