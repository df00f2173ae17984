"""`design-train summary`: the table and its JSON, of a network by name and of a configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from design_lightning.cli import main


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def summary(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["summary", *args, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_network_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", "--model", "mobilenetv3_small_050", "--classes", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mobilenetv3_small_050, policy conservative, 10 classes, images of 3x224x224"
    assert lines[2].split() == ["stage", "output", "binary", "1-bit", "float", "BOPs", "FLOPs", "OPs", "bytes", "now"]
    assert lines[3].split()[:3] == ["conv_stem,", "bn1", "16x112x112"]
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("OPs = BOPs / 64 + FLOPs")
    assert not list(Path().iterdir())


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = summary(capsys, "--model", "resnet18", "--size", "64")
    assert (found["network"], found["classes"], found["input_shape"]) == ("resnet18", 1000, [3, 64, 64])
    keys = found["total"].keys() - {"bytes", "ops"}  # a stage fills its last byte
    assert all(sum(stage[key] for stage in found["stages"]) == found["total"][key] for key in keys)
    assert found["total"]["ops"] == found["total"]["bops"] / 64 + found["total"]["flops"]
    assert [stage["output"] for stage in found["stages"]][-2:] == [[512, 2, 2], [1000]]


def test_options_of_surgery_are_those_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    usual = summary(capsys, "--model", "resnet18")
    reactnet = summary(capsys, "--model", "resnet18", "--binary.policy", "reactnet")
    assert reactnet["binary"]["companion"] == "rprelu"
    assert reactnet["total"]["float_parameters"] > usual["total"]["float_parameters"]
    assert reactnet["total"]["bops"] == usual["total"]["bops"]
    float_ = summary(capsys, "--model", "resnet18", "--binary", "null")
    assert float_["binary"] is None
    assert float_["total"]["bops"] == 0


@pytest.mark.parametrize("option", ["size", "classes"])
def test_nothing_is_counted_of_no_pixel_and_no_class(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["summary", "--model", "resnet18", f"--{option}", "0"])
    assert f"{option} is 0, but must be at least 1" in capsys.readouterr().err


def test_a_recipe_gives_network_surgery_size_and_classes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text('model: {init_args: {binary: {overrides: {"layer4*": null}}}}')
    found = summary(capsys, "--config", "quickstart", "--config", "mine.yaml")
    assert (found["network"], found["classes"], found["input_shape"]) == ("resnet18_cifar", 10, [1, 28, 28])
    assert found["binary"]["kernel"] == "2x2_v1"
    assert {s["stage"]: s["binary_layers"] for s in found["stages"]}["layer4"] == 0


def test_a_recipe_whose_data_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = summary(capsys, "--config", "reactnet_resnet18_imagenet", "--config", "overlays/design")
    assert (found["classes"], found["input_shape"], found["binary"]["activation"]) == (1000, [3, 224, 224], "design")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet81"], "unknown backbone 'resnet81': did you mean 'resnet18'"),
        (
            ["--model", "resnet18", "--binary.polcy", "paper"],
            "unknown option 'model.binary.polcy': did you mean 'policy'?",
        ),
        (["--config", "quikstart"], "did you mean 'quickstart'?"),
        ([], "no model given"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["summary", *args])
    assert message in capsys.readouterr().err.splitlines()[-1]
