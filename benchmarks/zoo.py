"""What `timm_sweep.py` asks of one architecture of timm, and the tests of some: that its binarized form works.

A network of up to `REAL_LIMIT` parameters runs with real numbers: built, run forward and backward as a float network, binarized,
run again, saved, rebuilt and compared. A larger one runs so with fake tensors, and then with real numbers block by block: the
large weights of a block exist only while it runs, on what the block before it gave.

The input is the smallest that the network takes, of 64 pixels or more: in smaller ones the last maps are one pixel, and there a
gate cannot be told from a stream.

Parameters that timm starts at zero (or mostly: identities) get small random values first, as they have after training: a
residual branch behind a zero has no gradient, and the sign of an identity is +1 everywhere.
"""

import gc
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

import design_lightning as dl
from design_lightning.binary._float32 import Float32State
from design_lightning.surgery import BinarizationReport, binary_layers
from design_lightning.surgery.bits import watched_bits_

REAL_LIMIT = 100_000_000
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
BATCH, LARGE_BATCH = 4, 2
LARGE_TENSOR, LARGE_BLOCK = 10_000, 64_000_000


@dataclass
class Row:
    """The result for one architecture: a line of the table."""

    name: str
    status: str = "fail"
    reason: str = ""
    layers: int = 0
    binary_layers: int = 0
    binary_parameters_share: float = 0.0
    binary_operations_share: float = 0.0
    parameters: int = 0
    numbers: str = ""
    input: int = 0
    blocks: int = 0
    units: int = 0
    timm: str = timm.__version__
    torch: str = torch.__version__


@dataclass
class Architecture:
    """A name of timm, the smallest input that it takes, and the arguments for it."""

    name: str
    size: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> "Architecture":
        """Finds the size by forwards without numbers: the first of `SIZES` that goes through, else timm's own."""
        plain: nn.Module | None = None
        for size in SIZES:
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, img_size=size)
                arguments = {"img_size": size}
            except Exception:  # it takes no `img_size`, or not this one
                if plain is None:
                    with torch.device("meta"):
                        plain = timm.create_model(name)
                model, arguments = plain, {}
            if _goes_through(model, size):
                return cls(name, size, arguments)
        with torch.device("meta"):
            model = timm.create_model(name)
        return cls(name, model.pretrained_cfg["input_size"][-1])

    def build(self, large_on_meta: bool = False) -> nn.Module:
        """The float network in training mode, the same each time."""
        torch.manual_seed(0)
        model = _lean(self) if large_on_meta else timm.create_model(self.name, **self.arguments)
        _fill_zeros_(model)
        return model.train()

    def batch(self, count: int = BATCH) -> Tensor:
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


def check_architecture(name: str, config: dl.BinaryConfig | None = None, real_limit: int = REAL_LIMIT) -> Row:
    """Runs everything for one architecture; the row tells what failed, and whether the float network fails alike."""
    row = Row(name)
    try:
        architecture = Architecture.of(name)
        row.input = architecture.size
        with torch.device("meta"):
            row.parameters = sum(p.numel() for p in timm.create_model(name, **architecture.arguments).parameters())
        row.numbers = "real" if row.parameters <= real_limit else "fake, real by block"
        check = _check_real if row.parameters <= real_limit else _check_large
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(architecture, config or dl.BinaryConfig(), row)
        row.status = "pass"
    except FloatFailureError as error:
        row.reason = f"the float network fails alike: {error}"
    except Exception as error:
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    gc.collect()
    return row


class FloatFailureError(RuntimeError):
    """The float network, before any surgery, does not do what is asked."""


def as_dict(row: Row) -> dict[str, Any]:
    return asdict(row)


# -- real numbers ------------------------------------------------------------------------------------------------------


