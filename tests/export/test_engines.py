"""Networks in ONNX Runtime and OpenVINO, beside PyTorch: through `export_model`, which compares layers and outputs itself."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
import timm
import torch
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.binary import BinaryActivation
from design_lightning.export import DisagreementError, Exports, export_model, open_exported, to_onnx, to_openvino
from design_lightning.export.graph import make_graph
from design_lightning.export.seal import EMPTY_SEAL, seal_onnx, seal_openvino
from design_lightning.surgery import binary_layers
from design_lightning.training.batch_norm import recalibrate_batch_norm_

ENGINES = ("onnx", "openvino")


def images(size: int = 32, count: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def network(name: str, size: int = 32, config: dl.BinaryConfig | None = None, **options: Any) -> nn.Module:
    """A binarized network of timm, settled."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options)
    x = images(size, 16)
    dl.binarize_(model, config or dl.BinaryConfig(), x)
    return settle_(model, size)


def settle_(model: nn.Module, size: int) -> nn.Module:
    """Gives batch norms gammas of both signs, and statistics of their input."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if norms:
        recalibrate_batch_norm_(model, [images(size, 16)])
    return model.eval()


def export(model: nn.Module, folder: Path, *formats: str, size: int = 32, **model_args: Any) -> Exports:
    return export_model(model, folder / "model", formats or ENGINES, images(size), model_args=model_args, runs=0)


def assert_agrees(exports: Exports, layers: int) -> None:
    for each in exports.files:
        agreement = each.agreement
        assert agreement.layers == layers
        assert agreement.images == 4
        assert agreement.top1 == 1
        assert agreement.difference is None or agreement.difference < 1e-4
        assert agreement.differing <= agreement.ties * 1000


class Small(nn.Sequential):
    """Three binary layers between float ones: with stride, with dilation, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.norm3 = nn.BatchNorm2d(32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(32, 24)
        self.head = nn.Linear(24, 7)


def small(config: dl.BinaryConfig | None = None, size: int = 27) -> nn.Module:
    """A small binarized network whose batch norms know their input, and whose gammas have both signs."""
    torch.manual_seed(0)
    model = Small()
    dl.binarize_(model, config or dl.BinaryConfig(), images(size, 16))
    return settle_(model, size)


@pytest.mark.parametrize(
    ("name", "layers", "as_float"),
    [
        ("resnet20_cifar", 18, 0),
        pytest.param("test_vit", 24, 0, marks=pytest.mark.slow),
        pytest.param("test_efficientnet", 10, 0, marks=pytest.mark.slow),
        pytest.param("regnetx_002", 39, 13, marks=pytest.mark.slow),
    ],
)
def test_networks_agree_and_run_as_1_bit(name: str, layers: int, as_float: int, tmp_path: Path) -> None:
    size = 160 if name.startswith("test_") else 32
    model = network(name, size)
    exports = export(model, tmp_path, size=size)
    assert_agrees(exports, layers)
    assert len(binary_layers(model)) == layers  # the model itself stays as it is
    in_openvino = exports.files[1]
    assert len(in_openvino.stay_float) == as_float
    assert in_openvino.one_bit == 1 if not as_float else 0.5 < in_openvino.one_bit < 1
    assert all("groups" in reason for reason in in_openvino.stay_float.values())
    compiled = ov.Core().compile_model(str(tmp_path / "model.xml"), "CPU")
    primitives = to_openvino.one_bit_layers(compiled)
    assert len(primitives) == layers - as_float
    assert all(primitive.startswith("jit") and primitive.endswith("u1") for primitive in primitives.values())


@pytest.mark.parametrize(
    "config",
    [
        {"padding_value": 1},
        {"padding_value": -1},
        {"padding_value": "replicate"},
        {"activation": "rsign"},
        {"activation": "sign", "weight": "sign"},
        {"kernel": "3x3x4_shifted_v1", "align": "center"},
        {"kernel": "2x2x2_complement_v1", "scale_by_gamma": True, "overrides": {"linear": {"scale_by_gamma": False}}},
        {"shortcut": "bireal", "companion": "rprelu"},
        {"learn_kernel": True, "weight": "learned"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_options_of_surgery(config: dict[str, Any], tmp_path: Path) -> None:
    model = small(dl.BinaryConfig(**config))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BinaryActivation):
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape) / 4)
    exports = export(model, tmp_path, size=27)
    assert_agrees(exports, 3)
    assert exports.files[1].stay_float == {}


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("test_efficientnet", {"skip": ["first", "last"]}, "groups"),
        pytest.param(
            *("tf_efficientnet_lite0", {"policy": "everything"}, "input channels are not a multiple of 8"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("test_vit", {"policy": "everything"}, "input channels are not a multiple of 8"), marks=pytest.mark.slow
        ),
    ],
)
def test_what_an_engine_cannot_do_stays_float_and_is_said(
    name: str, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    size = 160 if name == "test_vit" else 64
    model = network(name, size, dl.BinaryConfig(**config))
    exports = export(model, tmp_path, size=size)
    assert_agrees(exports, len(binary_layers(model)))
    assert any(reason in each for each in exports.files[1].stay_float.values())


def test_layers_that_are_no_products_of_bits_are_ordinary_nodes(tmp_path: Path) -> None:
    class Soft(dl.Sign):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    model = small()
    binary_layers(model)["conv1"].activation = Soft()
    binary_layers(model)["conv2"].activation = None
    exports = export(model, tmp_path, size=27)
    assert_agrees(exports, 1)
    assert exports.files[1].stay_float == {
        "conv1": "its activation, Soft, has a forward of its own",
        "conv2": "its weights alone are binary",
    }


class Twice(nn.Module):
    """Calls one binary layer twice, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x.repeat(1, 3, 1, 1)[:, :8])
        return self.conv(first[:, :, ::2, 1::2] / 4).mean((2, 3))


def test_a_layer_that_is_called_twice_at_two_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice()
    dl.binarize_(model, dl.BinaryConfig(kernel="3x3_symmetric_v1", skip=[]), images(21))
    assert_agrees(export(model.eval(), tmp_path, size=21), 2)


def test_values_on_their_threshold_are_plus_one(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    for kernel in ("2x2_v1", None):
        model = Layer()
        config = dl.BinaryConfig(activation="design" if kernel else "sign", kernel=kernel, skip=[], weight="sign")
        dl.binarize_(model, config, torch.randn(2, 8, 6, 6))
        model.eval()
        layer = binary_layers(model)["conv"]
        layer.weight.data.fill_(1)
        assert layer.activation is not None
        x = torch.zeros(1, 8, 6, 6) + layer.activation.threshold(torch.zeros(1, 8, 6, 6))
        x = torch.cat([x, torch.nextafter(x, torch.tensor(-9.0)), torch.nextafter(x, torch.tensor(9.0))])
        export_model(model, tmp_path / "model", ENGINES, x, runs=0)
        for suffix in (".onnx", ".xml"):
            sums = open_exported(tmp_path / f"model{suffix}")(x)
            assert [set(each.flatten().tolist()) for each in sums] == [{8}, {-8}, {8}]


def test_any_batch_in_onnx_and_labels_in_every_file(tmp_path: Path) -> None:
    model = network("resnet20_cifar")
    facts = dl.export.About(labels=tuple("abcdefg"), mean=(0.5, 0.4, 0.3), std=(1, 1, 1), training={"epochs": 3})
    facts.describe_(model)
    export(model, tmp_path, "onnx", "openvino", "packed")
    for name in ("model.onnx", "model.xml", "model.packed.safetensors"):
        opened = open_exported(tmp_path / name, threads=1)
        assert opened.about == facts
        assert opened.input_shape == (3, 32, 32)
        for count in (1, 3):
            assert opened(images(count=count)).shape == (count, 7)
        with pytest.raises(ValueError, match=r"takes images of \[3, 32, 32\], not \[3, 16, 16\]"):
            opened(images(16))
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(stored["design_lightning.labels"]) == list("abcdefg")


def test_onnx_has_standard_operators_and_stores_a_bit_a_weight(tmp_path: Path) -> None:
    model = network("resnet20_cifar")
    export(model, tmp_path, "onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert proto.opset_import[0].version >= 18
    binary = sum(layer.weight.numel() for layer in binary_layers(model).values())
    bits = [entry for entry in proto.graph.initializer if entry.name.endswith(".bits")]
    assert sum(int(np.prod(entry.dims)) for entry in bits) == binary / 8
    assert {entry.data_type for entry in bits} == {onnx.TensorProto.UINT8}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "model.onnx").stat().st_size < parameters / 8 + 4 * (parameters - binary) + 60_000
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()


# What does not agree


def test_an_export_that_disagrees_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packbits = np.packbits
    monkeypatch.setattr(to_onnx.np, "packbits", lambda bits, bitorder: packbits(bits, bitorder="big"))
    with pytest.raises(DisagreementError, match=r"sums of the binary layer 'conv1' differ, by up to"):
        export(small(), tmp_path, "onnx", size=27)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_the_engine_computes_wrongly_stays_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packbits = np.packbits
    monkeypatch.setattr(to_openvino.np, "packbits", lambda bits, bitorder: packbits(bits, bitorder="big"))
    exports = export(small(), tmp_path, "openvino", size=27)
    assert_agrees(exports, 3)
    assert set(exports.files[0].stay_float.values()) == {"the engine computes it wrongly as 1-bit"}
    assert exports.files[0].one_bit == 0


def test_outputs_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    other = copy.deepcopy(model)
    other.get_submodule("head").bias.data += 1  # type: ignore[operator, union-attr]
    form = to_openvino.to_openvino(make_graph(other, (3, 27, 27)))
    write = to_openvino.write_openvino

    def write_other(_: Any, path: Path) -> None:
        write(form, path)

    monkeypatch.setattr("design_lightning.export.formats.write_openvino", write_other)
    with pytest.raises(
        DisagreementError, match=r"its outputs differ by .* for an image without ties|its class differs"
    ):
        export(model, tmp_path, "openvino", size=27)
    assert not list(tmp_path.iterdir())


def test_one_image_is_compared_layer_by_layer(tmp_path: Path) -> None:
    exports = export_model(small(), tmp_path / "model", ["onnx", "onnx"], images(27, 1), runs=0)
    (exported,) = exports.files
    assert exported.agreement.layers == 3
    assert exported.agreement.images == 1
    assert "on 1 image " in str(exports)


def test_one_image_finds_a_wrong_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packbits = np.packbits
    monkeypatch.setattr(to_onnx.np, "packbits", lambda bits, bitorder: packbits(bits, bitorder="big"))
    with pytest.raises(DisagreementError, match=r"sums of the binary layer 'conv1' differ, by up to"):
        export_model(small(), tmp_path / "model", ["onnx"], images(27, 1), runs=0)


def test_a_format_that_disagrees_leaves_the_others_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagree(form: Any, path: Path) -> None:
        path.with_suffix(".bin").touch()
        raise DisagreementError("no")

    monkeypatch.setattr("design_lightning.export.formats.write_openvino", disagree)
    with pytest.raises(DisagreementError, match="no"):
        export(small(), tmp_path, "onnx", "openvino", size=27)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["packed", "safetensors"])
def test_a_file_of_ours_that_disagrees_is_not_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path) -> nn.Module:
        model = dl.load(path)
        model.get_submodule("fc").bias.data[0] += 1000  # type: ignore[operator, union-attr]
        return model

    monkeypatch.setattr("design_lightning.export.formats.load", load)
    with pytest.raises(DisagreementError, match=r"its outputs differ by|its class differs"):
        export(network("resnet20_cifar", width=0.25), tmp_path, name, width=0.25)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_that_lose_the_classes_are_not_written(dtype: torch.dtype, tmp_path: Path) -> None:
    model = network("resnet20_cifar", width=0.25)
    arguments: dict[str, Any] = {"model_args": {"width": 0.25}, "dtype": dtype, "runs": 0}
    (sound,) = export_model(model, tmp_path / "sound", ["packed"], images(count=16), **arguments).files
    assert sound.agreement.difference != 0  # rounding costs something, which is reported
    model.fc.weight.data *= 1e-6  # type: ignore[operator, union-attr]
    model.fc.bias.data = 1 - torch.arange(7) * 5e-5  # type: ignore[union-attr]
    with pytest.raises(
        DisagreementError, match=r"changes the class of \d+ of 16 images, .* export it with dtype float32"
    ):
        export_model(model, tmp_path / "broken", ["packed"], images(count=16), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["sound.packed.safetensors"]


def test_narrow_floats_that_move_values_across_thresholds_are_not_written(tmp_path: Path) -> None:
    model = network("test_resnet", 64)
    norm = model.get_submodule("layer1.0.bn1")
    weight = norm.weight
    assert isinstance(weight, Tensor)
    assert isinstance(norm.bias, Tensor)
    weight.data *= 1e-3
    norm.bias.data.fill_(0.5015)  # which is 0.5 in bfloat16
    kernel = binary_layers(model)["layer1.0.conv2"].activation.levels  # type: ignore[union-attr]
    kernel.fill_(0.5)
    with pytest.raises(DisagreementError, match=r"changes \d+ of \d+ bits of 'layer1.0.conv2.activation'; 5% may"):
        export_model(model, tmp_path / "m", ["packed"], images(64), dtype=torch.bfloat16, runs=0)
    assert not list(tmp_path.iterdir())


def test_ties_are_counted_in_packed_files(tmp_path: Path) -> None:
    model = network("resnet20_cifar", width=0.25)
    x = images()
    has_tie = torch.zeros(len(x), dtype=torch.bool)

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        distance = (inputs[0] - layer.activation.threshold(inputs[0])).abs()  # type: ignore[operator, union-attr]
        has_tie.logical_or_((distance < 1e-5).flatten(1).any(1))

    handles = [layer.register_forward_pre_hook(look) for layer in binary_layers(model).values()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    exports = export(model, tmp_path, "packed", "safetensors", width=0.25)
    assert has_tie.any()
    assert [each.agreement.images_with_ties for each in exports.files] == [int(has_tie.sum())] * 2


def test_paths_and_arguments_that_cannot_be(tmp_path: Path) -> None:
    model = network("resnet20_cifar", width=0.25)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file' is a file, so .* give another path"):
        export_model(model, tmp_path / "file" / "model", ["onnx"], images())
    (tmp_path / "model.bin").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model.bin' is a folder, where openvino is to be written"):
        export_model(model, tmp_path / "model", ["openvino"], images())
    with pytest.raises(ValueError, match="runs is -1; give how often"):
        export_model(model, tmp_path / "model", ["onnx"], images(), runs=-1)
    with pytest.raises(ValueError, match=r"does not take images of \[1, 32, 32\]: .*; give images, or input_shape"):
        export_model(model, tmp_path / "model", ["onnx"], images(channels=1))
    with pytest.raises(ValueError, match=r"several of safetensors, packed would be .*; give a path without a suffix"):
        export_model(model, tmp_path / "m.packed.safetensors", ["safetensors", "packed"], images())
    with pytest.raises(ValueError, match="give the name of the files behind their folder"):
        export_model(model, ".", ["onnx"], images())


def test_what_cannot_be_exported() -> None:
    model = network("resnet20_cifar")
    dl.set_stage_(model, "activations")
    with pytest.raises(ValueError, match=r"'layer1.0.conv1' cannot be packed: its weights are real-valued in stage"):
        export_model(model, "nowhere", ENGINES)
    with pytest.raises(ValueError, match="has no binary layer"):
        export_model(timm.create_model("resnet20_cifar"), "nowhere", ["onnx"], images())
    with pytest.raises(ValueError, match="unknown export format 'onxx': did you mean 'onnx'"):
        export_model(model, "nowhere", ["onxx"])
    with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\]"):
        export_model(model, "nowhere", ["onnx"], images()[0])
    with pytest.raises(ValueError, match="images hold NaN or infinity"):
        export_model(model, "nowhere", ["onnx"], images() / 0)
    with pytest.raises(ValueError, match="formats is 'onnx'; give a list of names"):
        export_model(model, "nowhere", "onnx", images())
    features = timm.create_model("test_resnet", features_only=True)
    dl.binarize_(features, None, images())
    with pytest.raises(ValueError, match="its outputs are a list; a file gives one tensor"):
        export_model(features.eval(), "nowhere", ["onnx"], images())


# Damaged and foreign files


Change = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(network("resnet20_cifar", width=0.25), folder, "onnx", "openvino", "packed", "safetensors", width=0.25)
    return folder


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.packed.safetensors", "model.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "cut off perhaps"),
        (lambda content: b"", "cut off"),
        (lambda content: b"PK\x03\x04" + content, "cut off perhaps|edited or damaged"),
    ],
    ids=["cut", "empty", "foreign"],
)
def test_files_that_are_damaged(exported: Path, name: str, change: Change, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(change((exported / name).read_bytes()))
    path.with_suffix(".bin").write_bytes((exported / "model.bin").read_bytes())
    with pytest.raises(ValueError, match=message) as error:
        open_exported(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("model.onnx", b"strides", b"stridez"),
        ("model.xml", b'strides="1, 1"', b'strides="2, 2"'),
        ("model.bin", None, b""),
        ("model.xml", b"2.", b"3."),
    ],
)
def test_files_that_were_edited(exported: Path, name: str, old: bytes | None, new: bytes, tmp_path: Path) -> None:
    for file in exported.glob("model.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / name).read_bytes()
    edited = content.replace(old, new, 1) if old is not None else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    assert edited != content
    (tmp_path / name).write_bytes(edited)
    with pytest.raises(ValueError, match="was edited or damaged since it was written: its SHA-256"):
        open_exported(tmp_path / name.replace(".bin", ".xml"))


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_files_of_a_newer_format_and_of_another_origin(exported: Path, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.with_suffix(".bin").write_bytes((exported / "model.bin").read_bytes())
    if name == "model.onnx":
        proto = onnx.load(exported / name)
        (entry,) = (entry for entry in proto.metadata_props if entry.key.endswith("format_version"))
        entry.value = "3"
        seal_onnx(proto)
        onnx.save(proto, path)
    else:
        text = re.sub('(?<=<sha256 value=")[0-9a-f]+', EMPTY_SEAL, (exported / name).read_text())
        assert '<format_version value="2" />' in text
        path.write_text(text.replace('<format_version value="2" />', '<format_version value="3" />'))
        seal_openvino(path)
    with pytest.raises(ValueError, match="has format version 3, but this release reads 2; update design-lightning"):
        open_exported(path)
    if name == "model.onnx":
        del proto.metadata_props[:]
        onnx.save(proto, path)
    else:
        path.write_text(text.replace("format_version", "another"))
    with pytest.raises(ValueError, match="is of another origin"):
        open_exported(path)


def test_what_is_no_file_of_ours(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file; give one that design-train export"):
        open_exported(tmp_path / "gone.onnx")
    (tmp_path / "model.xml").write_bytes((exported / "model.xml").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"lacks its weights: model\.bin must lie beside it"):
        open_exported(tmp_path / "model.xml")
    (tmp_path / "model.xml").write_text('<?xml version="1.0"?>\n<net name="x" version="11"><layers/></net>\n')
    with pytest.raises(ValueError, match=r"model.xml' is of another origin"):
        open_exported(tmp_path / "model.xml")
    (tmp_path / "model.pt").touch()
    with pytest.raises(ValueError, match=r"its suffix must be one of \.onnx, \.xml"):
        open_exported(tmp_path / "model.pt")


def test_a_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of an earlier run"):
        open_exported(tmp_path / "model.ckpt")
    assert not (tmp_path / "owned").exists()


# The sizes and networks that the project promises


@pytest.mark.slow
def test_resnet18_is_as_small_as_promised_and_1_bit_in_every_layer(tmp_path: Path) -> None:
    model = network("resnet18", 224)
    model.reset_classifier(1000)  # type: ignore[operator]
    exports = export_model(model, tmp_path / "model", ("packed", "openvino", "onnx"), images(224, 2), runs=0)
    packed, in_openvino, in_onnx = exports.files
    assert packed.bytes < 4.5e6
    assert in_openvino.bytes < 4.5e6
    assert in_onnx.bytes < 4.5e6
    assert in_openvino.one_bit == 1
    primitives = to_openvino.one_bit_layers(ov.Core().compile_model(str(in_openvino.path), "CPU"))
    assert len(primitives) == 16
    assert all(primitive.startswith("jit") for primitive in primitives.values())
    (half,) = export_model(model, tmp_path / "half", ["packed"], images(224, 2), dtype=torch.float16, runs=0).files
    assert half.bytes < 3.0e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vgg_small", 32, {}),
        ("mobilenetv3_small_100", 224, {}),
        # Smaller images, for of a network with random weights a single tie may change the class.
        ("vit_tiny_patch16_224", 64, {"img_size": 64}),
    ],
)
def test_networks_of_every_kind(name: str, size: int, options: dict[str, int], tmp_path: Path) -> None:
    model = network(name, size, **options)
    exports = export(model, tmp_path, size=size)
    assert_agrees(exports, len(binary_layers(model)))
    assert exports.files[1].one_bit == 1
