"""`convert_`: a trained network as it runs on a device. Weights +-1, batch norm folded into thresholds and affines.

A binary layer's sums are whole numbers. Where all that reads them is batch norm, an activation, and the comparison of the next
binary layer, these are one comparison of the sum with a whole number, for each channel and place in the kernel. That number is
found by trying every sum that the layer can give, so that the bits stay the very same, rounding included.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from design_lightning.binary.activations import OWN_ACTIVATIONS, BinaryActivation, DeSign
from design_lightning.binary.packed import PackedConv2d, PackedLayer, SumThreshold
from design_lightning.export.chains import NORMS, Chain, Watched, find_chains, is_norm_act, sums_of, watch
from design_lightning.export.metadata import FOLDED
from design_lightning.surgery import surgery_record
from design_lightning.surgery.packing import pack_layers_, packed_layers

TOLERANCE = 1e-4
TIE = 1e-5
"""How close to its threshold a value may change sides by rounding."""


class Turn(nn.Module):
    """Turns the sign of some channels of [B, C, H, W].

    Args:
        turned: which: [C].
    """

    sign: Tensor

    def __init__(self, turned: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", torch.where(turned, -1.0, 1.0).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * self.sign


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of a binary layer.

    Args:
        name: the layer.
        output: `thresholds`, where it gives sums that the next layer compares; `affine`, where its scale, its bias and the batch
            norm behind it became one factor and one addend per channel; `scaled`, as it was.
        turned: channels that were negated, for a negative gamma turns the comparison round: their weights, or, where a MaxPool2d
            follows, its result.
        constant: channels of which the next layer sees a constant bit, for gamma is 0 or the threshold out of reach.
        reason: why its sums are no thresholds.
    """

    name: str
    output: str
    turned: int = 0
    constant: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Conversion:
    """What `convert_` did.

    Args:
        layers: one row a binary layer.
        difference: the largest of the outputs on the example, relative to the largest output, with the same bits.
        is_repeated: whether the network was folded before, so that nothing was done now; `layers` says what was done then.
    """

    layers: tuple[ConvertedLayer, ...]
    difference: float
    is_repeated: bool = False

    def table(self) -> Table:
        """For a terminal."""
        table = Table("layer", "output", "turned", "constant", "why not thresholds", title_justify="left")
        for row in self.layers:
            table.add_row(row.name, row.output, str(row.turned or ""), str(row.constant or ""), row.reason)
        return table

    def __str__(self) -> str:
        counts = {kind: sum(row.output == kind for row in self.layers) for kind in ("thresholds", "affine", "scaled")}
        parts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        before = ", converted already" if self.is_repeated else ""
        return f"{len(self.layers)} binary layers{before}: {parts}; outputs differ by {self.difference:.1e}"


@torch.no_grad()
def convert_(model: nn.Module, example_input: Tensor | Sequence[int] | None = None, fold: bool = True) -> Conversion:
    """Freezes the binary weights of a trained network to +-1, and folds scales and batch norm, in place.

    Its outputs stay what they were in eval mode: the bits that folded thresholds give are the same for every sum that a layer can
    give; affines round differently in the last digits, by which a value within 1e-5 of its threshold may change sides. Every bit
    and the outputs are compared on the example, each layer fed with the same bits, and a failure leaves the model as it was.
    A converted network is in eval mode, cannot be trained, and exports as any other; save it as a packed checkpoint before.
    Converted once more it stays as it is. Folding is in float32: call `model.float()` on a network of another type first.

    Args:
        model: what `binarize_` made, in stage `both`.
        example_input: a batch, or its shape, to find out what follows what; two images of noise of the size of the surgery's
            probe, if not given.
        fold: whether scales and batch norm are folded; if not, layers are packed alone, and outputs are equal bit for bit.

    Returns:
        What became of each layer.

    Raises:
        ValueError: if there is no binary layer, one is in another stage, no size of input is known, a parameter is not float32,
            or something changed.
    """
    if FOLDED in model.__dict__:
        model.eval()
        return Conversion(model.__dict__[FOLDED], 0.0, is_repeated=True)
    if fold:
        _refuse_other_types(model)
    x = _example(model, example_input)
    packed = copy.deepcopy(model).eval().requires_grad_(False)
    if not packed_layers(packed):
        pack_layers_(packed)
    twin = copy.deepcopy(packed)
    rows = _fold_(twin, x) if fold else tuple(ConvertedLayer(name, "scaled") for name in packed_layers(twin))
    difference = _compare(twin, packed, x)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(model, name, getattr(twin, name))
    if fold:
        model.__dict__[FOLDED] = rows
    model.eval()
    return Conversion(rows, difference)