def _check_real(architecture: Architecture, config: dl.BinaryConfig, row: Row) -> None:
    model, x = architecture.build(), architecture.batch()
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        _loss(_forward(model, x)).backward()
    except Exception as error:
        raise FloatFailureError(f"{type(error).__name__}: {error}") from error
    trained = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    report = dl.binarize_(model, config, x)
    _note_report(report, row)
    row.units = sum(note.count(",") + 1 for note in report.notes if "took the size of the input" in note)
    with _checked_signs(model, both=True) as called:
        _loss(_forward(model, x)).backward()
    _expect(called == set(binary_layers(model)), f"not called: {sorted(set(binary_layers(model)) - called)[:3]}")
    lost = [n for n, p in model.named_parameters() if n in trained and (p.grad is None or not bool(p.grad.any()))]
    lost = [n for n in lost if n not in _rounding_only(architecture, lost)]
    _expect(not lost, f"{len(lost)} parameters lost their gradient, such as {lost[:3]}")
    with tempfile.TemporaryDirectory() as folder:
        path = dl.save(model, Path(folder) / "model.safetensors", architecture.arguments)
        rebuilt = dl.load(path)
    _expect_same_state(model.state_dict(), rebuilt.state_dict())
    model.eval()
    with torch.no_grad():
        for ours, theirs in zip(_tensors(model(x)), _tensors(rebuilt(x)), strict=True):
            _expect(torch.equal(ours, theirs), "the rebuilt network gives other outputs")


def _rounding_only(architecture: Architecture, names: list[str]) -> set[str]:
    """Those whose gradient in the float network is nothing but rounding: a bias in front of a softmax, say, which it cancels.

    In float64 it is below a millionth of what float32 rounds, relative to the largest gradient.
    """
    if not names:
        return set()
    model = architecture.build().double()
    _loss(_forward(model, architecture.batch().double())).backward()
    sizes = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None}
    return {name for name in names if sizes[name] < 1e-13 * max(sizes.values())}


def _note_report(report: BinarizationReport, row: Row) -> None:
    totals = report.totals()
    row.layers, row.binary_layers = totals["layers"], totals["binary_layers"]
    row.binary_parameters_share = round(totals["binary_parameters_share"], 4)
    row.binary_operations_share = round(totals["binary_macs_share"], 4)
    _expect(row.binary_layers > 0, "no layer became binary")


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _expect_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    _expect(first.keys() == second.keys(), f"keys differ: {sorted(first.keys() ^ second.keys())[:3]}")
    for key, value in first.items():
        other = second[key]
        same = (
            value == other
            if not isinstance(value, Tensor)
            else value.shape == other.shape
            and value.dtype == other.dtype
            and (value.is_meta or torch.equal(value.nan_to_num(), other.nan_to_num()))
        )
        _expect(bool(same), f"{key} differs in the rebuilt network")


