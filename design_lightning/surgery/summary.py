"""A network before and after surgery, stage by stage: what it holds, what it computes, how many bytes it takes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from design_lightning.surgery.binarize import operate_
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.parts import Part, count_parts, stages_of, total
from design_lightning.surgery.probe import ProbeError, candidate_shapes, probe

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Stage:
    """One stage of a network.

    Args:
        now: its counts, binarized.
        before: the same of the float network; empty where only surgery made the stage.
        output: the shape of what it gives for an image, as the network lays it out; empty where nothing was called.
    """

    now: Part
    before: Part
    output: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists."""
        now, before = self.now, self.before
        return {
            "stage": now.name,
            "modules": list(now.modules),
            "output": list(self.output),
            "layers": now.layers,
            "binary_layers": now.binary_layers,
            "one_bit_parameters": now.one_bit,
            "float_parameters": now.floats,
            "scales": now.scales,
            "bops": now.bops,
            "flops": now.flops,
            "ops": now.ops,
            "flops_before": before.flops,
            "bytes_before": before.bytes,
            "bytes": now.bytes,
        }


@dataclass(frozen=True)
class Summary:
    """The stages of a network, and their sum.

    Args:
        input_shape: of an image, (C, H, W).
        stages: in the order of the module tree.
        notes: what surgery had to say.
    """

    input_shape: tuple[int, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Stage:
        """All stages together."""
        return Stage(total(s.now for s in self.stages), total(s.before for s in self.stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts and lists."""
        stages = [stage.to_dict() for stage in self.stages]
        total = {key: value for key, value in self.total.to_dict().items() if key not in ("stage", "modules", "output")}
        return {"input_shape": list(self.input_shape), "stages": stages, "total": total, "notes": list(self.notes)}

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        every = self.total
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), show_footer=True)
        table.add_column("stage", "all", overflow="fold")
        table.add_column("output", justify="right", no_wrap=True)
        for (head, style), cell in zip(_COLUMNS, _cells(every), strict=True):
            table.add_column(head, cell, justify="right", no_wrap=True, style=style)
        for stage in self.stages:
            table.add_row(stage.now.name, "x".join(map(str, stage.output)), *_cells(stage))
        return Group(table, Text(), Text(_in_words(every)), *(Text(f"note: {n}", style="yellow") for n in self.notes))


_COLUMNS = (
    *(("binary", ""), ("1-bit", "green"), ("float", ""), ("BOPs", "green"), ("FLOPs", ""), ("OPs", "")),
    *(("bytes", "dim"), ("now", "")),
)


def summarize(
    model: nn.Module, config: BinaryConfig | None, channels: int | None = None, size: Sequence[int] | None = None
) -> Summary:
    """Counts a network before and after surgery, which a copy of it goes through.

    Args:
        model: a float network, which may have no storage (`meta`).
        config: how to binarize it; None leaves it float.
        channels: C of its images; as its first layer has, if not given.
        size: (H, W) of its images; the network's own if not given.

    Raises:
        ValueError: if the network's forward fails on such images; and as `binarize_`.
    """
    shape = _shape(model, channels, size)
    try:
        seen = probe(model, shape)
    except ProbeError as error:
        raise ValueError(f"the network's forward fails, so nothing can be counted: {error}") from error
    operations, binary = seen.operations, copy.deepcopy(model)
    notes: tuple[str, ...] = ()
    if config is not None:
        report = operate_(binary, config, seen.input_shape).report()
        operations, notes = report.operations, report.notes
    groups = stages_of(binary, seen.outputs)
    before = {part.modules: part for part in count_parts(model, groups, seen.operations)}
    stages = [
        Stage(
            part, before.get(part.modules, Part()), seen.outputs.get(part.modules[-1], ())[1:] if part.modules else ()
        )
        for part in count_parts(binary, groups, operations)
    ]
    return Summary(seen.input_shape[1:], tuple(stages), notes)


def _shape(model: nn.Module, channels: int | None, size: Sequence[int] | None) -> tuple[int, ...] | None:
    if channels is None and size is None:
        return None
    batch, own_channels, *own_size = next(iter(candidate_shapes(model)))
    return (batch, channels or own_channels, *(size or own_size))


def _cells(stage: Stage) -> list[str]:
    now = stage.now
    layers = f"{now.binary_layers}/{now.layers}" if now.layers else ""
    counts = (now.one_bit, now.floats, now.bops, now.flops, now.ops, stage.before.bytes, now.bytes)
    return [layers, *(short(count) for count in counts)]


def short(count: float) -> str:
    """A number in at most five characters: three digits, and k, M, G or T; nothing for 0."""
    if count < 1:
        return ""
    if count < 1000:
        return f"{count:.0f}"
    mantissa, _, exponent = f"{count:.2e}".partition("e")  # rounded first: 999,600 is 1.00M
    thousands = min(int(exponent) // 3, 4)
    shift = int(exponent) - 3 * thousands
    return f"{float(mantissa) * 10**shift:.{max(2 - shift, 0)}f}{'kMGT'[thousands - 1]}"


def _in_words(every: Stage) -> str:
    now, before = every.now, every.before
    share = now.one_bit / max(now.one_bit + now.floats, 1)
    return (
        f"{now.binary_layers} of {now.layers} layers are binary: {share:.1%} of {now.one_bit + now.floats:,} parameters\n"
        f"{before.bytes / 1e6:,.2f} MB in float32 become {now.bytes / 1e6:,.2f} MB ({before.bytes / now.bytes:.1f} times less)\n"
        f"{before.ops / 1e6:,.1f} M operations become {now.ops / 1e6:,.1f} M ({before.ops / max(now.ops, 1):.1f} times less)\n"
        "OPs = BOPs / 64 + FLOPs; BOPs: multiply-accumulates of ±1, FLOPs: of floats"
    )
