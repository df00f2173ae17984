"""A network that is too large for real numbers at once: shapes first, then real numbers block by block.

The large weights of a block exist only while it runs, on what the block before it gave.
"""

import math
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import design_lightning as dl
from design_lightning.binary._float32 import Float32State
from design_lightning.export.metadata import Metadata
from design_lightning.surgery import binary_layers
from design_lightning.surgery.bits import watched_bits_
from zoo.architecture import Architecture, lean
from zoo.bits import count_units, watched_bits, without_hooks
from zoo.checks import (
    FloatFailureError,
    Original,
    check_latent_weights,
    check_report,
    check_restored,
    check_stage_weights,
    expect,
    expect_finite,
    expect_same,
    expect_same_state,
    keeping_activations,
    note_report,
    structure,
    tolerance_of,
)
from zoo.row import Row
from zoo.tensors import loss_of, map_tensors, put_parameter, tensors_in

BATCH = 2
LARGE_BLOCK = 64_000_000


def check_by_block(architecture: Architecture, config: dl.BinaryConfig, row: Row) -> None:
    model = architecture.build(large_on_meta=True)
    original = Original(model)
    try:
        with original.watched(model):
            _fake_output(model.eval(), architecture)
            trained = _fake_gradients(model.train(), architecture)
    except Exception as error:
        raise FloatFailureError(f"{type(error).__name__}: {error}") from error
    shape = (BATCH, 3, architecture.size, architecture.size)
    report = dl.binarize_(model, config, shape)
    note_report(report, model, row)
    check_report(report, model, original, config)
    check_latent_weights(report, model, original)
    _give_constants_storage_(model)
    lost = (trained - _fake_gradients(model, architecture)) & dict(model.named_parameters()).keys()
    expect(not lost, f"{len(lost)} parameters lost their gradient, such as {sorted(lost)[:3]}")
    stored = Metadata.from_text(Metadata.of(model, architecture.arguments).to_text())
    others = {"rebuilt": lean(stored.build).train(), "kept": architecture.build(large_on_meta=True)}
    dl.binarize_(others["kept"], keeping_activations(config), shape)
    for other in others.values():
        _give_constants_storage_(other)
    others["rebuilt"].load_state_dict(model.state_dict())
    expect_same_state(model.state_dict(), others["rebuilt"].state_dict())
    expect(structure(model) == structure(others["rebuilt"]), "the rebuilt network has other modules")
    dl.set_stage_(others["kept"], "float")
    others["float"] = architecture.build(large_on_meta=True)
    _Streamed(model, others, trained, original.called[True]).run(architecture.batch(BATCH), row)
    dl.unbinarize_(model)
    check_restored(model, original)


def _fake_output(model: nn.Module, architecture: Architecture) -> tuple[Any, dict[str, Tensor]]:
    """What a forward gives of tensors that have no storage, and the parameters that it took."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {n: torch.empty(p.shape, dtype=p.dtype, requires_grad=True) for n, p in model.named_parameters()}
        buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        x = torch.empty(BATCH, 3, architecture.size, architecture.size)
        return functional_call(model, {**tensors, **buffers}, (x,)), tensors


def _fake_gradients(model: nn.Module, architecture: Architecture) -> set[str]:
    """Names of the parameters that get a gradient in a forward and a backward of tensors that have no storage."""
    output, tensors = _fake_output(model, architecture)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss_of(output).backward()
    return {name for name, tensor in tensors.items() if tensor.grad is not None}


def _give_constants_storage_(model: nn.Module) -> None:
    """Thresholds and scales come to the device of their layer's weight, which here has no storage."""
    for module in model.modules():
        if isinstance(module, Float32State) and any(t.is_meta for t in module.state_dict().values()):
            module.to_empty(device="cpu")
            module.reset_parameters()


class _Streamed:
    """A forward of real numbers through a network whose large weights come and go.

    Each block runs backward right behind its forward. The first of its kind is compared with the same block of other
    networks: the rebuilt one, and the float one.
    """

    def __init__(self, model: nn.Module, others: dict[str, nn.Module], trained: set[str], called: set[str]) -> None:
        self.model, self.others, self.trained = model, others, trained
        self.blocks = dict(_blocks("", model, called))
        self.kinds: set[str] = set()
        self.done: set[str] = set()

    def run(self, x: Tensor, row: Row) -> None:
        inside = {parameter for block in self.blocks.values() for parameter in block.parameters()}
        outside = {name for name, p in self.model.named_parameters() if p.is_meta and p not in inside}
        placeholders = _materialise_(self.model, outside, seed=-1)
        for other in self.others.values():
            _materialise_(other, outside & dict(other.named_parameters()).keys(), seed=-1)
        handles = []
        # The first sets units, before the second looks.
        with watched_bits_(self.model), watched_bits(self.model) as bits:
            for number, (name, block) in enumerate(self.blocks.items()):
                visit = _Visit(self, name, block, number)
                handles.append(block.register_forward_pre_hook(visit.begin, with_kwargs=True))
                handles.append(block.register_forward_hook(visit.end, with_kwargs=True))
            self.model(x)
        for handle in handles:
            handle.remove()
        for name, placeholder in placeholders.items():
            put_parameter(self.model, name, placeholder)
        row.least_share = round(bits.check(self.model), 5)
        bits.check_inputs()
        row.blocks, row.units = len(self.done), count_units(self.model)


