"""What a tensor of a probing forward is made of: the knowledge that travels with it from operation to operation.

`after` gives the knowledge about an operation's result from that about its operands. What reaches what is thus learned
from the operations themselves, `F.relu` and `+` included, and never from the names of modules.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning.surgery.float_activations import ACTIVATION_FUNCTIONS, GATE_FUNCTIONS, ONE_SIDED_FUNCTIONS

A_FUNCTION = "a function in"
"""How the source is called that is an activation without a module of its own."""


@dataclass(frozen=True)
class Flow:
    """What is known of one tensor.

    Args:
        sources: the activations and weight layers that it comes from, with only additions, pools, norms and the like between.
        positive_by: None if it may be negative; else the activations without which it might be (never negative as it is).
        from_input: whether it comes from the network's input with no weight layer between.
        layer: the one weight layer that it comes from with no addition or activation between, if there is one.
        behind: all the weight layers that it depends on.
        gate_layers: the layers that made it, should it turn out to be a gate: the last, and those before it that saw one pixel.
        is_gate: whether it left a sigmoid or a softmax.
        norm: the one norm that it comes from, with only activations and pools between, if there is one.
        activation: the one activation that it comes from, with only pools and reshapes between, if there is one.
        branch: the last weight layer of the way that it came, activations and norms apart, since the last addition.
        axis: which of its axes holds the channels, where that is known.
    """

    sources: frozenset[str] = frozenset()
    positive_by: frozenset[str] | None = None
    from_input: bool = False
    layer: str | None = None
    behind: frozenset[str] = frozenset()
    gate_layers: frozenset[str] = frozenset()
    is_gate: bool = False
    norm: str | None = None
    activation: str | None = None
    branch: str | None = None
    axis: int | None = None


@dataclass
class Findings:
    """What the operations of a forward revealed about layers.

    Args:
        gates: layers whose output weighs a stream.
        weighing: sigmoids whose output weighs something.
        shortcuts: layers that are the projection of a shortcut.
        with_shortcut: layers whose own input is added to what they give, behind their norm.
        norms: from a layer to the norm module that its output enters.
        rearranged: layers behind whose norm their output's elements stand elsewhere than behind the layer.
        inputs: from a layer to the tensor that it read.
        outputs: from a layer to the tensor that it gave.
        before: from a layer to those that its input depends on.
    """

    gates: set[str] = field(default_factory=set)
    weighing: set[str] = field(default_factory=set)
    shortcuts: set[str] = field(default_factory=set)
    with_shortcut: set[str] = field(default_factory=set)
    norms: dict[str, str] = field(default_factory=dict)
    rearranged: set[str] = field(default_factory=set)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, frozenset[str]] = field(default_factory=dict)


def flow_of(value: Any) -> Flow | None:
    """The knowledge that travels with a value; None for constants, parameters and whatever is no tensor."""
    return getattr(value, "_design_flow", None) if isinstance(value, Tensor) else None


def set_flow(value: Any, flow: Flow) -> None:
    """Gives a tensor, or each tensor in a sequence or dict, its knowledge."""
    if isinstance(value, Tensor):
        value._design_flow = flow  # type: ignore[attr-defined]
    elif isinstance(value, dict):
        for item in value.values():
            set_flow(item, flow)
    elif isinstance(value, list | tuple):
        for item in value:
            set_flow(item, flow)


def _functions(*names: str) -> frozenset[object]:
    return frozenset(
        getattr(home, name) for home in (torch, Tensor, F, operator) for name in names if hasattr(home, name)
    )


_NORMS = _functions("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize")
WEIGHT_FUNCTIONS = _functions(
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "multi_head_attention_forward",
)
"""They multiply by the weight of a layer."""
_MIXERS = WEIGHT_FUNCTIONS | _functions(
    *(
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "einsum",
        "baddbmm",
        "addmm",
        "bilinear",
        "embedding",
    ),
    "glu",
)
_ATTENTIONS = _functions("scaled_dot_product_attention")
_MATRIX_PRODUCTS = _functions("matmul", "__matmul__", "mm", "bmm")
_ADDITIONS = _functions("add", "add_", "__add__", "__radd__", "__iadd__", "cat", "concat", "stack", "sum", "maximum")
_SUBTRACTIONS = _functions(
    *("sub", "sub_", "__sub__", "__rsub__", "__isub__", "rsub", "subtract", "neg", "__neg__", "negative")
)
_SIGN_CHANGERS = _functions("log", "log_", "log2", "log10", "log_softmax", "logit", "sin", "cos", "lerp", "addcmul")
_QUOTIENTS = _functions("div", "div_", "__truediv__", "__itruediv__", "true_divide", "divide")
_PRODUCTS = _functions("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply")
_WEIGHERS = _PRODUCTS | _ATTENTIONS | (_MIXERS - WEIGHT_FUNCTIONS)
"""Of two streams one may weigh the other here."""
_MOVES = _functions(
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "movedim",
        "swapaxes",
        "roll",
        "chunk",
        "split",
    ),
    *(
        "unfold",
        "fold",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "__getitem__",
        "index_select",
        "repeat_interleave",
    ),
)
"""Behind these a channel may stand elsewhere."""
_LIKES = _functions("expand_as", "view_as", "reshape_as", "type_as")
"""They take a shape or a type from their second operand, and nothing else."""
_JOINS = _functions("add", "add_", "__add__", "__radd__", "__iadd__")


def product_of_streams(function: Any, operands: Sequence[Any], result: Any) -> int:
    """Multiply-accumulates of a matrix product or an attention of streams, which no layer counts; 0 for other operations."""
    streams = [value for value in operands if flow_of(value) is not None]
    if function in _MATRIX_PRODUCTS and len(streams) == 2 and isinstance(result, Tensor):
        inner: int = streams[0].shape[-1]
        return result.numel() * inner
    if function in _ATTENTIONS and len(streams) >= 3:
        query, keys, values = operands[:3]
        return query[..., 0].numel() * keys.shape[-2] * (query.shape[-1] + values.shape[-1])
    return 0


def after(function: Any, operands: Sequence[Any], inside: str, findings: Findings) -> Flow | None:
    """The knowledge about the result of one operation; None if no operand has any.

    Args:
        function: the function of torch that was called.
        operands: its arguments, sequences of tensors unrolled.
        inside: the name of the innermost module that runs.
        findings: noted here: layers that turn out to be gates, projections of a shortcut, or to have a shortcut.
    """
    if function in _LIKES:
        operands = operands[:1]
    flows = [flow for flow in map(flow_of, operands) if flow is not None]
    if not flows:
        return None
    if function in _WEIGHERS:
        findings.weighing |= frozenset().union(*(f.sources for f in flows if f.is_gate))
    if function in _PRODUCTS:
        return _after_product(operands, findings)
    if function in WEIGHT_FUNCTIONS and _has_fixed_filter(operands):
        return replace(flows[0], positive_by=None)  # an anti-aliasing pool: a convolution with a constant
    if function in _ATTENTIONS:
        return _after_attention(flows, flow_of(operands[2]))
    if function in _MIXERS:
        return Flow(behind=frozenset().union(*(f.behind for f in flows)))
    if function in _NORMS:
        return replace(flows[0], positive_by=None, norm=inside, activation=None, is_gate=False)
    if function in GATE_FUNCTIONS:
        return after_gate(flows[0])
    if function in ACTIVATION_FUNCTIONS:
        return after_activation(flows[0], f"{A_FUNCTION} {inside or 'the model'}", function in ONE_SIDED_FUNCTIONS)
    if function in _JOINS:
        _note_projection(flows, findings)
        _note_shortcut(operands, findings)
    joined = flows[0] if len(flows) == 1 else _join(flows)
    if function in _QUOTIENTS and any(isinstance(v, int | float) and v < 0 for v in operands):
        joined = replace(joined, positive_by=None)
    if (
        function in _SUBTRACTIONS
        or function in _SIGN_CHANGERS
        or (function in _ADDITIONS and not _all_known_positive(operands))
    ):
        joined = replace(joined, positive_by=None)
    if function in _ADDITIONS or function in _SUBTRACTIONS:
        return replace(joined, norm=None, layer=None, activation=None, branch=None)
    if function in _MOVES:
        return replace(joined, norm=None, axis=_moved_axis(function, operands, joined.axis))
    return joined


def after_activation(flow: Flow, name: str, one_sided: bool) -> Flow:
    """Behind a float activation: it is the only source now."""
    positive = frozenset({name}) if one_sided else None
    return replace(flow, sources=frozenset({name}), positive_by=positive, layer=None, is_gate=False, activation=name)


def after_gate(flow: Flow, sigmoid: str | None = None) -> Flow:
    """Behind a softmax or a sigmoid, whose name is given if it is a module: a gate, unless it turns out to weigh nothing."""
    sources = frozenset({sigmoid} if sigmoid else ())
    return replace(flow, sources=sources, positive_by=sources, layer=None, is_gate=True, norm=None, activation=sigmoid)


def after_layer(flow: Flow | None, name: str, sees_one_pixel: bool, axis: int | None) -> Flow:
    """Behind a weight layer, whose output has its channels on `axis`."""
    before = flow or Flow()
    gate_layers = before.gate_layers | {name} if sees_one_pixel else frozenset({name})
    return Flow(
        sources=frozenset({name}),
        layer=name,
        behind=before.behind | {name},
        gate_layers=gate_layers,
        branch=name,
        axis=axis,
    )


def after_assignment(target: Tensor, value: Any) -> None:
    """Behind `target[...] = value`, which returns nothing: the target holds both."""
    flows = [flow for flow in (flow_of(target), flow_of(value)) if flow is not None]
    if flows:
        set_flow(target, replace(_join(flows), positive_by=None))


def _has_fixed_filter(operands: Sequence[Any]) -> bool:
    """Whether the second tensor of a convolution is a buffer or a constant."""
    tensors = [value for value in operands if isinstance(value, Tensor)]
    return len(tensors) > 1 and not isinstance(tensors[1], nn.Parameter) and flow_of(tensors[1]) is None


def with_axis_of(flow: Flow, function: Any, operands: Sequence[Any], result: Any) -> Flow:
    """The knowledge without the channels' axis, where an operation other than a rearrangement changed how many axes there are."""
    if flow.axis is None or function in _MOVES or not isinstance(result, Tensor):
        return flow
    ranks = {value.dim() for value in operands if flow_of(value) is not None}
    return flow if ranks == {result.dim()} else replace(flow, axis=None)


