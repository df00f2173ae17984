"""How much accuracy each binary layer costs: binarized alone, and left float alone.

Two questions of every layer, answered on the same images:

    loss    accuracy of the float network, less that with this layer alone binary
    gain    accuracy with all layers binary but this one, less that of the binary network

Nothing is rebuilt or trained: the stage of the layers is switched on the live model, which is left as it was found. So the
activations between layers are the companions in every measurement, the float network's, too; a network that is built with
overrides keeps its own activation where no binary layer follows.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from design_lightning.binary import BinaryLayer, Stage
from design_lightning.surgery.stages import binary_layers
from design_lightning.training.batch_norm import recalibrate_batch_norm_, running_batch_norms

if TYPE_CHECKING:
    from rich.console import RenderableType

Order = Literal["loss", "gain"]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer costs. Accuracies are shares of the images, errors one standard error of a paired difference.

    Args:
        layer: its name in the model.
        weights: its latent weights.
        alone: the accuracy where this layer alone is binary.
        loss: the float network's accuracy less `alone`.
        loss_error: of `loss`.
        without: the accuracy where every other layer is binary.
        gain: `without` less the binary network's accuracy.
        gain_error: of `gain`.
    """

    layer: str
    weights: int
    alone: float
    loss: float
    loss_error: float
    without: float
    gain: float
    gain_error: float


