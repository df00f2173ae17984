"""What `dl.load` refuses, and how: files of others, damaged ones, and ones that name code."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import design_lightning as dl
from design_lightning.export.seal import seal_of_tensors
from design_lightning.surgery import binary_layers

Make = Callable[..., nn.Module]
Rewrite = Callable[..., Path]


@pytest.fixture
def rewritten(tmp_path: Path, binarized: Make) -> Rewrite:
    """A file of `dl.save` whose metadata and tensors were changed."""
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["design_lightning"])

    def rewrite(
        metadata: Callable[[dict[str, Any]], Any] = lambda stored: stored,
        tensors: Callable[[dict[str, Any]], Any] = lambda tensors: tensors,
    ) -> Path:
        text = json.dumps(metadata(json.loads(json.dumps(stored))))
        changed = tmp_path / "changed.safetensors"
        values = tensors(safetensors.torch.load_file(path))
        seal = seal_of_tensors(values, text)
        safetensors.torch.save_file(values, changed, {"design_lightning": text, "design_lightning.sha256": seal})
        return changed

    return rewrite


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {key: value for key, value in values.items() if key != name}


def test_what_is_no_such_file(tmp_path: Path, binarized: Make) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        dl.load(tmp_path / "gone.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="holds no binarized network"):
        dl.load(foreign)
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut off perhaps"):
        dl.load(cut)


def test_a_single_bit_that_was_edited(tmp_path: Path, binarized: Make) -> None:
    path = dl.save(binarized(), tmp_path / "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was edited or damaged since it was written"):
        dl.load(path)


BN = "layer1.0.bn1.num_batches_tracked"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (lambda s: {**s, "format_version": 3}, "it has format version 3, but this release reads 2"),
        (without("format_version"), "it has format version None"),
        (lambda s: [s], "the metadata must be an object"),
        (without("architecture"), "'architecture' of the metadata is None"),
        (lambda s: {**s, "architecture": "test_resnt"}, "timm has no network 'test_resnt': did you mean 'test_resnet'"),
        (lambda s: {**s, "architecture": "hf-hub:timm/test_resnet"}, "timm has no network 'hf-hub:timm/test_resnet'"),
        (lambda s: {**s, "architecture": "local-dir:/tmp"}, "timm has no network 'local-dir:/tmp'"),
        (lambda s: {**s, "architecture": "test_resnet.no_such_tag"}, "and binarize_ do not rebuild it"),
        (lambda s: {**s, "model_args": {"no_such_argument": 1}}, "TypeError: .*no_such_argument"),
        (lambda s: {**s, "model_args": [1]}, r"'model_args' of the metadata is \[1\]"),
        (lambda s: {**s, "binary": {"kernal": 1}}, "unknown field 'kernal' of BinaryConfig"),
        (lambda s: {**s, "binary": {"overrides": [1]}}, "and binarize_ do not rebuild it"),
        (lambda s: {**s, "input_shape": [2, 3]}, "the model's forward fails on the example input"),
        (lambda s: {**s, "input_shape": ["a"]}, "and binarize_ do not rebuild it"),
        (lambda s: {**s, "extra_state": {}}, "'layer1.0.conv1._extra_state' is missing"),
        (lambda s: {**s, "extra_state": {key: {"stage": "none"} for key in s["extra_state"]}}, "unknown stage 'none'"),
        (
            lambda s: {**s, "extra_state": dict.fromkeys(s["extra_state"], 3)},
            "unknown stage 3 in a state dict: use one",
        ),
    ],
)
def test_other_metadata(rewritten: Rewrite, metadata: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"changed.safetensors' cannot be rebuilt with timm [\d.]+: .*{message}"):
        dl.load(rewritten(metadata))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("conv1.0.weight"), r"1 of \d+ tensors do not fit: 'conv1.0.weight' is missing"),
        (without(BN), f"'{BN}' is missing"),
        (lambda t: {**t, "x": torch.zeros(1)}, "'x' is foreign"),
        (lambda t: {**t, "fc.bias": torch.zeros(3)}, r"'fc.bias' has the shape \[3\], not \[10\]"),
        (lambda t: {**t, "fc.bias": torch.zeros(10, dtype=torch.int64)}, "must be floating point"),
    ],
)
def test_other_tensors(rewritten: Rewrite, tensors: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dl.load(rewritten(tensors=tensors))


def test_text_that_is_no_json(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {"design_lightning": "{"})
    with pytest.raises(ValueError, match=r"a.safetensors' cannot be rebuilt"):
        dl.load(tmp_path / "a.safetensors")


def test_text_that_is_nested_too_deeply(tmp_path: Path) -> None:
    text = "[" * 200_000
    tensors = {"x": torch.zeros(1)}
    for seal in ("0" * 64, seal_of_tensors(tensors, text)):
        header = {"design_lightning": text, "design_lightning.sha256": seal}
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", header)
        with pytest.raises(ValueError, match=r"edited or damaged|nested too deeply") as error:
            dl.load(tmp_path / "a.safetensors")
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "binary",
    [
        {"estimator": "sneaky_code.Thing"},
        {"activation": "sneaky_code.Thing"},
        {"weight": "sneaky_code.Thing"},
        {"overrides": {"layer1.*": {"weight": "sneaky_code.Thing"}}},
    ],
)
def test_code_that_is_named_does_not_run_without_trust(
    rewritten: Rewrite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: dict[str, Any]
) -> None:
    (tmp_path / "sneaky_code.py").write_text("Thing = int\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = rewritten(lambda stored: {**stored, "binary": binary})
    with pytest.raises(ValueError, match=r"it names the class 'sneaky_code.Thing', .* pass trust=True"):
        dl.load(path)
    assert "sneaky_code" not in sys.modules
    with pytest.raises(ValueError, match=r"'sneaky_code.Thing' is not a subclass of"):
        dl.load(path, trust=True)
    del sys.modules["sneaky_code"]


def test_classes_of_the_user_and_of_this_package(
    tmp_path: Path, binarized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("from design_lightning.binary.estimators import STE", "class Mine(STE):", "    pass")
    (tmp_path / "code_of_mine.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    path = dl.save(binarized(config=dl.BinaryConfig(estimator="code_of_mine.Mine")), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"'code_of_mine\.Mine'"):
        dl.load(path)
    layer = next(iter(binary_layers(dl.load(path, trust=True)).values()))
    assert type(layer.activation.estimator).__name__ == "Mine"
    ours = dl.BinaryConfig(estimator="design_lightning.binary.estimators.STE")
    dl.load(dl.save(binarized(config=ours), tmp_path / "ours.safetensors"))


def checkpoint(path: Path, **hyper_parameters: Any) -> Path:
    module = dl.DesignClassifier("test_resnet", num_classes=4)
    state = module.state_dict()
    stored = {"state_dict": state, "hyper_parameters": {**module.hparams, **hyper_parameters}}
    torch.save({**stored, "pytorch-lightning_version": "2.6.0"}, path)
    return path


def test_other_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    dl.load(checkpoint(path))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"run.ckpt' is no checkpoint of an earlier run"):
        dl.load(path)
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match=r"other things than tensors and plain values$") as error:
        dl.load(path)
    assert "weights_only" not in str(error.value)
    assert "\x1b" not in str(error.value)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it has no state_dict"):
        dl.load(path)
    for foreign in ({}, {"hyper_parameters": {"lr": 0.1}}):
        torch.save({"state_dict": {}, **foreign}, path)
        with pytest.raises(ValueError, match="is the checkpoint of another module than DesignClassifier"):
            dl.load(path)
    with pytest.raises(ValueError, match=r"run.ckpt' cannot be rebuilt with timm .*size mismatch for backbone.fc"):
        dl.load(checkpoint(path, num_classes=5))
    with pytest.raises(ValueError, match="unknown backbone 'test_resnt'"):
        dl.load(checkpoint(path, backbone="test_resnt"))


def test_checkpoints_that_need_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sneaky_code.py").write_text("Thing = int\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = checkpoint(tmp_path / "run.ckpt", binary={"estimator": "sneaky_code.Thing"})
    with pytest.raises(ValueError, match=r"names the class 'sneaky_code.Thing'.* pass trust=True"):
        dl.load(path)
    assert "sneaky_code" not in sys.modules
    with pytest.raises(ValueError, match="is not a subclass of"):
        dl.load(path, trust=True)
    del sys.modules["sneaky_code"]
    with pytest.raises(ValueError, match=r"its network 'local-dir:.*' is of a hub or a folder; .* pass trust=True"):
        dl.load(checkpoint(path, backbone=f"local-dir:{tmp_path}"))
