"""Every recipe: it trains on data of its kind, its header says what it is, and the commands in its header work."""

import csv
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from design_lightning.cli import main
from design_lightning.commands.recipes import Recipe

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [file.relative_to(FOLDER).with_suffix("").as_posix() for file in FILES]
TRAINING_IMAGES = {
    "FashionMNISTSubset": 6_000,
    "CIFAR10": 50_000,
    "CIFAR100": 50_000,
    "STL10": 5_000,
    "ImageFolder": 1_281_167,
}
ARITHMETIC = re.compile(
    r"(?:(?P<gpus>\w+) GPUs? x (?P<each>\d+) = (?P<batch>\d+) images; )?"
    r"(?P<images>[\d,]+)(?: images)? / (?P<divisor>\d+) = (?P<epoch>[\d,]+) steps an epoch; "
    r"(?P<epochs>[\d,]+) epochs = (?P<steps>[\d,]+) steps"
)
SMALL = ["--data.batch_size", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
ONE_STEP = ["--trainer.max_steps", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]

TinyData = Callable[[str], list[str]]

each_recipe = pytest.mark.parametrize("file", FILES, ids=NAMES)


def parsed(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config


def header(file: Path) -> list[str]:
    """The comment lines at the top, without their `#`."""
    lines = file.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def commands(file: Path) -> list[list[str]]:
    """The arguments of the header's commands."""
    return [shlex.split(line, comments=True)[1:] for line in header(file) if line.startswith("design-train fit")]


def smaller(file: Path) -> list[str]:
    """Options that make a second run of a recipe quick: the first one, above, is of its own network."""
    if parsed(file)["data"]["class_path"] == "ImageFolder":
        return ["--data.image_size", "64"]
    return ["--model.backbone_args.width", "0.125"]


def number(text: str) -> int:
    return 1 if text == "One" else int(text.replace(",", ""))


def last_row(metrics: Path) -> dict[str, str]:
    """The last value of every column that has one."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return {key: value for row in csv.DictReader(file) for key, value in row.items() if value}


def test_there_are_recipes() -> None:
    assert len(FILES) >= 7


@each_recipe
def test_recipe_trains_a_step_and_validates_a_batch(
    file: Path, tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(file), *tiny_data(parsed(file)["data"]["class_path"]), *SMALL, *ONE_STEP])
    log = tmp_path / "runs" / file.stem / "version_0"
    metrics = last_row(log / "metrics.csv")
    assert {"train/top1", "val/loss", "val/top1"} <= set(metrics)
    assert math.isfinite(float(metrics["val/loss"]))
    checkpoint = torch.load(log / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    tensors = [value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor)]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    assert checkpoint["optimizer_states"][0]["state"], "the optimizer moved nothing"


@pytest.mark.parametrize(
    ("file", "command"),
    [(file, command) for file in FILES for command in commands(file)],
    ids=[f"{name}-{i}" for file, name in zip(FILES, NAMES, strict=True) for i in range(len(commands(file)))],
)
def test_command_of_a_header_runs(
    file: Path, command: list[str], tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*command, *tiny_data(parsed(file)["data"]["class_path"]), *SMALL, *ONE_STEP, *smaller(file)])
    saved = parsed(tmp_path / "runs" / file.stem / "version_0" / "config.yaml")
    for option, value in zip(command[1::2], command[2::2], strict=True):
        if option.startswith("--model."):
            section: Any = saved["model"]["init_args"]
            for part in option.removeprefix("--model.").split("."):
                section = section[part]
            assert section == yaml.safe_load(value)


@each_recipe
def test_header_gives_the_command_and_an_override(file: Path) -> None:
    first, *others = commands(file)
    assert first[:3] == ["fit", "--config", file.relative_to(FOLDER).with_suffix("").as_posix()]
    assert others
    for other in others:
        assert other[: len(first)] == first
        assert len(other) > len(first)


@each_recipe
def test_header_names_the_network_the_data_and_the_source(file: Path) -> None:
    facts = Recipe(file.stem, file.read_text(encoding="utf-8")).facts
    config = parsed(file)
    model = config["model"]["init_args"]
    network, *rest = facts["network"].split(", ")
    assert network == model["backbone"]
    assert f"DeSign {model['binary']['kernel']}" in rest
    assert facts["data"] == config["data"]["class_path"]
    assert facts["source"] == "ours" or "arXiv:" in facts["source"]
    assert facts["published"] == "-" or re.match(r"\d\d\.\d \(.+\)$", facts["published"])


@each_recipe
def test_arithmetic_of_a_header_is_that_of_its_values(file: Path) -> None:
    config = parsed(file)
    data = config["data"]
    found = ARITHMETIC.search(" ".join(header(file)))
    assert found, "the header shows no arithmetic"
    batch = data["init_args"]["batch_size"]
    if found["gpus"]:
        assert number(found["each"]) == batch
        batch *= number(found["gpus"])
        assert number(found["batch"]) == batch
    assert number(found["divisor"]) == batch
    assert number(found["images"]) == TRAINING_IMAGES[data["class_path"]]
    assert number(found["epoch"]) == TRAINING_IMAGES[data["class_path"]] // batch
    assert number(found["epochs"]) == config["trainer"]["max_epochs"]
    assert number(found["steps"]) == number(found["epoch"]) * number(found["epochs"])


@each_recipe
def test_recipe_logs_below_runs_under_its_own_name(file: Path) -> None:
    trainer = parsed(file)["trainer"]
    logger = trainer["logger"]["init_args"]
    assert trainer["default_root_dir"] == f"{logger['save_dir']}/{logger['name']}" == f"runs/{file.stem}"


def test_imagenet_trains_in_the_two_stages_of_its_header(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = FOLDER / "resnet18_imagenet.yaml"
    stage_one, stage_two = re.findall(r"`(--model\.\S+ [^`]+)`", " ".join(header(file)))
    rest = [*tiny_data("ImageFolder"), *SMALL, *ONE_STEP, *smaller(file)]
    main(["fit", "--config", str(file), *stage_one.split(), *rest])
    checkpoint = "runs/resnet18_imagenet/version_0/checkpoints/best.ckpt"
    main(["fit", "--config", str(file), *stage_two.replace("CHECKPOINT", checkpoint).split(), *rest])
    one, two = (parsed(tmp_path / f"runs/resnet18_imagenet/version_{i}/config.yaml")["model"] for i in range(2))
    assert one["init_args"]["optimizer"]["init_args"]["weight_decay"] == 1e-5
    assert one["init_args"]["latent_weight_decay"] == 1e-5
    assert (one["init_args"]["binary"]["stage"], two["init_args"]["binary"]["stage"]) == ("activations", "both")


def test_recipe_with_a_warm_up_allows_a_fast_dev_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "quickstart", *SMALL, "--trainer.fast_dev_run", "true"])