def _refuse_other_types(model: nn.Module) -> None:
    """Sums are whole numbers up to thousands, which bfloat16 and float16 round: bits would not stay what they were."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"{name!r} is {parameter.dtype}, but scales and batch norm are folded in float32; call model.float() first, or "
                "pass fold=False"
            )


def _example(model: nn.Module, given: Tensor | Sequence[int] | None) -> Tensor:
    if isinstance(given, Tensor):
        return given
    if given is None:
        record = surgery_record(model)
        if record is None or record.input_shape is None:
            raise ValueError(
                f"no size of input is known for {type(model).__name__}; pass example_input=(B, C, H, W), or a batch"
            )
        given = (2, *record.input_shape[1:])
    x = torch.randn(*given, generator=torch.Generator().manual_seed(0))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), x)  # packed layers alone have none
    return x.to(parameter.device, parameter.dtype)


def _compare(twin: nn.Module, packed: nn.Module, x: Tensor) -> float:
    """Compares every bit, each layer fed with the same bits, and the outputs; gives the largest relative difference of these."""
    recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def record(name: str) -> Any:
        def hook(activation: nn.Module, inputs: tuple[Tensor, ...], bits: Tensor) -> None:
            ties = (inputs[0] - cast(BinaryActivation, activation).threshold(inputs[0])).abs() < TIE
            recorded.setdefault(name, []).append((bits > 0, ties))

        return hook

    def compare(name: str) -> Any:
        def hook(activation: nn.Module, inputs: tuple[Tensor, ...], bits: Tensor) -> Tensor:
            expected, ties = recorded[name].pop(0)
            allowed = torch.zeros_like(ties) if isinstance(activation, SumThreshold) else ties
            wrong = ((bits > 0) != expected) & ~allowed
            if wrong.any():
                raise ValueError(
                    f"{int(wrong.sum())} of {wrong.numel()} bits of {name!r} changed, so nothing is converted"
                )
            return torch.where(expected, 1.0, -1.0).to(bits.dtype)

        return hook

    with _hooked(packed, record):
        ours = packed(x)
    with _hooked(twin, compare):
        difference = _difference(twin(x), ours)
    if not difference <= TOLERANCE:
        raise ValueError(f"the outputs changed by {difference:.2g} of the largest, so nothing is converted")
    return difference


@contextmanager
def _hooked(model: nn.Module, make: Callable[[str], Any]) -> Iterator[None]:
    """Inside, each binary activation has a hook, made for the name of the first layer that it belongs to."""
    found: dict[nn.Module, str] = {}
    for name, layer in packed_layers(model).items():
        if layer.multiplies_bits and layer.activation is not None:
            found.setdefault(layer.activation, name)
    with ExitStack() as stack:
        for activation, name in found.items():
            stack.callback(activation.register_forward_hook(make(name)).remove)
        yield


def _difference(ours: Any, expected: Any) -> float:
    if isinstance(expected, Tensor):
        return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return max(_difference(*pair) for pair in zip(ours, expected, strict=True))


def _fold_(model: nn.Module, x: Tensor) -> tuple[ConvertedLayer, ...]:
    names = {layer: name for name, layer in packed_layers(model).items()}
    watched = watch(model, x)
    chains, reasons = find_chains(watched)
    rows: dict[PackedLayer, ConvertedLayer] = {}
    for chain in chains:
        first = cast(PackedConv2d, chain.first.module)
        outcome = _fold_into_thresholds_(model, chain)
        if isinstance(outcome, str):
            reasons[first] = outcome
        else:
            rows[first] = ConvertedLayer(names[first], "thresholds", *outcome)
    for layer, name in names.items():
        if layer not in rows:
            reason = reasons.get(layer, "it is no convolution, or was not called")
            rows[layer] = ConvertedLayer(name, _fold_into_affine_(model, layer, watched), reason=reason)
    return tuple(rows[layer] for layer in names)


def _fold_into_thresholds_(model: nn.Module, chain: Chain) -> tuple[int, int] | str:
    """Gives the last layer thresholds for the first one's sums; how many channels were turned, and how many are constant."""
    first, last = cast(PackedConv2d, chain.first.module), cast(PackedConv2d, chain.last.module)
    activation = last.activation
    if type(activation) not in OWN_ACTIVATIONS.values():
        return f"the thresholds of {type(activation).__name__} are not known"
    channels = first.signs.shape[0]
    rows, columns = activation.levels.shape[1:] if isinstance(activation, DeSign) else (1, 1)
    block = torch.empty(1, channels, rows, columns, device=first.signs.device)
    thresholds = activation.threshold(block).expand(channels, rows, columns)  # type: ignore[union-attr, operator]
    sums = sums_of(first).to(block.device)
    values = chain.values(sums.view(1, 1, -1, 1).expand(1, channels, -1, 1))[0, :, :, 0]
    bits = values.view(channels, 1, 1, -1) >= thresholds.unsqueeze(-1)  # [C, h, w, sums]
    steps = (bits[..., 1:] != bits[..., :-1]).sum(-1)
    falls = bits[..., 0] & ~bits[..., -1]
    turned = falls.flatten(1).any(1)
    rises = ~bits[..., 0] & bits[..., -1]
    if (steps > 1).any() or (turned & rises.flatten(1).any(1)).any():
        return "what stands behind it is not monotone"
    # Of a turned channel, -sum is compared; its bits as a function of -sum are the others, backwards.
    ordered = torch.where(turned.view(-1, 1, 1, 1), bits.flip(-1), bits)
    count = ordered.sum(-1)  # how many of the sums, the highest ones, give +1
    fan_in = (len(sums) - 1) // 2
    levels = fan_in - count + 0.5  # between two sums, so that none is ever close to it
    constant = int(((count == 0) | (count == len(sums))).flatten(1).all(1).sum())
    pools = any(isinstance(call.module, nn.MaxPool2d) for call in chain.links)
    norm = next(call.module for call in chain.links if not isinstance(call.module, nn.MaxPool2d))
    if not pools:
        first.signs[turned] *= -1
    first.scale = None
    first.bias = None
    align = activation.align if isinstance(activation, DeSign) else "topleft"
    last.activation = SumThreshold(levels, align)
    for call in chain.links:
        if not isinstance(call.module, nn.MaxPool2d):
            # The largest of turned sums would be the smallest of the sums: behind a pool it is the result that is turned.
            is_turned_here = pools and call.module is norm and bool(turned.any())
            _replace(model, call.module, Turn(turned) if is_turned_here else nn.Identity())
    return int(turned.sum()), constant


