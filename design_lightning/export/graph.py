"""A binarized network as a graph of ONNX in which every product of bits is one node: what each engine's form is made from.

The nodes are of a domain of our own:

    BinaryConv(x, levels, signs)     x [B, C, H, W], levels [D, h, w], signs int8 [O, C / groups, kh, kw]
    BinaryLinear(x, levels, signs)   x [..., I], levels [..., I or 1], signs int8 [O, I]

Each compares x with thresholds and multiplies the signs; it gives sums of +-1, whole numbers. Scale and bias stand behind it, as
ordinary nodes. The thresholds are `levels`, repeated along every axis until they have the shape of x without its batch. What a
layer with another binarizer does, or one whose weights alone are binary, are ordinary nodes.
"""

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from design_lightning._names import in_a_line
from design_lightning.binary.packed import PackedLayer
from design_lightning.export.about import About
from design_lightning.export.conversion import convert_
from design_lightning.export.metadata import FORMAT_VERSION
from design_lightning.export.nodes import BATCH, CALL, DOMAIN, BinaryNode, Call, StandIn
from design_lightning.surgery.hooks import share_hooks
from design_lightning.surgery.packing import pack_layers_, packed_layers

OPSET = 18


@dataclass(frozen=True)
class Graph:
    """A network ready for an engine.

    Args:
        proto: an `onnx.ModelProto`, with nodes of our domain.
        original: the network, packed, float32, on the CPU, in eval mode.
        model: the same, converted: batch norm is folded into the thresholds of sums.
        nodes: its products of bits, in the order of their calls.
        kept: binary layers that are ordinary nodes of the graph, and why.
        input_shape: [C, H, W].
    """

    proto: Any
    original: nn.Module
    model: nn.Module
    nodes: tuple[BinaryNode, ...]
    kept: dict[str, str]
    input_shape: tuple[int, ...]
    about: About = field(default_factory=About)


def make_graph(model: nn.Module, input_shape: Sequence[int]) -> Graph:
    """The graph of a binarized network, for inputs [B, *input_shape] of any B. The network stays as it is.

    Raises:
        ValueError: if it has no binary layer, one is in another stage than `both`, or torch cannot export the network.
        ImportError: if onnx or onnxscript are missing.
    """
    require("onnx", "onnxscript")
    original = packed_copy(model)
    converted = copy.deepcopy(original)
    convert_(converted, (BATCH, *input_shape))
    layers = packed_layers(converted)
    kept = {name: reason for name, layer in layers.items() if (reason := _why_kept(layer))}
    twin = copy.deepcopy(converted)
    stand_ins: dict[nn.Module, StandIn] = {}
    for name, layer in packed_layers(twin).items():
        if name not in kept:
            stand_ins[layer] = StandIn(name, layer)
    for parent in list(twin.modules()):
        for leaf, child in parent._modules.items():
            if child in stand_ins:
                share_hooks(child, stand_ins[child])
                parent._modules[leaf] = stand_ins[child]
    proto = trace(twin, input_shape)
    nodes = tuple(_binary_nodes(proto, layers, {node.name: node.calls for node in stand_ins.values()}))
    return Graph(proto, original, converted, nodes, kept, tuple(input_shape), About.of(model))


def trace(model: nn.Module, input_shape: Sequence[int]) -> Any:
    """A network as an `onnx.ModelProto`, for inputs [B, *input_shape] of any B: from `input` to `output`.

    Raises:
        ValueError: if its forward fails, or torch cannot export it.
    """
    x = torch.zeros(BATCH, *input_shape)
    try:
        with torch.no_grad(), _quiet():
            outputs = model(x)
            if not isinstance(outputs, Tensor):
                raise TypeError(f"its outputs are a {type(outputs).__name__}; a file gives one tensor, such as logits")
            program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
            exported = torch.onnx.export(program, (x,), dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as error:  # whatever a network may raise
        raise ValueError(
            f"{type(model).__name__} cannot be exported for an input of {[1, *input_shape]}: {in_a_line(error)}"
        ) from error
    assert exported is not None
    proto = exported.model_proto
    _strip(proto)
    for entry, name in ((proto.graph.input[0], "input"), (proto.graph.output[0], "output")):
        rename(proto, entry.name, name)
    return proto


def packed_copy(model: nn.Module) -> nn.Module:
    """A copy with packed layers, float32, on the CPU, in eval mode."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} is on meta and has no values; load weights before you export it")
    packed = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
    if not packed_layers(packed):
        pack_layers_(packed)
    return packed


def require(*packages: str, what: str = "this export") -> None:
    """Raises an ImportError that says what to install, if a package is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'design-lightning[export]'")


def rename(proto: Any, old: str, new: str) -> None:
    """Renames a value of a graph wherever it stands."""
    graph = proto.graph
    for entry in (*graph.input, *graph.output, *graph.value_info):
        if entry.name == old:
            entry.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def cut(graph: Graph) -> Graph:
    """The graph with every binary node fed from an input of its own, `KEY.given`, in place of what comes before it.

    Its outputs are the network's, and of every binary node what it would have been fed, and its sums.
    """
    from onnx import TensorProto, helper

    proto = type(graph.proto)()
    proto.CopyFrom(graph.proto)
    inner = {each.output: each for each in graph.nodes}
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            each = inner[node.output[0]]
            node.input[0] = f"{each.key}.given"
            shape = [f"rows of {each.key}", *each.shape]
            proto.graph.input.append(helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, shape))
            dims = [None] * (len(each.shape) + 1)
            there = {entry.name for entry in (*proto.graph.input, *proto.graph.output)}
            for name in dict.fromkeys((each.input, each.output)):
                if name not in there:
                    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    return replace(graph, proto=proto)


def facts_of(graph: Graph) -> dict[str, str]:
    """What goes into the metadata of an engine's file, as JSON texts by name."""
    facts = {"format_version": FORMAT_VERSION, **graph.about.to_dict(), "input_shape": list(graph.input_shape)}
    return {name: json.dumps(value) for name, value in facts.items()}


def _strip(proto: Any) -> None:
    """Takes off what the exporter notes of itself on every value: paths, and more text than a small network has weights."""
    graph = proto.graph
    for part in (proto, graph, *graph.input, *graph.output, *graph.value_info, *graph.node, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _why_kept(layer: PackedLayer) -> str | None:
    if layer.activation is None:
        return "its weights alone are binary"
    if not layer.multiplies_bits:
        return f"its activation, {type(layer.activation).__name__}, has a forward of its own"
    return None


def _binary_nodes(proto: Any, layers: dict[str, PackedLayer], calls: dict[str, list[Call]]) -> Iterator[BinaryNode]:
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            attribute = next(a for a in node.attribute if a.name == CALL)
            name, _, call = attribute.s.decode().rpartition("#")
            key = name if call == "1" else f"{name}#{call}"
            yield BinaryNode(key, layers[name], node.input[0], node.output[0], calls[name][int(call) - 1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's messages, which are of no use to whoever exports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
