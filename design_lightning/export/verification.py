"""An exported network beside the one that it was made from: layer by layer, and end to end.

Engines add in other orders than PyTorch, so that a value close to its threshold may fall on its other side. Such a value is
called a tie, and is the only reason for which a bit may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from design_lightning.binary.products import Convolution, Product
from design_lightning.export.conversion import TIE
from design_lightning.export.graph import Graph
from design_lightning.export.runtime import Run

TOLERANCE = 1e-4
"""By how much real values may differ, as a share of the largest of their tensor."""
TOP1 = 0.99
"""The share of images whose class must be the same, ties or not."""


@dataclass(frozen=True)
class Agreement:
    """How an exported network agrees with PyTorch's.

    Args:
        images: how many were compared.
        images_with_ties: of them, those with a value within 1e-5 of its threshold.
        difference: the largest of the outputs over the images without ties, relative to the largest output of the image; None
            if every image has ties.
        difference_with_ties: the same of the images with ties.
        top1: the share of images with the same class.
        layers: how many binary layers were compared, each fed with PyTorch's input.
        ties: values within 1e-5 of their threshold in that comparison.
        differing: sums of +-1 that differed there, each within reach of such a value.
    """

    images: int
    images_with_ties: int
    difference: float | None
    difference_with_ties: float | None
    top1: float
    layers: int
    ties: int
    differing: int


class DisagreementError(ValueError):
    """An exported network computes something else than the one that it was made from."""


def verify(graph: Graph, run_cut: Run, run: Run, images: Tensor, batch: int, layer_images: int = 2) -> Agreement:
    """Compares.

    Args:
        graph: what the engine's form was made from.
        run_cut: the engine with the form of `cut(graph)`.
        run: the engine with that of `graph`.
        images: [N, C, H, W], normalised.
        batch: how many the engine takes at once.
        layer_images: with how many of them the layers are compared.

    Raises:
        DisagreementError: with the first layer, or the outputs.
    """
    ties, differing = 0, 0
    for start in range(0, min(layer_images, len(images)), batch):
        part = images[start : start + batch]
        if len(part) == batch:
            more = _compare_layers(graph, run_cut, part)
            ties, differing = ties + more[0], differing + more[1]
    ours, has_tie = _outputs(graph, images)
    theirs = torch.cat([_run_padded(run, part, batch) for part in images.split(batch)])
    agreement = agreement_of(ours, theirs, has_tie, len(graph.nodes), ties, differing)
    if agreement.difference is not None and not agreement.difference <= TOLERANCE:
        raise DisagreementError(
            f"its outputs differ by {agreement.difference:.2g} of their size for an image without ties; {TOLERANCE:g} is allowed"
        )
    if not agreement.top1 >= TOP1:
        raise DisagreementError(
            f"its class differs for {round((1 - agreement.top1) * len(images))} of {len(images)} images, "
            f"{agreement.images_with_ties} of which have values within {TIE:g} of their threshold; it must be the same for "
            f"{TOP1:.0%}"
        )
    return agreement


def agreement_of(
    ours: Tensor, theirs: Tensor, has_tie: Tensor | None = None, layers: int = 0, ties: int = 0, differing: int = 0
) -> Agreement:
    """How outputs agree with PyTorch's.

    Raises:
        DisagreementError: if they have another shape.
    """
    if ours.shape != theirs.shape:
        raise DisagreementError(f"its outputs are {list(theirs.shape)}, those of PyTorch {list(ours.shape)}")
    has_tie = torch.zeros(len(ours), dtype=torch.bool) if has_tie is None else has_tie
    scale = ours.flatten(1).abs().amax(1).clamp(min=1e-30)
    differences = (theirs - ours).flatten(1).abs().amax(1) / scale
    clean, tied = differences[~has_tie], differences[has_tie]
    return Agreement(
        images=len(ours),
        images_with_ties=int(has_tie.sum()),
        difference=clean.max().item() if len(clean) else None,
        difference_with_ties=tied.max().item() if len(tied) else None,
        top1=(theirs.argmax(1) == ours.argmax(1)).float().mean().item(),
        layers=layers,
        ties=ties,
        differing=differing,
    )


def _compare_layers(graph: Graph, run: Run, images: Tensor) -> tuple[int, int]:
    """Feeds each layer with PyTorch's input; gives how many ties there are, and how many sums differed within their reach."""
    recorded, outputs = _record(graph, images)
    given = {f"{node.key}.given": recorded[node.key].numpy() for node in graph.nodes}
    results = run({"input": images.numpy(), **given})
    all_ties, all_differing = 0, 0
    for node in graph.nodes:
        x = recorded[node.key]
        if node.input != "input":  # which is what it was fed with
            _compare_reals(f"the input of {node.key!r}", torch.from_numpy(results[node.input]), x)
        thresholds = node.thresholds()
        expected = node.sums(torch.where(x >= thresholds, 1.0, -1.0))
        ties = (x - thresholds).abs() < TIE
        ones = torch.ones_like(node.layer.signs, dtype=torch.float32)
        allowed = 2 * _without_border(node.call.product).apply(ties.float(), ones, None)
        difference = (torch.from_numpy(results[node.output]) - expected).abs()
        wrong = ~(difference <= allowed)
        if wrong.any():
            raise DisagreementError(
                f"{int(wrong.sum())} of {wrong.numel()} sums of the binary layer {node.key!r} differ, by up to "
                f"{difference[wrong].max():g}, though no value within their reach is within {TIE:g} of its threshold"
            )
        all_ties += int(ties.sum())
        all_differing += int((difference > 0).sum())
    _compare_reals("its output", torch.from_numpy(results["output"]), outputs)
    return all_ties, all_differing