def _moved_axis(function: Any, operands: Sequence[Any], axis: int | None) -> int | None:
    """Where the channels stand behind a permutation; None where that is not known."""
    x = next(value for value in operands if isinstance(value, Tensor))
    numbers = [v % x.dim() for v in operands if isinstance(v, int) and not isinstance(v, bool)]
    name = getattr(function, "__name__", "")
    if axis is None:
        return None
    if name == "permute" and len(numbers) == x.dim():
        return numbers.index(axis)
    if name in ("transpose", "swapaxes") and len(numbers) == 2:
        return {numbers[0]: numbers[1], numbers[1]: numbers[0]}.get(axis, axis)
    if name == "flatten" and numbers and axis < numbers[0] and len(numbers) == 1:
        return axis
    return axis if name in ("roll", "chunk", "split", "channel_shuffle", "index_select") else None


def _join(flows: Sequence[Flow]) -> Flow:
    positives = [f.positive_by for f in flows]
    return Flow(
        sources=frozenset().union(*(f.sources for f in flows)),
        positive_by=None if None in positives else frozenset().union(*(p for p in positives if p is not None)),
        from_input=all(f.from_input for f in flows),
        behind=frozenset().union(*(f.behind for f in flows)),
        gate_layers=flows[0].gate_layers if len({f.gate_layers for f in flows}) == 1 else frozenset(),
        is_gate=all(f.is_gate for f in flows),
        axis=flows[0].axis if len({f.axis for f in flows}) == 1 else None,
    )


