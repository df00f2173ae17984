"""`docs/reader.c` computes from a file alone what packed layers compute; what it cannot read it refuses in one line."""

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.binary import BinaryConv2d, BinaryLayer, BinaryLinear, DeSign, RSign, Sign
from design_lightning.binary.packed import packed
from design_lightning.export.packed_layers import description
from design_lightning.surgery.packing import packed_layers

Make = Callable[..., nn.Module]
Read = Callable[..., subprocess.CompletedProcess[str]]

SOURCE = Path(__file__).parents[2] / "docs" / "reader.c"
COMPILER = next((found for found in map(shutil.which, ("cc", "gcc", "clang")) if found), None)
FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic")

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="there is no C compiler: none of cc, gcc, clang is on the path"
)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Runs the reader with arguments."""
    program = tmp_path_factory.mktemp("reader") / "reader"
    subprocess.run([str(COMPILER), *FLAGS, str(SOURCE), "-o", str(program)], check=True)
    return lambda *arguments: subprocess.run(
        [program, *map(str, arguments)], check=False, capture_output=True, text=True, errors="replace"
    )


def run_layer(read: Read, file: Path, name: str, x: Tensor, is_conv: bool) -> Tensor:
    """The reader's output for one sample, [C, H, W] of a convolution, [H, W, I], [N, I] or [I] of a linear layer; flat."""
    x = x.detach().contiguous()
    height, width = x.shape[-2:] if is_conv else {1: (1, 1), 2: (0, x.shape[0])}.get(x.dim(), x.shape[:2])
    given, result = file.with_suffix(".in"), file.with_suffix(".out")
    given.write_bytes(x.numpy().astype("<f4").tobytes())
    done = read(file, name, given, height, width, result)
    assert done.returncode == 0, done.stderr
    return torch.frombuffer(bytearray(result.read_bytes()), dtype=torch.float32)


