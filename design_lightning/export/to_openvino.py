"""OpenVINO IR whose binary layers run as the CPU plugin's 1-bit convolution, wherever it has one.

A binary layer is a two-level FakeQuantize, which gives the bits, and opset1's `BinaryConvolution`; the plugin fuses both. What
the plugin asks for (measured with OpenVINO 2026.4):

- FakeQuantize compares by `>`, so each threshold is put a step lower; its levels are 0 and 1; each of its four limits is a
  Constant of its own, per channel. Thresholds that vary over the image are subtracted first.
- Weights are of type u1, the first in the lowest bit. Channels come in eights. Sizes are static.
- It computes float layers in bfloat16 where the CPU can, unless INFERENCE_PRECISION_HINT is f32.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from design_lightning.binary.products import Convolution, Linear
from design_lightning.export.graph import Graph, facts_of, require
from design_lightning.export.nodes import DOMAIN, BinaryNode
from design_lightning.export.seal import EMPTY_SEAL, seal_openvino

PRIMITIVE = "jit"
"""What the name of the 1-bit primitive starts with; the plugin's slow reference is called `ref`."""


@dataclass(frozen=True)
class OpenVinoForm:
    """A network for OpenVINO.

    Args:
        model: an `openvino.Model` of static shape.
        stay_float: binary layers that the engine cannot run as 1-bit, and why.
        arrays: the memory of its 1-bit constants, which must live as long as the model.
    """

    model: Any
    stay_float: dict[str, str]
    arrays: list[NDArray[Any]]


def to_openvino(graph: Graph, given: Mapping[str, str] | None = None) -> OpenVinoForm:
    """The form of a graph, or of what `cut` made of it, for one image at a time.

    Args:
        graph: with nodes of our domain.
        given: the layers that stay float, and why, if that has been found out; else each kind of layer is tried.
    """
    require("openvino", "onnx")
    import onnx
    import openvino as ov
    from openvino.frontend.onnx import ConversionExtension

    stay_float = dict(given) if given is not None else find_float_layers(graph)
    nodes = {node.call.attributes["call"]: node for node in graph.nodes}
    arrays: list[NDArray[Any]] = []

    def convert(context: Any) -> list[Any]:
        node = nodes[context.get_attribute("call")]
        x = context.get_input(0)
        return [(_float_layer if node.key in stay_float else _binary_layer)(node, x, arrays)]

    core = ov.Core()
    for kind in ("BinaryConv", "BinaryLinear"):
        core.add_extension(ConversionExtension(kind, DOMAIN, convert))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(graph.proto, path)
        model = core.read_model(path)
    sizes = {f"{node.key}.given": [node.call.rows, *node.shape] for node in graph.nodes}
    sizes["input"] = [1, *graph.input_shape]
    model.reshape({port: sizes[port.get_any_name()] for port in model.inputs})
    facts = {**facts_of(graph), "stay_float": json.dumps(stay_float), "sha256": EMPTY_SEAL}
    for name, value in facts.items():
        model.set_rt_info(value, [DOMAIN, name])
    model.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
    return OpenVinoForm(model, stay_float, arrays)


def write_openvino(form: OpenVinoForm, path: Path) -> None:
    """Writes `path`, an `.xml`, and the `.bin` beside it."""
    import openvino as ov

    ov.save_model(form.model, path, compress_to_fp16=False)
    seal_openvino(path)


def find_float_layers(graph: Graph) -> dict[str, str]:
    """The binary layers that this engine, on this CPU, does not run as 1-bit, and why: each kind of layer is tried alone."""
    tried: dict[Any, str | None] = {}
    found = {}
    for node in graph.nodes:
        signature = _signature(node)
        if signature not in tried:
            tried[signature] = _why_float(node)
        if (reason := tried[signature]) is not None:
            found[node.key] = reason
    return found


