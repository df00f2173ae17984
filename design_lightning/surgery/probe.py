"""The probing forward: what reaches what in a network, learned by running it once and watching every operation."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from design_lightning._names import in_a_line
from design_lightning.surgery.float_activations import (
    ACTIVATION_NORMS,
    GATE_MODULES,
    SIGMOIDS,
    is_activation,
    is_one_sided,
)
from design_lightning.surgery.float_layers import is_weight_layer, multiply_accumulates
from design_lightning.surgery.flow import (
    WEIGHT_FUNCTIONS,
    Findings,
    Flow,
    after,
    after_activation,
    after_assignment,
    after_gate,
    after_layer,
    flow_of,
    product_of_streams,
    set_flow,
    with_axis_of,
)
from design_lightning.surgery.parts import Operations
from design_lightning.surgery.traceless import forward_without_trace
from design_lightning.surgery.uncalled import layers_called


@dataclass
class LayerCall:
    """What a weight layer saw in the probe.

    Args:
        flow: what is known of its input.
        input_shape: the input's shape, of the last call.
        output_shape: the output's, of the last call.
        macs: multiply-accumulates of all calls together, over the whole batch.
    """

    flow: Flow
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()
    macs: int = 0


@dataclass
class Probe:
    """What one forward showed; names are those of the model's modules.

    Args:
        layers: every weight layer that was called, in the order of the first call.
        activations: every activation module that was called, with the shape of each input and the axis of its channels.
        users: weight layers whose weight a function used without a call of the layer, and the module in which that happened.
        user_macs: multiply-accumulates of such uses, over the whole batch.
        findings: what the operations revealed about layers.
        input_shape: the shape of the input; its first number is the batch.
        outputs: the shape of what every module gave, the first tensor of it, of the last call.
        products: multiply-accumulates of two streams, as in an attention, by the module in which they happened, over the batch.
    """

    input_shape: tuple[int, ...]
    layers: dict[str, LayerCall] = field(default_factory=dict)
    activations: dict[str, list[tuple[tuple[int, ...], int | None]]] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    user_macs: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)

    @property
    def operations(self) -> Operations:
        """Multiply-accumulates an image of the network as it was probed, as if all of them were of floats."""
        macs = Counter(self.products)
        macs.update({name: call.macs for name, call in self.layers.items()})
        macs.update(self.user_macs)
        return Operations(floats={name: count // self.input_shape[0] for name, count in macs.items()})


class ProbeError(RuntimeError):
    """No probing forward went through. The message holds what each try answered."""


def probe(model: nn.Module, example_input: Tensor | Sequence[int] | None = None) -> Probe:
    """Runs the model once, in eval mode and without gradients, and returns what it saw.

    The first try is on a copy without storage (`meta` tensors: shapes, no arithmetic); where an operation of the model
    does not go there, the second is on the model itself. Hooks of the model run in it, as in any forward.

    Args:
        model: any module.
        example_input: a batch, or its shape; by default what timm's `pretrained_cfg` or the model's first layer suggests.

    Raises:
        ProbeError: if no forward went through.
    """
    shapes = [] if example_input is None else [_shape(example_input)]
    with layers_called(model):
        return _first_that_goes_through(model, shapes or candidate_shapes(model), example_input)


def _first_that_goes_through(
    model: nn.Module, shapes: Iterable[tuple[int, ...]], example_input: Tensor | Sequence[int] | None
) -> Probe:
    failures = []
    for shape in shapes:
        for where in ("meta", "model"):
            try:
                if where == "meta":
                    twin = _meta_twin(model)
                    kind = example_input.dtype if isinstance(example_input, Tensor) else torch.float32
                    kind = _dtype(model) if kind.is_floating_point else kind
                    return _watched_forward(twin, torch.empty(shape, device="meta", dtype=kind))
                return _watched_forward(model, example_batch(model, example_input, shape))
            except Exception as error:  # whatever a foreign forward may raise
                failures.append(f"{list(shape)} on {where}: {in_a_line(error)}")
            if _device(model).type == "meta":
                break
    raise ProbeError("; ".join(failures) or "no input shape could be guessed")


def _shape(example_input: Tensor | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(example_input, Tensor | Sequence):
        raise ValueError(
            f"example_input {example_input!r} is neither a batch nor the shape of one, such as (2, 3, 224, 224)"
        )
    shape = tuple(example_input.shape if isinstance(example_input, Tensor) else example_input)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"example_input has the shape {list(shape)}; every size must be a number above 0")
    return shape


def example_batch(model: nn.Module, example_input: Tensor | Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
    """A batch where the model is: the one given, or random numbers, which leave the global generators alone."""
    if not isinstance(example_input, Tensor):
        example_input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dtype = _dtype(model) if example_input.is_floating_point() else example_input.dtype
    return example_input.detach().to(_device(model), dtype)


def candidate_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of an input that the model may take, the likeliest first: image size of the model, timm's, common ones."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if isinstance(first, nn.Linear):
        yield 2, first.in_features
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    # What stands first in the module tree may come later in forward, or behind a rearrangement of pixels.
    channels = [first.in_channels] if isinstance(first, nn.Conv2d) else []
    channels += [config["input_size"][0]] if config.get("input_size") else [3]
    sizes: list[Any] = [getattr(getattr(model, "patch_embed", None), "img_size", None)]
    sizes += [config[name][-2:] for name in ("input_size", "min_input_size") if config.get(name)]
    sizes += [(224, 224), (64, 64), (32, 32), (28, 28)]
    for size in dict.fromkeys(tuple(s) if not isinstance(s, int) else (s, s) for s in sizes if s is not None):
        for count in dict.fromkeys(channels):
            yield (2, count, *size)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers have no storage."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _watched_forward(model: nn.Module, x: Tensor) -> Probe:
    watch = _Watch(model, Probe(tuple(x.shape)))
    set_flow(x, Flow(from_input=True, axis=1 if x.dim() > 2 else None))
    with forward_without_trace(model), watch.hooks(), watch:
        model(x)
    watch.seen.findings.inputs.clear()
    watch.seen.findings.outputs.clear()
    return watch.seen


@dataclass(frozen=True)
class _Frame:
    """A module that runs: its name, its first input, and what was known of that when it came (it may be overwritten)."""

    name: str
    x: Tensor | None
    flow: Flow


class _Watch(TorchFunctionMode):
    """Sees every function of torch through `__torch_function__`, and every module through hooks."""

    def __init__(self, model: nn.Module, seen: Probe) -> None:
        super().__init__()
        self.model = model
        self.seen = seen
        self.stack: list[_Frame] = []
        self.owners = {
            id(m.weight): name for name, m in model.named_modules() if is_weight_layer(m) and hasattr(m, "weight")
        }
        self.opaque = 0  # how many activation or gate modules are running: their inner operations are theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # An in-place operation overwrites its operand's knowledge, so it is read first.
        operands = [*_unrolled(args), *_unrolled(tuple(kwargs.values()))]
        inside = self.stack[-1].name if self.stack else ""
        flow = None if self.opaque else after(func, operands, inside, self.seen.findings)
        result = func(*args, **kwargs)
        if func in WEIGHT_FUNCTIONS:
            self._note_users(func, operands, result, inside)
        if macs := product_of_streams(func, operands, result):
            self.seen.products[inside] = self.seen.products.get(inside, 0) + macs
        if func is Tensor.__setitem__:
            after_assignment(args[0], args[2])
        if flow is not None and isinstance(result, Tensor | list | tuple):
            flow = with_axis_of(flow, func, operands, result)
            set_flow(result, replace(flow, gate_layers=frozenset()) if _is_pooled(result, operands) else flow)
        return result

    def _note_users(self, function: Any, operands: list[Any], result: Any, inside: str) -> None:
        running = {frame.name for frame in self.stack}
        x = next(value for value in operands if isinstance(value, Tensor))
        output = x if "transpose" in function.__name__ else result[0] if isinstance(result, tuple) else result
        for weight in operands:
            owner = self.owners.get(id(weight))
            if owner is not None and owner not in running:
                self.seen.users[owner] = inside
                self.seen.user_macs[owner] += output.numel() * weight[0].numel()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
            frame = _Frame(name, x, flow_of(x) or Flow())
            self.stack.append(frame)
            if is_activation(module) or isinstance(module, GATE_MODULES):
                self.opaque += 1
            if x is None:
                return
            if is_activation(module) or isinstance(module, SIGMOIDS):
                self.seen.activations.setdefault(name, []).append((tuple(x.shape), frame.flow.axis))
            self._note_norm(module, frame)
            if is_weight_layer(module):
                call = self.seen.layers.setdefault(name, LayerCall(frame.flow, tuple(x.shape)))
                call.input_shape = tuple(x.shape)
                call.flow = _both(call.flow, frame.flow)  # a layer that is called twice answers for both of its inputs
                self.seen.findings.inputs[name] = x
                self.seen.findings.before[name] = frame.flow.behind

        return hook

    def _note_norm(self, module: nn.Module, frame: _Frame) -> None:
        """Where a weight layer's own output enters a norm module: behind that, a shortcut around the layer may end."""
        layer, findings = frame.flow.layer, self.seen.findings
        if layer and frame.flow.norm is None and frame.name and _is_norm(module):
            findings.norms.setdefault(layer, frame.name)
            if frame.x is not findings.outputs.get(layer):  # a permutation, say, stands between
                findings.rearranged.add(layer)

    def _note_norm_output(self, frame: _Frame, output: Any) -> None:
        """A norm may rearrange by itself what it gives."""
        layer, findings = frame.flow.layer, self.seen.findings
        if layer is None or findings.norms.get(layer) != frame.name or frame.x is None:
            return
        flow = flow_of(output)
        moved = flow is not None and flow.axis not in (None, frame.flow.axis)
        if moved or not isinstance(output, Tensor) or output.shape != frame.x.shape:
            findings.rearranged.add(layer)

    def _leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        frame = self.stack.pop()
        if (given := next((value for value in _unrolled([output]) if isinstance(value, Tensor)), None)) is not None:
            self.seen.outputs[frame.name] = tuple(given.shape)
        self._note_norm_output(frame, output)
        if isinstance(module, GATE_MODULES):
            self.opaque -= 1
            set_flow(output, after_gate(frame.flow, frame.name if isinstance(module, SIGMOIDS) else None))
        elif is_activation(module):
            self.opaque -= 1
            flow = after_activation(frame.flow, frame.name, is_one_sided(module))
            set_flow(output, replace(flow, norm=None) if isinstance(module, ACTIVATION_NORMS) else flow)
        elif is_weight_layer(module) and frame.x is not None:
            first = output[0] if isinstance(output, tuple) else output
            call = self.seen.layers[frame.name]
            call.macs += multiply_accumulates(module, frame.x, first)
            call.output_shape = tuple(first.shape)
            self.seen.findings.outputs[frame.name] = first
            axis = first.dim() - 1 if isinstance(module, nn.Linear) else 1 if first.dim() > 1 else None
            set_flow(output, after_layer(frame.flow, frame.name, _is_one_pixel(frame.x), axis))


def _unrolled(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat.extend(value if isinstance(value, list | tuple) else [value])
    return flat


def _both(first: Flow, second: Flow) -> Flow:
    if first == second:
        return first
    positive = (
        None if first.positive_by is None or second.positive_by is None else first.positive_by | second.positive_by
    )
    return Flow(
        sources=first.sources | second.sources,
        positive_by=positive,
        from_input=first.from_input or second.from_input,
        behind=first.behind | second.behind,
        norm=first.norm if first.norm == second.norm else None,
        axis=first.axis if first.axis == second.axis else None,
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, perhaps with an activation inside: it has a scale per channel, and no layer in it."""
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, *ACTIVATION_NORMS)
    return isinstance(module, known) or (
        "norm" in type(module).__name__.lower() and not any(is_weight_layer(inner) for inner in module.modules())
    )


def _is_one_pixel(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dim() == 2 or (x.dim() == 4 and x.shape[-2:] == (1, 1)))


def _is_pooled(result: Any, operands: list[Any]) -> bool:
    """Whether an operation took an image to one pixel."""
    largest = max((v.numel() for v in operands if isinstance(v, Tensor)), default=0)
    return _is_one_pixel(result) and result.numel() < largest