def perturb_(model: nn.Module) -> None:
    """Random values for what starts as a constant: norms, biases, shifts, learned thresholds."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or parameter.shape[-2:] == (2, 2):
                parameter.add_(torch.randn_like(parameter) * 0.3)


GAMMA: dict[str, dict[str, Any] | None] = {"layer*.0.conv1": None, "layer3.0.conv3": None}
VIT = {"img_size": 64, "dynamic_img_size": False}


@pytest.mark.parametrize(
    ("name", "arguments", "config", "dtype", "says"),
    [
        ("resnet18", {"num_classes": 3}, dl.BinaryConfig(), torch.float32, "stride: [2, 2]"),
        (
            "resnet20_cifar",
            {},
            dl.BinaryConfig(policy="paper", kernel="3x3_symmetric_v1", align="center"),
            torch.float32,
            "align: center",
        ),
        ("resnet20_cifar", {}, dl.BinaryConfig(learn_kernel=True, weight="learned"), torch.bfloat16, "kind: design"),
        ("resnet20_cifar", {}, dl.BinaryConfig(activation="rsign", padding_value=1), torch.float16, "kind: rsign"),
        (
            "resnet20_cifar",
            {},
            dl.BinaryConfig(activation="sign", weight="sign", padding_value=-1),
            torch.float32,
            "padding_value: -1",
        ),
        (
            "test_resnet",
            {},
            dl.BinaryConfig(scale_by_gamma=True, scale=0.7, overrides=GAMMA),
            torch.float16,
            "gamma: layer1.0.bn1.weight",
        ),
        (
            "test_resnet",
            {},
            dl.BinaryConfig(policy="everything", padding_value="replicate"),
            torch.float32,
            "padding_value: replicate",
        ),
        ("test_vit", VIT, dl.BinaryConfig(align="center"), torch.float32, "grid: [4, 4], prefix_tokens: 1"),
        ("test_vit", VIT, dl.BinaryConfig(activation="rsign"), torch.float16, "kind: linear"),
        ("test_vit", {}, dl.BinaryConfig(), torch.float32, "grid: null"),
        (
            "test_convnext",
            {},
            dl.BinaryConfig(kernel="3x3_symmetric_v1", align="center"),
            torch.float32,
            "kind: linear",  # of images [H, W, I]
        ),
        (
            "test_efficientnet",
            {"pad_type": "same"},
            dl.BinaryConfig(policy="everything", padding_value=-1),
            torch.float32,
            "padding: same",
        ),
    ],
)
def test_every_layer_of_a_network(
    tmp_path: Path,
    binarized: Make,
    read: Read,
    name: str,
    arguments: dict[str, Any],
    config: dl.BinaryConfig,
    dtype: torch.dtype,
    says: str,
) -> None:
    model = binarized(name, config, **arguments)
    dl.set_stage_(model, "both")
    perturb_(model)
    file = dl.save(model, tmp_path / "model.safetensors", arguments, packed=True, dtype=dtype)
    again = dl.load(file)
    layers, seen = packed_layers(again), {}

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer] = inputs[0][0], output[0]

    for layer in layers.values():
        layer.register_forward_hook(remember)
    with torch.no_grad():
        again(torch.randn(1, 3, 64, 64))
    assert seen.keys() == set(layers.values())
    listing = read(file).stdout
    assert [line.split()[0] for line in listing.splitlines()] == list(layers)
    assert says in listing
    for each, layer in layers.items():
        x, y = seen[layer]
        assert torch.equal(run_layer(read, file, each, x, layer.signs.dim() == 4), y.flatten()), each


def write(path: Path, layer: BinaryLayer, **changes: Any) -> Path:
    """A file of one packed layer, `0`, its description changed."""
    form = packed(layer)
    model = nn.Sequential(form)
    described = {"0": {**description(form, model), **changes}}
    metadata = {"design_lightning": json.dumps({"format_version": 2, "packed": described})}
    safetensors.torch.save_file(model.state_dict(), path, metadata)
    return path


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 5), "padding": (2, 1)},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "groups": 2, "bias": True},
        {"kernel_size": 4, "padding": "same", "dilation": (1, 2)},  # torch's: one more at the end
        {"kernel_size": 5, "padding": 4, "padding_mode": "reflect", "stride": 2},
        {"kernel_size": 3, "padding": (1, 3), "padding_mode": "circular", "groups": 3},
        {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (4, 2), "padding_value": "replicate", "dilation": 2},
        {"kernel_size": 3, "padding": 3, "padding_value": 1, "bias": True},
        {"kernel_size": 1, "padding": 1, "padding_value": -1, "stride": 3},
    ],
    ids=str,
)
def test_every_geometry(tmp_path: Path, read: Read, geometry: dict[str, Any]) -> None:
    activation = DeSign(torch.rand(3, 3, 2), align="center", scale=0.5)
    layer = BinaryConv2d(66, 12, activation=activation, **geometry)
    file, x = write(tmp_path / "layer.safetensors", layer), torch.randn(1, 66, 7, 10)
    with torch.no_grad():
        assert torch.equal(run_layer(read, file, "0", x[0], True), layer(x).flatten())


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"grid": (3, 5), "prefix_tokens": 2}, (17, 70)),
        ({}, (9, 70)),
        ({}, (4, 7, 70)),
        ({}, (1, 7, 70)),
        ({}, (70,)),
    ],
)
def test_every_layout_of_a_linear_layer(
    tmp_path: Path, read: Read, arguments: dict[str, Any], shape: tuple[int, ...]
) -> None:
    activation = DeSign(torch.randn(5, 2, 4), align="center", layout="NHWC", **arguments)
    layer = BinaryLinear(70, 9, activation=activation)
    file, x = write(tmp_path / "layer.safetensors", layer), torch.randn(1, *shape)
    with torch.no_grad():
        assert torch.equal(run_layer(read, file, "0", x[0], False), layer(x).flatten())


def test_zeros_and_what_is_no_number(tmp_path: Path, read: Read) -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")]).repeat_interleave(2).unsqueeze(0)
    for activation in (Sign("NHWC"), RSign(10, "NHWC"), DeSign(layout="NHWC", scale=0)):
        layer = BinaryLinear(10, 4, activation=activation)
        file = write(tmp_path / "layer.safetensors", layer)
        with torch.no_grad():
            assert torch.equal(run_layer(read, file, "0", x[0], False), layer(x).flatten())


def test_the_example_of_the_page(tmp_path: Path, read: Read) -> None:
    page = (SOURCE.parent / "format.md").read_text()
    header, metadata = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    tensors = bytes.fromhex("".join(re.findall(r"(?m)^((?:[0-9a-f]{2} )+) ", page)))
    x0, x1, y0, y1 = (map(float, row.split()) for row in re.findall(r"(?m)^(?:channel|output) \d +(.*)$", page))
    header["__metadata__"]["design_lightning"] = json.dumps(metadata)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file, given, result = (tmp_path / name for name in ("conv.safetensors", "x.in", "y.out"))
    file.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    assert f"A file of {file.stat().st_size} bytes" in page
    assert f"are `{file.read_bytes()[:8].hex(' ')}`: {len(text)} bytes of header follow" in page
    given.write_bytes(struct.pack("<8f", *x0, *x1))
    done = read(file, "conv", given, 1, 4, result)
    assert done.returncode == 0, done.stderr
    assert struct.unpack("<8f", result.read_bytes()) == (*y0, *y1)
    with safe_open(file, "pt") as opened:  # which checks more than the reader does
        assert opened.get_tensor("conv.scale").tolist() == [0.5, 0.25]


def test_thresholds_by_a_norm_of_another_model(tmp_path: Path) -> None:
    layer = BinaryLinear(4, 2, activation=DeSign(layout="NHWC", gamma_from=nn.BatchNorm1d(4)))
    with pytest.raises(
        ValueError, match=r"norm BatchNorm1d.* scales thresholds, but its weight is no parameter of the model"
    ):
        write(tmp_path / "layer.safetensors", layer)


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    """A file of a 3x3 convolution of 4 channels, and an input of it, 5 x 5."""
    (tmp_path / "x.in").write_bytes(bytes(4 * 4 * 5 * 5))
    return write(tmp_path / "layer.safetensors", BinaryConv2d(4, 2, 3, padding=1, activation=DeSign()))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert not done.stdout
    line = done.stderr
    assert line.startswith("reader: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
    return line


def retold(file: Path, change: Callable[[dict[str, Any]], Any], entry: str = "") -> Path:
    """The file with another header: its metadata, or the entry of one tensor, are changed."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if entry:
        change(header[entry])
    else:
        stored = json.loads(header["__metadata__"]["design_lightning"])
        change(stored)
        header["__metadata__"]["design_lightning"] = json.dumps(stored)
    text = json.dumps(header).encode()
    changed = file.with_name("changed.safetensors")
    changed.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return changed


