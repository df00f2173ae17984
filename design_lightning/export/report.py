"""What an export wrote, and how it compares with the network that it came from."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from design_lightning.export.verification import Agreement


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it compares with the network that it came from.

    Args:
        format: its name.
        path: of the file; OpenVINO's `.bin` lies beside it.
        bytes: on disk, of all its files.
        agreement: with PyTorch's outputs.
        one_bit: the share of the operations of binary layers that the engine runs as 1-bit; 0 where it unpacks all weights.
        milliseconds: the median for one image on one thread; None if it was not timed.
        accuracy: top-1 on the images; None without labels.
        stay_float: binary layers that run as float though the engine has 1-bit ones, and why.
    """

    format: str
    path: Path
    bytes: int
    agreement: Agreement
    one_bit: float
    milliseconds: float | None
    accuracy: float | None = None
    stay_float: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exports:
    """What `export_model` wrote: a sequence of `Exported`, which prints as a table.

    Args:
        files: one for each format.
        images: in words, what was compared.
        accuracy: of the network itself, top-1 on the images; None without labels.
    """

    files: tuple[Exported, ...]
    images: str
    accuracy: float | None = None

    def table(self) -> Table:
        """For a terminal of 80 columns."""
        is_timed = any(each.milliseconds is not None for each in self.files)
        rightly = "" if self.accuracy is None else f", of which PyTorch classifies {self.accuracy:.1%} rightly"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left")
        table.title = f"compared with PyTorch on {self.images}{rightly}"
        table.caption = (
            "diff: the largest difference of the outputs, relative to the largest output of its image. ties: images with a value "
            "within 1e-5 of its threshold, of which a bit may differ. tied: the difference of these. same: share of images with "
            "the same class. 1-bit: share of binary operations that run so."
            + ("" if self.accuracy is None else " top-1: accuracy.")
            + (" ms: one image, one thread." if is_timed else "")
        )
        table.add_column("format", no_wrap=True)
        shown = {"MB": True, "diff": True, "ties": True, "tied": True, "same": True}
        shown |= {"top-1": self.accuracy is not None, "1-bit": True, "ms": is_timed}
        for name in (name for name, is_shown in shown.items() if is_shown):
            table.add_column(name, justify="right")
        for each in self.files:
            a = each.agreement
            table.add_row(
                each.format,
                f"{each.bytes / 1e6:.2f}",
                *(_short(a.difference), str(a.images_with_ties), _short(a.difference_with_ties), f"{a.top1:.0%}"),
                *([] if each.accuracy is None else [f"{each.accuracy:.1%}"]),
                f"{each.one_bit:.0%}",
                *([] if each.milliseconds is None else [f"{each.milliseconds:.2f}"]),
            )
        return table

    def to_dict(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [{**asdict(each), "path": str(each.path)} for each in self.files]

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80, file=open(os.devnull, "w"), record=True, force_jupyter=False)  # noqa: SIM115
        console.print(self.table())
        return console.export_text()


def _short(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.1e}"