def _all_known_positive(operands: Sequence[Any]) -> bool:
    return all(
        value >= 0 if isinstance(value, int | float) else flow is not None and flow.positive_by is not None
        for value, flow in ((v, flow_of(v)) for v in operands)
        if isinstance(value, Tensor | int | float) and not isinstance(value, bool)
    )


def _after_product(operands: Sequence[Any], findings: Findings) -> Flow:
    """A stream times a gate or a factor is that stream; two gates make a gate; a product of two streams is neither."""
    known = [(value, flow) for value, flow in ((v, flow_of(v)) for v in operands) if flow is not None]
    if len(known) == 1:
        value, flow = known[0]
        factor_is_positive = all(v >= 0 for v in operands if isinstance(v, int | float))
        has_other_tensor = any(isinstance(v, Tensor) and v is not value for v in operands)
        kept = flow if factor_is_positive and not has_other_tensor else replace(flow, positive_by=None)
        return replace(kept, activation=None, norm=None)
    (first, first_flow), (second, second_flow) = known[:2]
    for gate, stream in ((first_flow, second_flow), (second_flow, first_flow)):
        if gate.is_gate and not stream.is_gate and not gate.gate_layers & stream.gate_layers:
            findings.gates |= gate.gate_layers
            return replace(stream, norm=None)
    if first.numel() != second.numel():
        stream, factor = (first_flow, second_flow) if first.numel() > second.numel() else (second_flow, first_flow)
        positive_by = stream.positive_by if factor.positive_by is not None else None
        return replace(stream, positive_by=positive_by, norm=None)
    both = (first_flow.positive_by, second_flow.positive_by)
    positive = None if both[0] is None or both[1] is None else both[0] | both[1]
    is_gate = first_flow.is_gate and second_flow.is_gate
    gate_layers = first_flow.gate_layers | second_flow.gate_layers if is_gate else frozenset()
    behind = first_flow.behind | second_flow.behind
    return Flow(positive_by=positive, behind=behind, is_gate=is_gate, gate_layers=gate_layers)