def _without_border(product: Product) -> Product:
    return product._replace(value=0.0) if isinstance(product, Convolution) else product


def _compare_reals(what: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise DisagreementError(f"{what} is {list(theirs.shape)}, in PyTorch {list(ours.shape)}")
    largest = ours.abs().max().item()
    difference = (theirs - ours).abs().max().item()
    if not difference <= TOLERANCE * max(largest, 1e-30):
        raise DisagreementError(
            f"{what} differs by up to {difference:.2g}, where the largest value in PyTorch is {largest:.2g}"
        )


@torch.no_grad()
def _record(graph: Graph, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The input of each binary node, by key, and the network's outputs."""
    names = {node.layer: node.key.partition("#")[0] for node in graph.nodes}
    by_key = {node.key: node for node in graph.nodes}
    calls: dict[str, int] = {}
    recorded = {}

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        name = names[layer]
        calls[name] = calls.get(name, 0) + 1
        key = name if calls[name] == 1 else f"{name}#{calls[name]}"
        if key in by_key:
            recorded[key] = by_key[key].padded(inputs[0]).clone()

    handles = [layer.register_forward_pre_hook(record) for layer in names]
    try:
        outputs = graph.model(images)
    finally:
        for handle in handles:
            handle.remove()
    return recorded, outputs


@torch.no_grad()
def _outputs(graph: Graph, images: Tensor) -> tuple[Tensor, Tensor]:
    """The network's outputs, and whether an image has a tie; one image at a time, for the inputs of all layers take memory."""
    outputs, has_tie = [], []
    thresholds = {node.key: node.thresholds() for node in graph.nodes}
    for image in images.split(1):
        outputs.append(graph.original(image))
        recorded, _ = _record(graph, image)
        has_tie.append(any(bool(((x - thresholds[key]).abs() < TIE).any()) for key, x in recorded.items()))
    return torch.cat(outputs), torch.tensor(has_tie)


def _run_padded(run: Run, images: Tensor, batch: int) -> Tensor:
    """The engine's outputs for at most a batch of images."""
    missing = batch - len(images)
    filled = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
    return torch.from_numpy(run({"input": np.ascontiguousarray(filled.numpy())})["output"])[: len(images)]


def random_images(shape: Sequence[int], count: int) -> Tensor:
    """Noise of the size of normalised images, always the same: what is compared where no images are given."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
