"""A summary of the model at the start of training that shows what is binary."""

from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from design_lightning.binary import BinaryLayer
from design_lightning.surgery import BinarizationReport
from design_lightning.surgery.parts import Operations, count_parts, total


class BinarySummary(Callback):
    """Prints a table of the network's parts: binary layers, 1-bit and float parameters, and operations where known.

    It reads the report of surgery, if the LightningModule has one as `report`, and the modules themselves.

    Args:
        max_depth: how deep a part may lie in the module tree; 1 is the direct children of the backbone.
        every_layer: print the whole report of surgery instead, a line for each layer with the rule behind it.
    """

    def __init__(self, max_depth: int = 1, every_layer: bool = False) -> None:
        self.max_depth = max_depth
        self.every_layer = every_layer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not trainer.is_global_zero:
            return
        console = Console()
        report = getattr(pl_module, "report", None)
        if isinstance(report, BinarizationReport) and self.every_layer:
            console.print(report.table())
            return
        network = getattr(pl_module, "backbone", pl_module)
        console.print(
            summary_table(network, report if isinstance(report, BinarizationReport) else None, self.max_depth)
        )
        if isinstance(report, BinarizationReport):
            console.print(report.summary(), highlight=False)


def summary_table(network: nn.Module, report: BinarizationReport | None = None, max_depth: int = 1) -> Table:
    """The table that `BinarySummary` prints, of a network and the report of its surgery."""
    operations = report.operations if report else Operations()
    parts = count_parts(network, [(name,) for name in _children(network, max_depth)], operations)
    every = total(parts)
    table = Table(box=None, header_style="bold", pad_edge=False, show_footer=True)
    table.add_column("part", "all", no_wrap=True)
    table.add_column("type", type(network).__name__, overflow="ellipsis", no_wrap=True)
    table.add_column("binary", f"{every.binary_layers}/{every.layers}", justify="right", no_wrap=True)
    table.add_column("1-bit", f"{every.one_bit:,}", justify="right", no_wrap=True, style="green")
    table.add_column("float", f"{every.floats:,}", justify="right", no_wrap=True)
    if every.ops:
        table.add_column("M binary", f"{every.bops / 1e6:,.1f}", justify="right", style="green")
        table.add_column("M float", f"{every.flops / 1e6:,.1f}", justify="right")
    for part in parts:
        layers = f"{part.binary_layers}/{part.layers}" if part.layers else ""
        row = [part.name, part.kind, layers, f"{part.one_bit:,}", f"{part.floats:,}"]
        if every.ops:
            row += [f"{part.bops / 1e6:,.1f}", f"{part.flops / 1e6:,.1f}"]
        table.add_row(*row)
    return table


def _children(module: nn.Module, depth: int, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if depth > 1 and any(True for _ in child.children()) and not isinstance(child, BinaryLayer):
            yield from _children(child, depth - 1, f"{path}.")
        else:
            yield path