def _after_attention(flows: Sequence[Flow], values: Flow | None) -> Flow:
    """An average of the values: never negative where they are not, and a gate where they are one."""
    behind = frozenset().union(*(f.behind for f in flows))
    if values is None:
        return Flow(behind=behind)
    gate_layers = values.gate_layers if values.is_gate else frozenset()
    return Flow(positive_by=values.positive_by, behind=behind, is_gate=values.is_gate, gate_layers=gate_layers)


def _note_projection(flows: Sequence[Flow], findings: Findings) -> None:
    """Where two parallel ways are added, one of a single layer beside one of several in a row is a shortcut's projection."""
    if len(flows) != 2:
        return
    for short, long in (flows, flows[::-1]):
        fork = short.behind & long.behind  # without one the short way is no stream's: a positional encoding, say
        further = long.behind - short.behind
        in_a_row = any(findings.before.get(layer, frozenset()) & further for layer in further)  # not side by side
        if short.layer and fork and len(short.behind - long.behind) == 1 and in_a_row:
            findings.shortcuts.add(short.layer)


def _note_shortcut(operands: Sequence[Any], findings: Findings) -> None:
    """Where the very tensor that a layer read is added to what became of its output."""
    tensors = [(value, flow_of(value)) for value in operands if isinstance(value, Tensor)]
    for value, flow in tensors:
        read = findings.inputs.get(flow.branch) if flow and flow.branch else None
        if flow and flow.branch and any(other is read for other, _ in tensors if other is not value):
            findings.with_shortcut.add(flow.branch)
