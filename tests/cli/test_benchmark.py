"""`design-train benchmark training` and `inference`: real runs of a small network, and what they print."""

import json
from pathlib import Path
from typing import Any

import pytest

from design_lightning.cli import main


def benchmark(*arguments: str) -> None:
    main(
        ["benchmark", "training", "--model", "test_resnet", "--size", "64", "--batch", "4", "--rounds", "2", *arguments]
    )


def test_bits_need_less_memory_than_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("--json", "--out", str(tmp_path / "result.json"), "--threads", "1")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert printed["config"]["binary"] == {"estimator": "ste", "companion": "identity", "policy": "conservative"}
    assert {"processor", "torch", "timm", "threads"} <= printed["machine"].keys()
    rows: dict[str, Any] = {row["variant"]: row for row in printed["results"]}
    assert list(rows) == ["float", "naive", "bits", "sign"]
    assert rows["float"]["ratio"] == 1
    for row in rows.values():
        assert row["step"] >= row["forward"] > 0
        assert row["images_per_second"] == pytest.approx(4000 / row["step"])
        assert row["peak"] > 4 * row["saved_per_image"]
    assert rows["bits"]["saved_per_image"] == rows["sign"]["saved_per_image"]
    assert rows["bits"]["saved_per_image"] < 0.5 * rows["naive"]["saved_per_image"]
    assert rows["bits"]["peak"] < rows["naive"]["peak"]


def test_what_is_counted_is_what_a_layer_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    """The float network by hand: every convolution's input and every norm's, once each."""
    import timm
    import torch

    model = timm.create_model("test_resnet").train()

    def kept(count: int) -> int:
        tensors: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(count, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x).sum()
        return sum(tensors.values()) - x.untyped_storage().nbytes()

    by_hand = (kept(8) - kept(4)) / 4
    benchmark("--json", "--variants", "float")
    counted = json.loads(capsys.readouterr().out)["results"][0]["saved_per_image"]
    assert counted == pytest.approx(by_hand, rel=0.01)


def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    benchmark("--variants", "float,bits", "--rounds", "1")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("ratio" in line and "saved" in line and "peak" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18x"], "no network 'resnet18x'"),
        (["--batch", "1"], "batch=1: at least 2"),
        (["--variants", "float,bit"], "unknown variants 'bit'"),
        (["--modes", "fast"], "unknown modes 'fast'"),
        (["--estimator", "st"], "'st'"),
        (["--out", "no_such_folder/result.json"], "no folder no_such_folder"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_errors_name_the_value(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as stop:
        benchmark(*arguments)
    assert stop.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "running"])
    assert "unknown benchmark 'running': use one of training, inference" in capsys.readouterr().err


def inference(*arguments: str) -> None:
    main(["benchmark", "inference", "--rounds", "2", "--threads", "1", *arguments])


def test_inference_of_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ("float_pytorch", "float_onnx", "float_openvino_int8", "packed", "openvino")
    network = ("--model", "test_resnet", "--classes", "4", "--size", "64", "--variants", ",".join(variants))
    inference(*network, "--json", "--out", str(tmp_path / "result.json"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "result.json").read_text())
    assert printed["command"].startswith("design-train benchmark inference --rounds 2")
    assert {"processor", "threads", "torch", "timm", "onnxruntime", "openvino", "nncf"} <= printed["machine"].keys()
    assert printed["config"]["batch"] == 1
    rows: dict[str, Any] = {row["name"]: row for row in printed["results"]}
    assert tuple(rows) == variants
    for name, row in rows.items():
        assert row["threads"] == 1
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["speedup"].keys() == {"float_pytorch", "float_onnx", "float_openvino_int8"}
        assert row["speedup"].get(name, 1) == 1
        assert row["bytes"] > 0
        assert row["difference"] < (0.2 if "int8" in name else 1e-4)
    assert rows["packed"]["bytes"] < rows["float_openvino_int8"]["bytes"] < rows["float_onnx"]["bytes"]
    assert {name for name, row in rows.items() if row["one_bit_layers"]} == {"openvino"}
    assert all(primitive.startswith("jit") for primitive in rows["openvino"]["primitives"])


def test_inference_of_files_beside_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    import design_lightning as dl
    from design_lightning.export import export_model

    model = timm.create_model("test_resnet", num_classes=4)
    dl.binarize_(model, None, (2, 3, 64, 64))
    export_model(model.eval(), tmp_path / "own", ("packed", "openvino"))
    files = (str(tmp_path / "own.packed.safetensors"), str(tmp_path / "own.xml"))
    inference("--files", *files, "--json")
    alone = json.loads(capsys.readouterr().out)["results"]
    assert [row["name"] for row in alone] == ["own.packed.safetensors", "own.xml"]
    assert [row["one_bit_layers"] > 0 for row in alone] == [False, True]
    assert [list(row["speedup"]) for row in alone] == [["own.packed.safetensors"]] * 2
    assert alone[1]["bytes"] == sum((tmp_path / f"own.{suffix}").stat().st_size for suffix in ("xml", "bin"))

    monkeypatch.setenv("COLUMNS", "80")
    network = ("--model", "test_resnet", "--size", "64", "--variants", "float_pytorch")
    inference("--files", *files, *network)
    printed = capsys.readouterr()
    assert "different networks" not in printed.err
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["network", "MB", "1-bit", "ms", "+-", "torch"] for line in lines)
    assert all(
        any(line.lstrip().startswith(name) for line in lines) for name in ("float_pytorch", "own.packed", "own.xml")
    )
    inference("--files", files[1], *network[:2], *network[4:])
    assert f"{files[1]} takes images of 3x64x64, test_resnet of 3x160x160: these are diff" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18x"], "no network 'resnet18x': did you mean"),
        (["--variants", "float_pytorch,openvno"], "unknown variant 'openvno': did you mean 'openvino'"),
        (["--files", "no_such.onnx"], "'no_such.onnx' is no file"),
        (["--threads", "1,half"], "--threads 1,half: 'half' is no number"),
        (["--threads", "0"], "threads=[0]: give numbers of at least 1"),
        (["--rounds", "0"], "rounds=0: at least 1"),
        (["--out", "no_such_folder/result.json"], "no folder no_such_folder"),
        (["--estimator", "ste"], "unknown option '--estimator'"),
    ],
)
def test_errors_of_inference_name_the_value(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        inference(*arguments)
    assert stop.value.code in (1, 2)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert message in printed[0]
