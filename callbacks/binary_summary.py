"""A summary of the model at the start of training that shows what is binary."""

from collections.abc import Iterator
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from design_lightning.binary import BinaryLayer
from design_lightning.surgery import BinarizationReport


@dataclass
class _Part:
    """Counts of one part of the network."""

    name: str
    kind: str
    layers: int = 0
    binary_layers: int = 0
    one_bit: int = 0
    float32: int = 0
    binary_macs: int = 0
    macs: int = 0


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
    table = Table(box=None, header_style="bold", pad_edge=False, show_footer=True)
    parts = list(_parts(network, report, max_depth))
    one_bit, float32 = sum(p.one_bit for p in parts), sum(p.float32 for p in parts)
    table.add_column("part", "all", no_wrap=True)
    table.add_column("type", type(network).__name__, overflow="ellipsis", no_wrap=True)
    binary_layers, layers = sum(p.binary_layers for p in parts), sum(p.layers for p in parts)
    table.add_column("binary", f"{binary_layers}/{layers}", justify="right", no_wrap=True)
    table.add_column("1-bit", f"{one_bit:,}", justify="right", no_wrap=True, style="green")
    table.add_column("float", f"{float32:,}", justify="right", no_wrap=True)
    macs = sum(p.macs for p in parts)
    if macs:
        table.add_column("M binary", f"{sum(p.binary_macs for p in parts) / 1e6:,.1f}", justify="right", style="green")
        table.add_column("M float", f"{(macs - sum(p.binary_macs for p in parts)) / 1e6:,.1f}", justify="right")
    for part in parts:
        row = [
            part.name,
            part.kind,
            f"{part.binary_layers}/{part.layers}" if part.layers else "",
            f"{part.one_bit:,}",
            f"{part.float32:,}",
        ]
        if macs:
            row += [f"{part.binary_macs / 1e6:,.1f}", f"{(part.macs - part.binary_macs) / 1e6:,.1f}"]
        table.add_row(*row)
    return table


def _parts(network: nn.Module, report: BinarizationReport | None, max_depth: int) -> Iterator[_Part]:
    rows = {row.name: row for row in report.rows} if report else {}
    seen: set[int] = set()
    for name, module in _children(network, max_depth):
        part = _Part(name, type(module).__name__)
        latent = {id(m.weight) for m in module.modules() if isinstance(m, BinaryLayer)}
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                if id(parameter) in latent:
                    part.one_bit += _numel(parameter)
                else:
                    part.float32 += _numel(parameter)
        for inner, child in module.named_modules(prefix=name):
            is_layer = isinstance(child, nn.Conv2d | nn.Linear)
            part.layers += is_layer
            part.binary_layers += isinstance(child, BinaryLayer)
            if is_layer and inner in rows:
                part.macs += rows[inner].macs
                part.binary_macs += rows[inner].macs if rows[inner].is_binary else 0
        if part.one_bit or part.float32:
            yield part
    own = sum(_numel(p) for p in network.parameters() if id(p) not in seen)
    if own:
        yield _Part("(own)", type(network).__name__, float32=own)


def _numel(parameter: nn.Parameter) -> int:
    """The number of values; 0 for a lazy layer's, whose shape nobody knows yet."""
    return 0 if is_lazy(parameter) else parameter.numel()


def _children(module: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if depth > 1 and any(True for _ in child.children()) and not isinstance(child, BinaryLayer):
            yield from _children(child, depth - 1, f"{path}.")
        else:
            yield path, child