def _blocks(name: str, module: nn.Module, called: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts that the model calls, of up to `LARGE_BLOCK` parameters or without parts of their own.

    What a part holds that is not called (its methods or weights are used without a forward) is none; its numbers stay.
    """
    children = list(module.named_children())
    is_small = not children or sum(p.numel() for p in module.parameters()) <= LARGE_BLOCK
    called_whole = name and name in called and is_small
    if called_whole or isinstance(module, dl.BinaryConv2d | dl.BinaryLinear | nn.MultiheadAttention):
        yield name, module
        return
    for child_name, child in children:
        yield from _blocks(f"{name}.{child_name}" if name else child_name, child, called)


class _Visit:
    """The hooks of one block."""

    def __init__(self, stream: _Streamed, name: str, block: nn.Module, number: int) -> None:
        self.stream, self.name, self.number = stream, name, number
        self.large = {n for n, p in block.named_parameters() if p.is_meta}

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.placeholders = _materialise_(block, self.large, seed=self.number)
        self.inputs = map_tensors(args, Tensor.detach), map_tensors(kwargs, Tensor.detach)
        buffers = {name for name, _ in block.named_buffers()}  # a forward may change these
        self.before = {k: v.clone() if k in buffers else v for k, v in block.state_dict().items()}
        self.random = torch.get_rng_state()
        return map_tensors(self.inputs, _with_gradient)

    def end(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        expect_finite(output, f"{self.name}: the output")
        check_stage_weights(block)
        self._check_gradients(block)
        kind = repr(block)  # classes, shapes and settings
        if kind not in self.stream.kinds:
            self.stream.kinds.add(kind)
            self._compare(block, output)
        block.zero_grad()
        for n, placeholder in self.placeholders.items():
            put_parameter(block, n, placeholder)
        del self.inputs, self.before, self.placeholders  # or the whole network would have storage in the end
        self.stream.done.add(self.name)
        return map_tensors(output, Tensor.detach)

    def _check_gradients(self, block: nn.Module) -> None:
        """Those of a forward that nobody watches."""
        args, kwargs = map_tensors(self.inputs, _with_gradient)
        torch.set_rng_state(self.random)
        with without_hooks(block):
            output = block.forward(*args, **kwargs)
        trained = {n: p for n, p in block.named_parameters() if f"{self.name}.{n}" in self.stream.trained}
        outputs = [o for o in tensors_in(output) if o.requires_grad]
        expect(bool(outputs) or not trained, f"{self.name}: no gradient can reach its parameters")
        if outputs:
            torch.stack([(o.float() * torch.randn_like(o)).sum() for o in outputs]).sum().backward()
        for n, parameter in trained.items():
            expect(parameter.grad is not None, f"{self.name}.{n}: no gradient")
            expect_finite(parameter.grad, f"{self.name}.{n}: the gradient")
        for n, layer in binary_layers(block).items():
            gradient = layer.weight.grad
            expect(gradient is not None and bool(gradient.any()), f"{self.name}.{n}: no gradient")

    def _compare(self, block: nn.Module, output: Any) -> None:
        """The same block of other networks, with these weights from a file's bytes: the rebuilt one gives the same."""
        tensors = {k: v.contiguous() for k, v in self.before.items() if isinstance(v, Tensor)}
        others = {k: v for k, v in self.before.items() if not isinstance(v, Tensor)}
        units = {k: v for k, v in block.state_dict().items() if k.endswith(".unit")}
        state = {**safetensors.torch.load(safetensors.torch.save({**tensors, **units})), **others}
        expect_same(output, self._output_of("rebuilt", state), f"{self.name}: the rebuilt block gives another output")
        expected, kept = self._output_of("float", state), self._output_of("kept", state)
        tolerance = tolerance_of(self.stream.others["kept"].get_submodule(self.name))
        expect_same(
            expected, kept, f"{self.name}: in stage float the output is another than the float block's", tolerance
        )

    def _output_of(self, which: str, state: dict[str, Any]) -> Any:
        """What this block of one of the other networks gives of the same input, with a state as far as it has its keys."""
        block = self.stream.others[which].get_submodule(self.name)
        large = {n for n, p in block.named_parameters() if p.is_meta}
        placeholders = _materialise_(block, large, seed=None)
        keys = block.state_dict().keys()
        missing = {k for k in keys - state.keys() if which == "rebuilt" or f"{k}" in large}
        expect(not missing, f"{self.name}: {sorted(missing)[:3]} are not in the file")
        stage = {k: v for k, v in block.state_dict().items() if not isinstance(v, Tensor)}
        block.load_state_dict({**{k: v for k, v in state.items() if k in keys}, **stage}, strict=which == "rebuilt")
        torch.set_rng_state(self.random)
        args, kwargs = map_tensors(self.inputs, Tensor.clone)
        with torch.no_grad():
            output = block(*args, **kwargs)
        for n, placeholder in placeholders.items():
            put_parameter(block, n, placeholder)
        return output


def _with_gradient(value: Tensor) -> Tensor:
    """A copy behind which there is a gradient to compute; no leaf, so that the block may change it in place."""
    return value.detach().requires_grad_(value.is_floating_point()).clone()


def _materialise_(module: nn.Module, names: set[str], seed: int | None) -> dict[str, nn.Parameter]:
    """Gives parameters storage, with random values of their fan-in's size if there is a seed; returns what stood there."""
    generator = torch.Generator().manual_seed((seed or 0) + 2)
    placeholders = {}
    for name in sorted(names):
        placeholders[name] = placeholder = module.get_parameter(name)
        values = torch.empty(placeholder.shape, dtype=placeholder.dtype)
        fan_in = values[0].numel() if values.dim() > 1 else 1
        if seed is not None and fan_in == 1 and values.dim() > 1:
            values.fill_(1)  # a gain
        elif seed is not None:
            values.uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / max(fan_in, 1)))
        put_parameter(module, name, nn.Parameter(values, requires_grad=placeholder.requires_grad))
    return placeholders