def one_bit_layers(compiled: Any) -> dict[str, str]:
    """From each binary convolution in a compiled model's execution graph to the primitive that runs it."""
    found = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if "BinaryConv" in info["layerType"].astype(str):
            found[op.get_friendly_name()] = info["primitiveType"].astype(str)
    return found


def _signature(node: BinaryNode) -> Any:
    call = node.call
    attributes = {name: str(value) for name, value in call.attributes.items() if name != "call"}
    return call.rows, node.shape, tuple(node.layer.signs.shape), tuple(call.levels.shape), tuple(attributes.items())


def _why_float(node: BinaryNode) -> str | None:
    """Why the engine does not run a layer as 1-bit; None if it does, and gives the right sums."""
    import openvino as ov
    from openvino import opset13 as ops

    product = node.call.product
    if isinstance(product, Convolution) and product.groups > 1:
        return f"a convolution of {product.groups} groups"
    channels = node.layer.signs.shape[1]
    if channels % 8:
        return f"{channels} input channels are not a multiple of 8"
    x = torch.randn(node.call.rows, *node.shape, generator=torch.Generator().manual_seed(0)) + node.thresholds()
    arrays: list[NDArray[Any]] = []
    try:
        parameter = ops.parameter(list(x.shape), np.float32)
        output = _binary_layer(node, parameter.output(0), arrays)
        scaled = ops.multiply(
            output, ops.constant(np.float32(0.5))
        )  # as in a network: the engine fuses what comes behind
        compiled = ov.Core().compile_model(ov.Model([scaled], [parameter]), "CPU", settings())
        result = torch.from_numpy(compiled([x.numpy()])[0]) * 2
    except RuntimeError as error:
        return f"the engine refuses it: {str(error).strip().splitlines()[-1][:120]}"
    expected = node.sums(torch.where(x >= node.thresholds(), 1.0, -1.0))
    if not torch.equal(result, expected):
        return "the engine computes it wrongly as 1-bit"
    primitives = list(one_bit_layers(compiled).values())
    if not primitives or not primitives[0].startswith(PRIMITIVE):
        return f"the engine has no 1-bit primitive for it here (it would use {', '.join(primitives) or 'none'})"
    return None


def settings(threads: int | None = None) -> dict[str, Any]:
    """How a model is compiled: float layers in float32, and one image at a time as fast as it can be."""
    chosen: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        chosen["INFERENCE_NUM_THREADS"] = threads
    return chosen


def _binary_layer(node: BinaryNode, x: Any, arrays: list[NDArray[Any]]) -> Any:
    """The 1-bit form of a node: its sums."""
    from openvino import opset13 as ops

    product = node.call.product
    is_linear = isinstance(product, Linear)
    channel_axis = -1 if is_linear else 0
    channels = node.shape[channel_axis]
    varies = any(size > 1 for axis, size in enumerate(node.call.levels.shape) if axis != channel_axis % len(node.shape))
    if varies:
        x = ops.subtract(x, _map(node)).output(0)
        limit = np.zeros(channels, np.float32)
    else:
        limit = node.thresholds().movedim(channel_axis, 0).reshape(channels, -1)[:, 0].numpy()
    if not is_linear:
        assert isinstance(product, Convolution)
        return _binary_convolution(node, _bits(x, limit, varies), product, arrays).output(0)
    rows = int(np.prod(node.shape[:-1], dtype=int))
    flat = ops.reshape(x, ops.constant(np.array([-1, rows, channels])), False)
    turned = ops.transpose(flat, ops.constant(np.array([0, 2, 1])))
    image = ops.unsqueeze(turned, ops.constant(np.array([3])))
    sums = _binary_convolution(node, _bits(image, limit, varies), Convolution(), arrays)
    tokens = ops.transpose(ops.squeeze(sums, ops.constant(np.array([3]))), ops.constant(np.array([0, 2, 1])))
    outputs = node.layer.signs.shape[0]
    return ops.reshape(tokens, ops.constant(np.array([-1, *node.shape[:-1], outputs])), False).output(0)


