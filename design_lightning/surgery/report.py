"""What `binarize_` did: a row for each layer and activation, with the rule behind it, and totals."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from design_lightning.surgery.parts import Operations, stored_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Row:
    """One layer, or one float activation.

    Args:
        name: the module's name in the model.
        before: its class before.
        after: what it is now; equal to `before` where it was left.
        rule: `binary`, `companion`, or why it was left: `first`, `last`, `depthwise`, `gate`, `downsample`, `override`,
            `no twin`, `not called`, `kept`, `reaches none`.
        reason: the rule in words.
        parameters: latent weights if it is binary now, else float weights (biases and norms apart).
        macs: multiply-accumulates an image, the products of two streams in an attention apart. 0 where no probe went through.
        binary_macs: how many of them are binary operations, of +-1 by +-1, in stage `both`.
    """

    name: str
    before: str
    after: str
    rule: str
    reason: str = ""
    parameters: int = 0
    macs: int = 0
    binary_macs: int = 0

    @property
    def is_binary(self) -> bool:
        """Whether the layer is binary now."""
        return self.rule == "binary"


@dataclass(frozen=True)
class BinarizationReport:
    """Every layer and activation of the model, and what happened to it.

    Args:
        rows: in the order of the module tree.
        parameters: all parameters of the model after surgery.
        binary_parameters: how many of them are 1-bit weights; a tied weight counts once.
        scales: how many factors the weight binarizers compute, one an output channel, which are no parameters.
        bytes_before: the size of the float32 parameters before.
        notes: what else a user should know: an impossible probe, a binarizer behind a kept ReLU, ...
        products: multiply-accumulates an image of two streams, as in an attention, by the module in which they happen.
    """

    rows: tuple[Row, ...]
    parameters: int
    binary_parameters: int
    scales: int
    bytes_before: int
    notes: tuple[str, ...] = field(default=())
    products: Mapping[str, int] = field(default_factory=dict)

    @property
    def binary(self) -> tuple[Row, ...]:
        """The rows of the layers that are binary now."""
        return tuple(row for row in self.rows if row.is_binary)

    @property
    def binary_macs(self) -> int:
        """Binary multiply-accumulates an image."""
        return sum(row.binary_macs for row in self.rows)

    @property
    def total_macs(self) -> int:
        """All multiply-accumulates an image, of the layers with weights."""
        return sum(row.macs for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """The size with one bit a binary weight, and float32 for the rest and the scales."""
        return stored_bytes(self.binary_parameters, self.parameters - self.binary_parameters + self.scales)

    @property
    def operations(self) -> Operations:
        """Multiply-accumulates an image in stage `both`, those of two streams among them, by module."""
        floats = Counter(self.products)
        floats.update({row.name: row.macs - row.binary_macs for row in self.rows})
        return Operations({row.name: row.binary_macs for row in self.rows}, floats)

    def totals(self) -> dict[str, Any]:
        """Counts and shares."""
        return {
            "layers": sum(1 for row in self.rows if row.rule not in _ACTIVATION_RULES),
            "binary_layers": len(self.binary),
            "parameters": self.parameters,
            "binary_parameters": self.binary_parameters,
            "binary_parameters_share": self.binary_parameters / max(self.parameters, 1),
            "macs": self.total_macs,
            "binary_macs": self.binary_macs,
            "binary_macs_share": self.binary_macs / max(self.total_macs, 1),
            "scales": self.scales,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def to_json(self) -> str:
        """Rows, totals and notes as JSON."""
        return json.dumps(
            {
                "rows": [dataclasses.asdict(row) for row in self.rows],
                "totals": self.totals(),
                "notes": list(self.notes),
            },
            indent=2,
        )

    def table(self) -> "RenderableType":
        """The rows as a rich table, with the totals and notes below."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        table.add_column("was", overflow="fold")
        table.add_column("is", overflow="fold")
        table.add_column("why", overflow="fold")
        table.add_column("weights", justify="right", no_wrap=True)
        for row in self.rows:
            style = "green" if row.is_binary else "cyan" if row.rule == "companion" else "dim"
            after = "=" if row.after == row.before else row.after
            why = f"{row.rule}: {row.reason}" if row.reason else row.rule
            table.add_row(
                row.name, row.before, after, why, f"{row.parameters:,}" if row.parameters else "", style=style
            )
        return Group(
            table, Text(""), Text(self.summary()), *(Text(f"note: {note}", style="yellow") for note in self.notes)
        )

    def summary(self) -> str:
        """The totals in two lines."""
        t = self.totals()
        macs = f", {t['binary_macs_share']:.1%} of {t['macs'] / 1e6:,.1f} M operations" if t["macs"] else ""
        return (
            f"{t['binary_layers']} of {t['layers']} layers are binary: {t['binary_parameters_share']:.1%} of "
            f"{t['parameters']:,} parameters{macs}\n"
            f"{t['bytes_before'] / 1e6:,.2f} MB in float32 become {t['bytes_after'] / 1e6:,.2f} MB with 1-bit weights"
        )

    def __str__(self) -> str:
        import io
        import shutil

        from rich.console import Console

        width = shutil.get_terminal_size(fallback=(120, 24)).columns
        console = Console(file=io.StringIO(), width=width, force_terminal=False, force_jupyter=False)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


_ACTIVATION_RULES = {"companion", "kept", "reaches none"}
