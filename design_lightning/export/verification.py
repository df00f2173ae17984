"""An exported network beside the one that it was made from: layer by layer, and end to end.

Engines add in other orders than PyTorch, so that a value close to its threshold may fall on its other side. Such a value is
called a tie, and is the only reason for which a bit may differ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from design_lightning.binary.activations import BinaryActivation
from design_lightning.binary.products import Convolution, Product
from design_lightning.export.conversion import TIE
from design_lightning.export.graph import Graph
from design_lightning.export.runtime import Run

TOLERANCE = 1e-4
"""By how much real values may differ, as a share of the largest of their tensor."""
TOP1 = 0.99
"""The share of images whose class must be the same, ties or not."""
NARROW_BITS = 0.05
"""By narrower floats, the share of a layer's bits that may change, where the layers before it give the same bits.

Of five untrained networks, bfloat16 changed 1.1% at most, and 10% of the classes; float16 0.14%, and no class.
"""
NARROW_TOP1 = 0.9
"""By narrower floats, the share of images whose class must be the same, where all binary layers are fed with the same bits."""


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
    layers, ties, differing = 0, 0, 0
    for part in images[:layer_images].split(batch):
        layers, *more = _compare_layers(graph, run_cut, part, batch)
        ties, differing = ties + more[0], differing + more[1]
    ours, has_tie = _outputs(graph, images)
    theirs = torch.cat([_run_padded(run, part, batch) for part in images.split(batch)])
    return judged(agreement_of(ours, theirs, has_tie, layers, ties, differing))


def judged(agreement: Agreement) -> Agreement:
    """The same, if it is close enough for float32.

    Raises:
        DisagreementError: if the outputs differ without ties, or the class of more than one image in 100.
    """
    if agreement.difference is not None and not agreement.difference <= TOLERANCE:
        raise DisagreementError(
            f"its outputs differ by {agreement.difference:.2g} of their size for an image without ties; {TOLERANCE:g} is allowed"
        )
    if not agreement.top1 >= TOP1:
        raise DisagreementError(
            f"its class differs for {round((1 - agreement.top1) * agreement.images)} of {agreement.images} images, "
            f"{agreement.images_with_ties} of which have values within {TIE:g} of their threshold; it must be the same for "
            f"{TOP1:.0%}"
        )
    return agreement


@torch.no_grad()
def outputs_and_ties(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a network, one image at a time, and whether an image has a tie."""
    has_tie = torch.zeros(len(images), dtype=torch.bool)
    outputs = []
    for index, image in enumerate(images.split(1)):

        def look(name: str, x: Tensor, threshold: Tensor, bits: Tensor, index: int = index) -> None:
            has_tie[index] |= ((x - threshold).abs() < TIE).any()

        with _watched(model, look):
            outputs.append(model(image))
    return torch.cat(outputs), has_tie


@torch.no_grad()
def judge_narrowed(model: nn.Module, narrowed: nn.Module, images: Tensor) -> None:
    """Compares a network with one whose floats were rounded to a narrower type, each layer fed with the same bits.

    A bit that rounding changes changes more bits behind it, in any type; so what rounding does is judged layer by layer.

    Raises:
        DisagreementError: if in a layer more than one bit in 20 changes, or for more than one image in 10 the class.
    """
    changed: dict[str, int] = {}
    total: dict[str, int] = {}
    same = 0
    for image in images.split(1):
        recorded: dict[str, list[Tensor]] = {}

        def record(
            name: str, x: Tensor, threshold: Tensor, bits: Tensor, to: dict[str, list[Tensor]] = recorded
        ) -> None:
            to.setdefault(name, []).append(bits)

        def feed(
            name: str, x: Tensor, threshold: Tensor, bits: Tensor, given: dict[str, list[Tensor]] = recorded
        ) -> Tensor:
            expected = given[name].pop(0)
            changed[name] = changed.get(name, 0) + int((bits != expected).sum())
            total[name] = total.get(name, 0) + bits.numel()
            return expected

        with _watched(model, record):
            ours = model(image)
        with _watched(narrowed, feed):
            theirs = narrowed(image)
        same += int((ours.argmax(1) == theirs.argmax(1)).all())
    for name, count in changed.items():
        if count > NARROW_BITS * total[name]:
            raise DisagreementError(
                f"rounding its floats changes {count} of {total[name]} bits of {name!r}; {NARROW_BITS:.0%} may; "
                "export it with dtype float32"
            )
    if same < NARROW_TOP1 * len(images):
        raise DisagreementError(
            f"rounding its floats changes the class of {len(images) - same} of {len(images)} images, with the same bits in every "
            f"layer; it must be the same for {NARROW_TOP1:.0%}; export it with dtype float32"
        )


@contextmanager
def _watched(model: nn.Module, look: Callable[[str, Tensor, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, each binary activation tells its name, input, threshold and bits, and passes on what it gets in return."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, BinaryActivation) and module.gives_bits:

                def hook(
                    called: nn.Module, inputs: tuple[Tensor, ...], bits: Tensor, name: str = name
                ) -> Tensor | None:
                    return look(name, inputs[0], cast(BinaryActivation, called).threshold(inputs[0]), bits)

                stack.callback(module.register_forward_hook(hook).remove)
        yield


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


def _compare_layers(graph: Graph, run: Run, images: Tensor, batch: int) -> tuple[int, int, int]:
    """Feeds each layer with PyTorch's input, of at most a batch of images.

    Gives how many layers were compared, how many ties there are, and how many sums differed within their reach.
    """
    count = len(images)
    images = _filled(images, batch)
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
        rows = len(x) * count // batch  # without those that fill the batch
        all_ties += int(ties[:rows].sum())
        all_differing += int((difference[:rows] > 0).sum())
    _compare_reals("its output", torch.from_numpy(results["output"]), outputs)
    return len(given), all_ties, all_differing


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
    filled = np.ascontiguousarray(_filled(images, batch).numpy())
    return torch.from_numpy(run({"input": filled})["output"])[: len(images)]


def _filled(images: Tensor, batch: int) -> Tensor:
    """A whole batch: the last image stands for those that lack."""
    missing = batch - len(images)
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images


def random_images(shape: Sequence[int], count: int) -> Tensor:
    """Noise of the size of normalised images, always the same: what is compared where no images are given."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