def _bits(x: Any, limit: NDArray[np.float32], is_difference: bool) -> Any:
    """1 where x [B, C, H, W] >= limit [C], else 0."""
    from openvino import opset1

    limit = limit.reshape(1, -1, 1, 1)
    # FakeQuantize asks for x > limit. Of a difference of two floats none is as small as 1e-30, but the 0 of equal ones.
    below = np.full_like(limit, -1e-30) if is_difference else np.nextafter(limit, np.float32(-np.inf), dtype=np.float32)
    low, high, zero, one = (_constant(v.copy()) for v in (below, below, np.zeros_like(limit), np.ones_like(limit)))
    return opset1.fake_quantize(x, low, high, zero, one, 2)


def _binary_convolution(node: BinaryNode, bits: Any, product: Convolution, arrays: list[NDArray[Any]]) -> Any:
    import openvino as ov
    from openvino import opset1
    from openvino import opset13 as ops

    signs = node.layer.signs.numpy()
    shape = [*signs.shape, *[1] * (4 - signs.ndim)]
    packed = np.packbits(signs.reshape(-1) > 0, bitorder="little")
    arrays.append(packed)
    weights = ops.constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.u1))
    top, left, bottom, right = node.call.attributes.get("pads", [0, 0, 0, 0])
    return opset1.binary_convolution(
        bits,
        weights,
        list(product.stride),
        [top, left],
        [bottom, right],
        list(product.dilation),
        "xnor-popcount",
        float(product.value),
        "explicit",
    )


def _float_layer(node: BinaryNode, x: Any, arrays: list[NDArray[Any]]) -> Any:
    """The float form of a node: +-1 in float32, by weights that the file holds as int8."""
    from openvino import opset13 as ops

    is_above = ops.greater_equal(x, _map(node))
    bits = ops.select(is_above, _constant(np.float32(1)), _constant(np.float32(-1)))
    signs = node.layer.signs.numpy()
    product = node.call.product
    if isinstance(product, Linear):
        weights = ops.convert(ops.constant(signs), "f32")
        return ops.matmul(bits, weights, False, True).output(0)
    assert isinstance(product, Convolution)
    top, left, bottom, right = node.call.attributes["pads"]
    if product.value:
        before, after = (ops.constant(np.array([0, 0, *sides])) for sides in ((top, left), (bottom, right)))
        bits = ops.pad(bits, before, after, "constant", _constant(np.float32(product.value)))
        top, left, bottom, right = 0, 0, 0, 0
    geometry = (list(product.stride), [top, left], [bottom, right], list(product.dilation))
    if product.groups == 1:
        return ops.convolution(bits, ops.convert(ops.constant(signs), "f32"), *geometry).output(0)
    grouped = signs.reshape(product.groups, -1, *signs.shape[1:])
    return ops.group_convolution(bits, ops.convert(ops.constant(grouped), "f32"), *geometry).output(0)


def _map(node: BinaryNode) -> Any:
    """The thresholds, repeated over an image; the axes along which they do not vary stay of size 1."""
    from openvino import opset13 as ops

    levels = node.call.levels.numpy()
    ends = [1 if period == 1 else size for size, period in zip(node.shape, levels.shape, strict=True)]
    repeats = [-(-end // period) for end, period in zip(ends, levels.shape, strict=True)]
    tiled = ops.tile(ops.constant(levels[None]), ops.constant(np.array([1, *repeats])))
    zeros, stops = ops.constant(np.zeros(len(ends), np.int64)), ops.constant(np.array(ends))
    ones, axes = ops.constant(np.ones(len(ends), np.int64)), ops.constant(np.arange(1, len(ends) + 1))
    return ops.slice(tiled, zeros, stops, ones, axes)


def _constant(value: Any) -> Any:
    from openvino import opset13 as ops

    return ops.constant(value)