@dataclass(frozen=True)
class Sensitivity:
    """The binary layers of a model, with what each costs.

    Args:
        rows: a row a layer, in the order of the module tree.
        images: how many images were measured.
        float_accuracy: where no layer is binary: the latent weights as they are.
        binary_accuracy: where all layers are.
        batch_norm: which statistics the batch norms had, in words.
        notes: what else a reader should know.
    """

    rows: tuple[LayerSensitivity, ...]
    images: int
    float_accuracy: float
    binary_accuracy: float
    batch_norm: str
    notes: tuple[str, ...] = field(default=())

    @property
    def order(self) -> Order:
        """What ranks the layers if nothing else is asked for: `loss`, or `gain` where the float network is the worse one."""
        return "gain" if self.float_accuracy < self.binary_accuracy else "loss"

    def ranked(self, by: Order | None = None) -> list[LayerSensitivity]:
        """The rows, the most sensitive first: by `loss` or by `gain`, by `order` if not given.

        Raises:
            ValueError: if the order is neither.
        """
        by = self.order if by is None else by
        if by not in get_args(Order):
            raise ValueError(f"unknown order {by!r}: use one of {', '.join(get_args(Order))}")
        return sorted(self.rows, key=lambda row: -getattr(row, by))

    def overrides(self, keep: int, by: Order | None = None) -> dict[str, None]:
        """The `overrides` of a `BinaryConfig` that leave the `keep` most sensitive layers float.

        They are fewer, or none, where fewer layers have a figure above one standard error.

        Raises:
            ValueError: if there are not so many.
        """
        if not 0 <= keep <= len(self.rows):
            raise ValueError(f"keep is {keep}, but there are {len(self.rows)} binary layers")
        by = self.order if by is None else by
        clear = [row for row in self.ranked(by) if getattr(row, by) > getattr(row, f"{by}_error")]
        return dict.fromkeys(row.layer for row in clear[:keep])

    def overrides_yaml(self, keep: int, by: Order | None = None, others: Mapping[str, Any] | None = None) -> str:
        """The same as a block to paste below `binary:`.

        Args:
            keep: how many layers stay float at most.
            by: as in `ranked`.
            others: overrides that the configuration has already; they come first, since the last match wins.
        """
        block = {"overrides": {**(others or {}), **self.overrides(keep, by)}}
        return yaml.safe_dump(block, sort_keys=False, default_flow_style=False, width=120)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_csv(self, path: str | Path) -> None:
        """Writes a line a layer, in the order of the module tree."""
        names = [f.name for f in dataclasses.fields(LayerSensitivity)]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([getattr(row, name) for name in names] for row in self.rows)

    def table(self, by: Order | None = None) -> "RenderableType":
        """A rich table in points of accuracy, the most sensitive layer first, with what was measured below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", overflow="fold")
        table.add_column("weights", justify="right", no_wrap=True)
        table.add_column("binary alone:\nloss", justify="right", no_wrap=True)
        table.add_column("float alone:\ngain", justify="right", no_wrap=True)
        for row in self.ranked(by):
            loss, gain = _points(row.loss, row.loss_error), _points(row.gain, row.gain_error)
            table.add_row(Text(row.layer), f"{row.weights:,}", loss, gain)
        notes = [Text(f"note: {note}", style="yellow") for note in self.notes]
        return Group(table, Text(""), Text(self.summary()), *notes)

    def summary(self) -> str:
        """What was measured, in three lines."""
        return (
            f"float {self.float_accuracy:.1%}, binary {self.binary_accuracy:.1%} top-1 on {self.images:,} images\n"
            "loss and gain in points of top-1, with one standard error of the difference\n"
            f"batch norm: {self.batch_norm}"
        )

    def draw(self, path: str | Path, by: Order | None = None) -> None:
        """Draws loss and gain as bars side by side, the most sensitive layer on top."""
        from matplotlib.figure import Figure

        rows = self.ranked(by)
        places = range(len(rows))
        figure = Figure(figsize=(9, 1.6 + 0.24 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, name, color, title in (
            (left, "loss", "#c44e52", "lost by binarizing it alone"),
            (right, "gain", "#4c72b0", "gained by leaving it float alone"),
        ):
            values = [100 * getattr(row, name) for row in rows]
            errors = [100 * getattr(row, f"{name}_error") for row in rows]
            axes.barh(places, values, xerr=errors, color=color, height=0.7, error_kw={"elinewidth": 1, "ecolor": "0.3"})
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
            axes.set_xlabel("points of top-1")
            axes.set_title(title, fontsize=10)
        left.set_yticks(places, [row.layer.replace("$", r"\$") for row in rows], fontsize=8)
        left.invert_yaxis()
        left.margins(y=0.01)
        figure.suptitle(
            f"float {self.float_accuracy:.1%}, binary {self.binary_accuracy:.1%} of {self.images:,} images", fontsize=10
        )
        figure.savefig(path, dpi=150)


def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    recalibration: Sequence[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measures what each binary layer of a model costs, with 2 L + 2 passes over the images for L layers.

    The model is left as it was: stages, mode, learned scales and batch-norm statistics.

    A learned weight scale is used as it is where its layer was in stage `both`, and else starts from the latent weights, as it
    does when training enters that stage.

    Args:
        model: gives logits [B, K] of images [B, C, H, W]; binarized by `binarize_`, or made of binary layers.
        batches: of images and labels [B]; those with labels below 0 are left out. Something that can be read again in every
            pass, such as a list or a DataLoader that does not shuffle; see `hold_batches`.
        recalibration: training images [B, C, H, W], a tensor a batch, on which the statistics of batch norm are estimated anew
            for each measurement; the model's own are used if not given. Unused where no batch norm has any.
        progress: called with the number of passes done and to do.

    Raises:
        ValueError: if the model has no binary layer, there are no images, the batches can be read only once, or the logits are
            not finite.
    """
    layers = binary_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no binary layer; call binarize_(model) first")
    if isinstance(batches, Iterator):
        raise ValueError("batches can be read only once; give a list of them, or a DataLoader")
    device = next(model.parameters()).device
    has_batch_norm = bool(running_batch_norms(model))
    total = 2 * len(layers) + 2
    done = 0

    def measure(stages: Mapping[str, Stage], what: str) -> Tensor:
        nonlocal done
        for name, layer in layers.items():
            layer.stage = stages[name]  # not set_stage, which would start a learned scale anew
        if recalibration is not None and has_batch_norm:
            recalibrate_batch_norm_(model, (images.to(device) for images in recalibration))
        hits = _hits(model, batches, device, what)
        done += 1
        if progress is not None:
            progress(done, total)
        return hits

    all_float: dict[str, Stage] = dict.fromkeys(layers, "float")
    all_binary: dict[str, Stage] = dict.fromkeys(layers, "both")
    rows = []
    with _as_found(model, layers), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        for layer in layers.values():
            if layer.stage != "both":
                layer.weight_binarizer.reset_scale(layer.latent_weight())
        as_float = measure(all_float, "every layer float")
        as_binary = measure(all_binary, "every layer binary")
        for name, layer in layers.items():
            alone = measure({**all_float, name: "both"}, f"{name} alone binary")
            without = measure({**all_binary, name: "float"}, f"{name} alone float")
            loss, loss_error = _difference(as_float, alone)
            gain, gain_error = _difference(without, as_binary)
            rows.append(
                LayerSensitivity(
                    layer=name,
                    weights=layer.weight.numel(),
                    alone=_share(alone),
                    loss=loss,
                    loss_error=loss_error,
                    without=_share(without),
                    gain=gain,
                    gain_error=gain_error,
                )
            )
    if not has_batch_norm:
        batch_norm = "there is none with running statistics"
    elif recalibration is None:
        batch_norm = "the statistics that the model has, in every measurement"
    else:
        batch_norm = f"estimated anew on {sum(map(len, recalibration)):,} training images for each measurement"
    return Sensitivity(
        rows=tuple(rows),
        images=len(as_float),
        float_accuracy=_share(as_float),
        binary_accuracy=_share(as_binary),
        batch_norm=batch_norm,
        notes=tuple(_notes(_share(as_float), _share(as_binary), recalibration is None and has_batch_norm)),
    )