def _fold_into_affine_(model: nn.Module, layer: PackedLayer, watched: Watched) -> str:
    """Makes a layer's scale and bias, and the batch norm that alone reads it, one affine of its sums."""
    calls = watched.calls_of(layer)
    following = watched.only_user(calls[0].output) if len(calls) == 1 else None
    norm = following.module if following is not None else None
    if (
        not (isinstance(norm, NORMS) or (norm is not None and is_norm_act(norm)))
        or not layer.multiplies_bits
        or layer._forward_hooks
        or len(watched.calls_of(norm)) > 1
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or norm.running_var is None
    ):
        return "scaled"
    known = cast(nn.BatchNorm2d, norm)
    mean, variance = cast(Tensor, known.running_mean).double(), cast(Tensor, known.running_var).double()
    factor = (variance + known.eps).rsqrt() * (1 if known.weight is None else known.weight.double())
    addend = -mean * factor + (0 if known.bias is None else known.bias.double())
    scale = factor if layer.scale is None else factor * layer.scale.double()
    addend = addend if layer.bias is None else addend + factor * layer.bias.double()
    dtype = cast(Tensor, known.running_mean).dtype
    layer.scale = scale.to(dtype)
    layer.bias = nn.Parameter(addend.to(dtype), requires_grad=False)
    rest = nn.Sequential(cast(Any, norm).drop, cast(Any, norm).act) if is_norm_act(known) else nn.Identity()
    _replace(model, known, rest)
    return "affine"


def _replace(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is module:
                parent._modules[leaf] = replacement