def of_layer(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda stored: stored["packed"]["0"].update(changes)


def of_activation(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda stored: stored["packed"]["0"]["activation"].update(changes)


@pytest.mark.parametrize(
    ("change", "entry", "message"),
    [
        (lambda s: s.update(format_version=3), "", "has format version 3, but this reader reads 2"),
        (lambda s: s.update(format_version=1), "", "has format version 1, but this reader reads 2"),
        (lambda s: s.pop("format_version"), "", "format_version is no whole number"),
        (lambda s: s.update(packed=None), "", "has no packed layers"),
        (of_layer(kind="conv3d"), "", "the kind of the layer is unknown"),
        (of_layer(shape=[2, 4, 3]), "", "has a shape of 3 dimensions"),
        (of_layer(shape=[2, 4, 3, 5]), "", "not of the size that shape says"),
        (of_layer(shape=[1 << 20, 1 << 20, 3, 3]), "", "a size is above"),
        (of_layer(stride=[0, 1]), "", "stride is no whole number from 1"),
        (of_layer(stride=[1.5, 1]), "", "stride is no whole number from 1"),
        (of_layer(padding=[1, 1]), "", "padding is no list of 4"),
        (of_layer(padding_value="wrap"), "", "padding_value is unknown"),
        (of_layer(padding_value="circular", padding=[6, 0, 0, 0]), "", "too small for its padding"),
        (of_layer(dilation=[4, 4]), "", "the input is smaller than the kernel"),
        (of_layer(groups=3), "", "its groups do not divide"),
        (of_layer(groups=2), "", "0 takes 800"),
        (of_layer(activation=None), "", "0 has no activation"),
        (of_activation(kind="mine"), "", "the activation of the layer is unknown"),
        (of_activation(align="left"), "", "the alignment is unknown"),
        (of_activation(gamma="no.such"), "", "no.such is missing"),
        (of_activation(gamma=True), "", "gamma is neither"),
        (lambda t: t.update(dtype="I8"), "0.bits", "the dtype of a tensor of the layer is unknown"),
        (lambda t: t.update(data_offsets=[0, 10**9]), "0.bits", "ends outside the file"),
        (lambda t: t.update(data_offsets=[9, 1]), "0.bits", "ends outside the file"),
        (lambda t: t.update(data_offsets=[10**30, 1]), "0.bits", "data_offsets is no whole number"),
        (lambda t: t.update(shape=[1]), "0.scale", "not of the size of its shape"),
        (lambda t: t.update(shape=[4]), "0.activation.levels", "with 3 dimensions"),
    ],
)
def test_what_it_refuses(one_layer: Path, read: Read, change: Callable[..., Any], entry: str, message: str) -> None:
    file = retold(one_layer, change, entry)
    out = file.with_name("y.out")
    assert message in refusal(read(file, "0", file.with_name("x.in"), 5, 5, out))
    assert not out.exists()


def test_inputs_that_do_not_fit(tmp_path: Path, one_layer: Path, read: Read) -> None:
    given, out = tmp_path / "x.in", tmp_path / "y.out"
    assert read(one_layer, "0", given, 5, 5, out).returncode == 0
    assert "has 400 bytes, but 0 takes 480" in refusal(read(one_layer, "0", given, 5, 6, out))
    assert "no input of 0 x 25" in refusal(read(one_layer, "0", given, 0, 25, out))
    assert "H or W is no whole number" in refusal(read(one_layer, "0", given, 5, "5x", out))
    assert "no packed layer of this name: fc" in refusal(read(one_layer, "fc", given, 5, 5, out))
    assert "cannot be opened" in refusal(read(one_layer, "0", tmp_path / "gone", 5, 5, out))
    tokens = DeSign(layout="NHWC", grid=(2, 2), prefix_tokens=1)
    linear = write(tmp_path / "linear.safetensors", BinaryLinear(4, 2, activation=tokens))
    given.write_bytes(bytes(4 * 4 * 4))
    assert "takes 1 tokens and a grid of 2 x 2" in refusal(read(linear, "0", given, 0, 4, out))


def test_files_of_others(tmp_path: Path, binarized: Make, read: Read) -> None:
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, foreign)
    assert "it has no such metadata" in refusal(read(foreign))
    assert "has no packed layers" in refusal(read(dl.save(binarized(), tmp_path / "latent.safetensors")))
    for content in (b"", b"1234567", bytes(8), struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 2) + b"{]"):
        foreign.write_bytes(content)
        refusal(read(foreign))
    foreign.write_bytes(struct.pack("<Q", 1000) + b"[" * 1000)
    assert "nested deeper" in refusal(read(foreign))
    assert "cannot be read" in refusal(read(tmp_path))


def test_files_that_are_cut_off(one_layer: Path, read: Read) -> None:
    data = one_layer.read_bytes()
    given, out = one_layer.with_name("x.in"), one_layer.with_name("y.out")
    for size in range(0, len(data), 37):
        one_layer.write_bytes(data[:size])
        refusal(read(one_layer, "0", given, 5, 5, out))
    one_layer.write_bytes(data[:-1])
    assert "cut off perhaps" in refusal(read(one_layer, "0", given, 5, 5, out))
