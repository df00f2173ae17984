"""int8 for the float layers: what is rounded, what stays 1-bit, and that the files are files like the others."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import design_lightning as dl
from design_lightning.export import Exports, export_model, open_exported
from design_lightning.export.about import About
from design_lightning.export.formats import check_format
from design_lightning.export.graph import make_graph
from design_lightning.export.quantization import binary_names, check_one_bit, quantize_onnx, quantize_openvino
from design_lightning.export.runtime import openvino_session
from design_lightning.export.verification import DisagreementError, random_images

pytest.importorskip("nncf")
onnx = pytest.importorskip("onnx")
ov = pytest.importorskip("openvino")

from design_lightning.export.to_openvino import one_bit_layers, settings, to_openvino  # noqa: E402

SHAPE = (3, 64, 64)
FLOAT_PRODUCTS = {"Convolution", "MatMul"}
FLOAT_LAYERS = 5
"""Of `test_resnet`: stem, three projections, classifier."""


@dataclass
class Files:
    model: nn.Module
    exports: Exports
    paths: dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A small network, which has labels, in every format of an engine."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    dl.binarize_(model)
    model.train()
    with torch.no_grad():
        model(torch.randn(8, *SHAPE))
    About(labels=("a", "b", "c", "d")).describe_(model.eval())
    names = ("onnx", "openvino", "onnx_int8", "openvino_int8")
    exports = export_model(model, tmp_path_factory.mktemp("files") / "model", names, random_images(SHAPE, 8))
    return Files(model, exports, {each.format: each.path for each in exports.files})


def compiled(path: Path) -> Any:
    return ov.Core().compile_model(str(path), "CPU", settings(1))


def operations(model: Any, kind: str) -> dict[str, Any]:
    return {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == kind}


def limits(path: Path) -> dict[str, list[list[float]]]:
    """The thresholds of each binarizer, and what it gives below and above them."""
    found = {}
    for name, op in operations(ov.Core().read_model(path), "BinaryConvolution").items():
        bits = op.input_value(0).get_node()
        assert bits.get_type_name() == "FakeQuantize"
        assert bits.get_levels() == 2
        found[name] = [bits.input_value(i).get_node().get_data().ravel().tolist() for i in range(1, 5)]
    return found


@pytest.mark.slow
def test_names_of_files(files: Files) -> None:
    assert files.paths["onnx_int8"].name == "model.int8.onnx"
    assert files.paths["openvino_int8"].name == "model.int8.xml"
    assert files.paths["openvino_int8"].with_name("model.int8.bin").is_file()


def test_binary_layers_stay_1_bit(files: Files) -> None:
    before, after = (one_bit_layers(compiled(files.paths[name])) for name in ("openvino", "openvino_int8"))
    assert len(after) == len(before) > 5
    assert all(primitive.startswith("jit") for primitive in after.values())
    shares = {each.format: each.one_bit for each in files.exports.files}
    assert shares["openvino_int8"] == shares["openvino"] == 1


def test_thresholds_are_untouched(files: Files) -> None:
    assert limits(files.paths["openvino_int8"]) == limits(files.paths["openvino"])


def test_each_binary_layer_gives_the_sums_of_its_own_input(files: Files) -> None:
    """Outputs of a small network with random weights hardly tell whether a binary layer runs at all, so each is looked at."""
    graph = make_graph(files.model, SHAPE)
    names = {node.output[0]: node.name for node in graph.proto.graph.node}
    model = ov.Core().read_model(files.paths["openvino_int8"])
    products = operations(model, "BinaryConvolution")
    for node in graph.nodes:
        product = products[names[node.output]]
        x = product.input_value(0).get_node().input_value(0)
        if x.get_node().get_type_name() == "Subtract":
            x = x.get_node().input_value(0)
        for end, port in (("in", x), ("out", product.output(0))):
            model.add_outputs([port])[0].get_tensor().add_names({f"{node.key} {end}"})
    results = openvino_session(model)({"input": random_images(SHAPE, 1).numpy()})
    for node in graph.nodes:
        x = torch.from_numpy(results[f"{node.key} in"])
        sums = node.sums(torch.where(x >= node.thresholds(), 1.0, -1.0))
        assert torch.equal(torch.from_numpy(results[f"{node.key} out"]), sums), node.key
        assert sums.unique().numel() > 2


def test_a_quantizer_that_takes_binary_layers_away_is_caught(files: Files) -> None:
    model = ov.Core().read_model(files.paths["openvino"])
    unpacked = ov.Core().read_model(files.paths["onnx"])
    check_one_bit(model, str(files.paths["openvino_int8"]))
    with pytest.raises(DisagreementError, match=r"runs \d+ of 11 binary layers as 1-bit; use the format 'openvino'"):
        check_one_bit(model, unpacked)


def test_openvino_rounds_what_float_layers_read_and_nothing_else(files: Files) -> None:
    model = ov.Core().read_model(files.paths["openvino_int8"])
    quantized = set()
    for op in operations(model, "FakeQuantize").values():
        if op.get_levels() > 2:
            readers = {target.get_node() for target in op.output(0).get_target_inputs()}
            assert {reader.get_type_name() for reader in readers} <= FLOAT_PRODUCTS
            quantized |= {reader.get_friendly_name() for reader in readers}
    products = {**operations(model, "Convolution"), **operations(model, "MatMul")}
    assert quantized == products.keys()
    assert len(quantized) == FLOAT_LAYERS
    executed = {
        op.get_rt_info()["primitiveType"].astype(str)
        for op in compiled(files.paths["openvino_int8"]).get_runtime_model().get_ops()
    }
    assert any(primitive.endswith("I8") for primitive in executed)


def test_onnx_rounds_float_layers_alone(files: Files) -> None:
    proto = onnx.load(files.paths["onnx_int8"])
    made_by = {output: node.op_type for node in proto.graph.node for output in node.output}
    weights = [made_by.get(node.input[1]) for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert weights.count("DequantizeLinear") == FLOAT_LAYERS
    assert weights.count("Where") == len(weights) - FLOAT_LAYERS > 5
    assert made_by["output"] != "DequantizeLinear"


@pytest.mark.parametrize("name", ["onnx_int8", "openvino_int8"])
def test_the_file_opens_and_its_cost_is_reported(files: Files, name: str) -> None:
    network = open_exported(files.paths[name], threads=1)
    assert network.about.labels == ("a", "b", "c", "d")
    assert network.input_shape == SHAPE
    exported = {each.format: each for each in files.exports.files}
    assert exported[name].bytes < exported[name.removesuffix("_int8")].bytes
    agreement = exported[name].agreement
    assert agreement.difference is not None
    assert 1e-5 < agreement.difference < 0.5
    images = random_images(SHAPE, 8)
    with torch.no_grad():
        expected = files.model(images)
    outputs = torch.cat([network(image) for image in images.split(1)])
    assert (outputs.argmax(1) == expected.argmax(1)).float().mean() == agreement.top1
    row = next(line for line in str(files.exports).splitlines() if f" {name} " in line)
    assert f"{agreement.top1:.0%}" in row
    assert f"{agreement.difference:.1e}" in row


@pytest.mark.parametrize("name", ["onnx_int8", "openvino_int8"])
def test_an_edited_file_is_refused(files: Files, name: str, tmp_path: Path) -> None:
    path = files.paths[name]
    copies = [tmp_path / path.name, (tmp_path / path.name).with_suffix(".bin")]
    for source, target in zip((path, path.with_suffix(".bin")), copies, strict=True):
        if source.is_file():
            edited = source.read_bytes().replace(b'["a", "b"', b'["z", "b"')
            target.write_bytes(edited.replace(b"[&quot;a&quot;", b"[&quot;z&quot;"))
    assert copies[0].read_bytes() != path.read_bytes()
    with pytest.raises(ValueError, match="was edited or damaged"):
        open_exported(copies[0])


def test_binary_layers_that_run_as_float_are_not_rounded(binarized: Callable[..., nn.Module]) -> None:
    graph = make_graph(binarized(), SHAPE)
    form = to_openvino(graph, {node.key: "for this test" for node in graph.nodes})
    quantized = quantize_openvino(form.model, random_images(SHAPE, 2), binary_names(graph))
    rounded = [op for op in operations(quantized, "FakeQuantize").values() if op.get_levels() > 2]
    assert len(operations(quantized, "Convolution")) == len(graph.nodes) + FLOAT_LAYERS - 1
    assert {op.input_value(0).get_node().get_type_name() for op in rounded}.isdisjoint({"Select"})
    readers = {target.get_node().get_friendly_name() for op in rounded for target in op.output(0).get_target_inputs()}
    assert readers.isdisjoint(binary_names(graph))
    assert len(readers) == FLOAT_LAYERS


def test_a_float_network_is_rounded_as_a_whole() -> None:
    from design_lightning.export.graph import trace

    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    proto = trace(network, SHAPE)
    quantized = quantize_onnx(proto, random_images(SHAPE, 2))
    onnx.checker.check_model(quantized)
    made_by = {output: node.op_type for node in quantized.graph.node for output in node.output}
    products = [node for node in quantized.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(products) > 10
    assert {made_by[node.input[1]] for node in products} == {"DequantizeLinear"}
    assert not quantized.metadata_props


def test_a_missing_quantizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    with pytest.raises(ImportError, match=r"'openvino_int8' needs nncf: pip install 'design-lightning\[export\]'"):
        check_format("openvino_int8")