@contextmanager
def _checked_signs(model: nn.Module, both: bool) -> Iterator[set[str]]:
    """Has every binarizer's output looked at: exactly +-1, and both signs if asked for."""
    called: set[str] = set()
    constant: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            called.add(name)
            _expect(bool((output.abs() == 1).all()), f"{name} gives other values than +-1")
            constant[name] = constant.get(name, True) and bool((output == output.flatten()[0]).all())

        return hook

    handles = [layer.activation.register_forward_hook(watch(n)) for n, layer in binary_layers(model).items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
    dead = [name for name, value in constant.items() if value]
    _expect(not (both and dead), f"{len(dead)} binarizers are constant, such as {dead[:3]}")


# -- fake numbers, and real ones block by block ------------------------------------------------------------------------


def _check_large(architecture: Architecture, config: dl.BinaryConfig, row: Row) -> None:
    model = architecture.build(large_on_meta=True)
    try:
        trained = _fake_gradients(model, architecture)
    except Exception as error:
        raise FloatFailureError(f"{type(error).__name__}: {error}") from error
    shape = (LARGE_BATCH, 3, architecture.size, architecture.size)
    report = dl.binarize_(model, config, shape)
    _note_report(report, row)
    _give_constants_storage_(model)
    lost = trained - _fake_gradients(model, architecture)
    _expect(not lost, f"{len(lost)} parameters lost their gradient, such as {sorted(lost)[:3]}")
    twin = architecture.build(large_on_meta=True)
    dl.binarize_(twin, dl.BinaryConfig.from_dict(config.to_dict()), shape)
    _give_constants_storage_(twin)
    _expect_same_state(model.state_dict(), twin.state_dict())
    row.blocks, row.units = _run_by_block(model, twin, architecture.batch(LARGE_BATCH))


def _fake_gradients(model: nn.Module, architecture: Architecture) -> set[str]:
    """Names of the parameters that get a gradient in a forward and a backward of tensors that have no storage."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=True) for name, p in model.named_parameters()
        }
        buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        x = torch.empty(LARGE_BATCH, 3, architecture.size, architecture.size)
        _loss(functional_call(model, {**tensors, **buffers}, (x,))).backward()
    return {name for name, tensor in tensors.items() if tensor.grad is not None}


def _run_by_block(model: nn.Module, twin: nn.Module, x: Tensor) -> tuple[int, int]:
    """A forward of real numbers, with a backward in each block, and of each kind of block a comparison with the twin's."""
    blocks = dict(_blocks("", model))
    inside = {parameter for block in blocks.values() for parameter in block.parameters()}
    for each in (model, twin):
        names = {name for name, p in model.named_parameters() if p.is_meta and p not in inside}
        _materialise_(each, names, seed=-1)
    done: list[str] = []
    kinds: set[str] = set()
    handles = []
    for number, (name, block) in enumerate(blocks.items()):
        run = _BlockRun(name, block, twin.get_submodule(name), number, done, kinds)
        handles += [
            block.register_forward_pre_hook(run.begin, with_kwargs=True),
            block.register_forward_hook(run.end, with_kwargs=True),
        ]
    with watched_bits_(model) as seen, _checked_signs(model, both=False):
        model(x)
    for handle in handles:
        handle.remove()
    _expect(not seen.constant, f"{len(seen.constant)} binarizers are constant, such as {seen.constant[:3]}")
    unseen = [name for name, block in blocks.items() if name not in done and list(block.parameters())]
    binary = [name for name in unseen if binary_layers(blocks[name])]
    _expect(not binary, f"blocks that no forward called: {binary[:3]}")
    return len(set(done)), len(seen.units)


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts of up to `LARGE_BLOCK` parameters, or that have no parts; containers are taken apart."""
    children = list(module.named_children())
    small = sum(p.numel() for p in module.parameters()) <= LARGE_BLOCK
    whole = small and not isinstance(module, nn.ModuleList | nn.ModuleDict) and name
    if whole or not children or isinstance(module, dl.BinaryConv2d | dl.BinaryLinear | nn.MultiheadAttention):
        yield name, module
        return
    for child_name, child in children:
        yield from _blocks(f"{name}.{child_name}" if name else child_name, child)


class _BlockRun:
    """The hooks of one block: weights come in front of it, the backward stands behind it, and for the first of its kind a
    comparison with the rebuilt network's."""

    def __init__(
        self, name: str, block: nn.Module, twin: nn.Module, number: int, done: list[str], kinds: set[str]
    ) -> None:
        self.kinds = kinds
        self.name, self.block, self.twin, self.number, self.done = name, block, twin, number, done
        self.large = {n for n, p in block.named_parameters() if p.is_meta}

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.placeholders = _materialise_(block, self.large, seed=self.number)
        self.inputs = _map(args, _leaf), _map(kwargs, _leaf)
        buffers = {name for name, _ in block.named_buffers()}  # a forward may change these
        self.before = {k: v.clone() if k in buffers else v for k, v in block.state_dict().items()}
        self.random = torch.get_rng_state()
        return self.inputs

    def end(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        parameters = {n: p for n, p in block.named_parameters() if p.requires_grad}
        if any(o.requires_grad for o in _tensors(output)):
            sum((o.float() * torch.randn_like(o)).sum() for o in _tensors(output) if o.requires_grad).backward()
            for layer_name, layer in binary_layers(block).items():
                gradient = layer.weight.grad
                _expect(gradient is not None and bool(gradient.any()), f"{self.name}.{layer_name}: no gradient")
            _expect(all(_is_finite(p.grad) for p in parameters.values()), f"{self.name}: a gradient is not finite")
        kind = repr(block)  # classes, shapes and settings
        if kind not in self.kinds:
            self.kinds.add(kind)
            self._compare(output)
        block.zero_grad()
        for n, placeholder in self.placeholders.items():
            _put(block, n, placeholder)
        del self.inputs, self.before, self.placeholders  # or the whole network would have storage in the end
        self.done.append(self.name)
        return _map(output, Tensor.detach)

    def _compare(self, output: Any) -> None:
        """The same block of the rebuilt network, with these weights from a file's bytes, gives the same."""
        tensors = {k: v.contiguous() for k, v in self.before.items() if isinstance(v, Tensor)}
        others = {k: v for k, v in self.before.items() if not isinstance(v, Tensor)}
        units = {k: v for k, v in self.block.state_dict().items() if k.endswith(".unit")}
        stored = safetensors.torch.load(safetensors.torch.save({**tensors, **units}))
        placeholders = {n: self.twin.get_parameter(n) for n in self.large}
        _materialise_(self.twin, self.large, seed=None)
        self.twin.load_state_dict({**stored, **others})
        torch.set_rng_state(self.random)
        args, kwargs = self.inputs
        with torch.no_grad():
            again = self.twin(*_map(args, Tensor.detach), **_map(kwargs, Tensor.detach))
        for ours, theirs in zip(_tensors(output), _tensors(again), strict=True):
            _expect(torch.equal(ours, theirs), f"{self.name}: the rebuilt block gives other outputs")
        for n, placeholder in placeholders.items():
            _put(self.twin, n, placeholder)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())


def _materialise_(module: nn.Module, names: set[str], seed: int | None) -> dict[str, nn.Parameter]:
    """Gives parameters storage, with random values of their fan-in's size if there is a seed; returns what stood there."""
    generator = torch.Generator().manual_seed((seed or 0) + 2)
    placeholders = {}
    for name in sorted(names):
        placeholders[name] = placeholder = module.get_parameter(name)
        values = torch.empty(placeholder.shape, dtype=placeholder.dtype)
        if seed is not None:
            fan_in = values[0].numel() if values.dim() > 1 else 1
            values.uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / max(fan_in, 1)))
        _put(module, name, nn.Parameter(values, requires_grad=placeholder.requires_grad))
    return placeholders


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._parameters[last] = parameter