def hold_batches(
    source: Iterable[Batch],
    limit: int | None = None,
    memory: float = 2e9,
    check: Callable[[Batch], Batch] = lambda batch: batch,
    convert: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[Iterable[Batch], bool]:
    """The first batches of a loader, in memory if they fit, so that many passes read them from the disk once.

    Args:
        source: a loader that gives the same batches, in the same order, each time.
        limit: how many batches; all if not given.
        memory: the bytes that they may take.
        check: what each batch goes through as it is read.
        convert: what it goes through in every pass, such as from bytes to floats, so that bytes are held.

    Returns:
        The batches, and whether they are held. If not, they are read from `source` anew in every pass.
    """
    held: list[Batch] = []
    size = 0
    for batch in islice(source, limit):
        held.append(check(batch))
        size += sum(part.numel() * part.element_size() for part in batch if isinstance(part, Tensor))
        if size > memory:
            return _Converted(source, limit, lambda batch: convert(check(batch))), False
    return _Converted(held, limit, convert), True


@dataclass(frozen=True)
class _Converted:
    """The first batches of a source, read and converted anew at each iteration."""

    source: Iterable[Batch]
    limit: int | None
    convert: Callable[[Batch], Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.convert, islice(self.source, self.limit))


@contextmanager
def _as_found(model: nn.Module, layers: Mapping[str, BinaryLayer]) -> Iterator[None]:
    """Puts back the stages, modes, scales and batch-norm statistics, whatever happens inside."""
    stages = {name: layer.stage for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    tensors: list[Tensor] = [
        t for layer in layers.values() for t in layer.weight_binarizer.state_dict(keep_vars=True).values()
    ]
    tensors += [
        buffer for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers(False)
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.stage = stages[name]
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _hits(model: nn.Module, batches: Iterable[Batch], device: torch.device, what: str) -> Tensor:
    """Whether each image is classified rightly, a bool an image, on the CPU."""
    hits = []
    for images, labels in batches:
        logits = model(images.to(device, non_blocking=True))
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the logits are not finite with {what}; look for a damaged checkpoint or image")
        real = labels >= 0
        hits.append((logits.argmax(-1).cpu() == labels.cpu())[real.cpu()])
    if not hits or not sum(map(len, hits)):
        raise ValueError("there are no images to measure on: the batches are empty")
    return torch.cat(hits)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The accuracy of the first less that of the second on the same images, and its standard error."""
    if len(first) != len(second):
        raise ValueError(
            f"one pass saw {len(first)} images, another {len(second)}: the batches must be the same in each pass"
        )
    difference = first.double() - second.double()
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), error


def _notes(as_float: float, as_binary: float, keeps_statistics: bool) -> Iterator[str]:
    if as_float < as_binary:
        yield (
            "the float network is worse than the binary one: its latent weights were trained for their signs, so rank by "
            "gain (the default here), not by loss"
        )
    if keeps_statistics:
        yield (
            "a batch norm's statistics fit the network in which they were estimated, and are off in the others; recalibrate to "
            "estimate them anew"
        )


def _points(value: float, error: float) -> str:
    return f"{100 * value:+.1f} ± {100 * error:.1f}"
