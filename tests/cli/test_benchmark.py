"""`design-train benchmark training`: a real run of a small network, and what it prints."""

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
    assert "unknown benchmark 'running': use one of training" in capsys.readouterr().err