# -- small helps -------------------------------------------------------------------------------------------------------


def _lean(architecture: Architecture) -> nn.Module:
    """The network without storage for parameters of more than `LARGE_TENSOR` numbers; buffers are real."""
    try:
        with _large_parameters_on_meta():
            return timm.create_model(architecture.name, **architecture.arguments)
    except NotImplementedError:  # it computes buffers on the device of a parameter
        model = timm.create_model(architecture.name, **architecture.arguments)
        for name, parameter in list(model.named_parameters()):
            if parameter.numel() > LARGE_TENSOR:
                _put(model, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
        return model


def _give_constants_storage_(model: nn.Module) -> None:
    """Thresholds and scales come to the device of their layer's weight, which here has no storage."""
    for module in model.modules():
        if isinstance(module, Float32State) and any(t.is_meta for t in module.state_dict().values()):
            module.to_empty(device="cpu")
            module.reset_parameters()


@contextmanager
def _large_parameters_on_meta() -> Iterator[None]:
    """Parameters of more than `LARGE_TENSOR` numbers lose their storage as soon as a module has them; buffers are real."""
    register = nn.Module.register_parameter

    def leanly(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.numel() > LARGE_TENSOR:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = leanly  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _goes_through(model: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            model.train()(torch.empty(BATCH, 3, size, size, device="meta"))
    except Exception:
        return False
    return True


@torch.no_grad()
def _fill_zeros_(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter.is_meta and parameter.is_floating_point() and (parameter == 0).float().mean() > 0.5:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_(0, 1 / math.sqrt(max(fan_in, 1)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, function) for item in value)
    return value


def _forward(model: nn.Module, x: Tensor) -> Any:
    """A forward that drops the same branches each time, where the network drops some at random."""
    torch.manual_seed(2)
    return model(x)


def _loss(output: Any) -> Tensor:
    """A scalar by which every output has a gradient."""
    total = torch.zeros(())
    for tensor in _tensors(output):
        flat = tensor.flatten(1)
        labels = torch.arange(len(flat)) % flat.shape[1]
        total = total + F.cross_entropy(flat, labels)
    return total
