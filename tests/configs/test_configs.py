"""Every recipe trains on data of its kind, its header says what it is, and the commands there work; so does every overlay."""

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
from design_lightning.training.teacher import is_file

FOLDER = Path(__file__).parents[2] / "configs"
OVERLAYS = sorted([*(FOLDER / "overlays").glob("*.yaml"), *(FOLDER / "cluster").glob("*.yaml")])
FILES = sorted(file for file in FOLDER.rglob("*.yaml") if file not in OVERLAYS)
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
SCALED = re.compile(
    r"On (?P<gpus>\d+) GPUs x (?P<each>\d+) = (?P<batch>[\d,]+) images, by the rule of cluster/slurm and not tried: "
    r"`--model\.optimizer\.lr (?P<lr>[\d.e-]+)(?P<warmup> --model\.warmup_epochs 5)?`"
    r" \((?P<rule>SGD's 4 times|Adam's root of 4)(?:; (?P<last>[\d.e-]+) in the last stage)?\)"
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


def offline(file: Path) -> list[str]:
    """Options for a run without a network and with few classes: random weights in place of downloaded ones, and of a file's."""
    config = parsed(file)
    model = config["model"]["init_args"]
    options = ["--model.pretrained", "false"] if model.get("pretrained") else []
    if "distillation" in model:
        classes = 2 if config["data"]["class_path"] == "ImageFolder" else 10
        options += ["--model.distillation.pretrained", "false"]
        options += ["--model.distillation.teacher_args", f"{{num_classes: {classes}}}"]
        if is_file(model["distillation"]["teacher"]):
            options += ["--model.distillation.teacher", model["backbone"]]
    return options


def training_images(config: dict[str, Any]) -> int:
    """How many a recipe trains on: those of its data set, less those that it validates on."""
    return TRAINING_IMAGES[config["data"]["class_path"]] - int(config["data"]["init_args"].get("val_size") or 0)


def number(text: str) -> int:
    return 1 if text == "One" else int(text.replace(",", ""))


def last_row(metrics: Path) -> dict[str, str]:
    """The last value of every column that has one."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return {key: value for row in csv.DictReader(file) for key, value in row.items() if value}


def few_validated(file: Path) -> list[str]:
    """Of the few images, a few validate where the recipe says how many do."""
    return ["--data.val_size", "0.5"] if "val_size" in parsed(file)["data"]["init_args"] else []


def test_there_are_recipes_and_overlays() -> None:
    assert len(FILES) >= 19
    assert len(OVERLAYS) >= 6


@each_recipe
def test_recipe_trains_a_step_and_validates_a_batch(
    file: Path, tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = [*tiny_data(parsed(file)["data"]["class_path"]), *few_validated(file), *SMALL, *ONE_STEP, *offline(file)]
    main(["fit", "--config", str(file), *rest])
    log = tmp_path / "runs" / file.stem / "version_0"
    metrics = last_row(log / "metrics.csv")
    assert {"train/top1", "val/loss", "val/top1"} <= set(metrics)
    assert math.isfinite(float(metrics["val/loss"]))
    checkpoint = torch.load(log / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert len(list((log / "checkpoints").iterdir())) == 2
    tensors = [value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor)]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    assert checkpoint["optimizer_states"][0]["state"], "the optimizer moved nothing"


@pytest.mark.parametrize(
    ("file", "command"),
    [(file, command) for file in FILES for command in commands(file)],
    ids=[f"{name}-{i}" for file, name in zip(FILES, NAMES, strict=True) for i in range(len(commands(file)))],
)
@pytest.mark.slow
def test_command_of_a_header_runs(
    file: Path, command: list[str], tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [*tiny_data(parsed(file)["data"]["class_path"]), *few_validated(file)]
    rest = [*SMALL, *ONE_STEP, *smaller(file), *offline(file)]
    main([*command, *data, *rest])
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
    binary = model["binary"] or {"activation": "float"}
    activation = binary.get("activation") or ("rsign" if binary.get("policy") == "reactnet" else "design")
    expected = {"design": f"DeSign {binary.get('kernel')}", "sign": "Sign", "rsign": "RSign", "float": "float"}
    assert expected[activation] in rest
    assert facts["data"] == config["data"]["class_path"]
    assert facts["source"] == "ours" or "arXiv:" in facts["source"]
    figure = r"\d\d\.\d\d? \(.+\)"  # that of another method stands behind a dash
    assert re.fullmatch(rf"-|- \(\w+ itself: \d\d\.\d\)|{figure}", facts["published"])
    assert re.fullmatch(rf"-|{figure}", facts["measured"])
    if activation == "design":
        assert facts["published"].startswith("-"), "the paper reports no such number with DeSign"


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
    assert number(found["images"]) == training_images(config)
    assert number(found["epoch"]) == training_images(config) // batch
    assert number(found["epochs"]) == config["trainer"]["max_epochs"]
    assert number(found["steps"]) == number(found["epoch"]) * number(found["epochs"])


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem.endswith("_imagenet")], ids=lambda file: file.stem
)
def test_header_says_the_rate_for_four_times_as_many_gpus(file: Path) -> None:
    found = SCALED.search(" ".join(header(file)))
    arithmetic = ARITHMETIC.search(" ".join(header(file)))
    assert found
    assert arithmetic
    recipe = parsed(file)
    model, optimizer = recipe["model"]["init_args"], recipe["model"]["init_args"]["optimizer"]
    gpus, each, batch = int(found["gpus"]), int(found["each"]), int(found["batch"].replace(",", ""))
    assert each == recipe["data"]["init_args"]["batch_size"]
    assert gpus * each == batch == 4 * int(arithmetic["divisor"])
    factor = {"SGD": 4, "Adam": 2}[optimizer["class_path"]]
    assert found["rule"].startswith(optimizer["class_path"])
    assert float(found["lr"]) == pytest.approx(factor * optimizer["init_args"]["lr"])
    assert bool(found["warmup"]) != ("warmup_epochs" in model)
    callbacks = {callback["class_path"]: callback.get("init_args", {}) for callback in recipe["trainer"]["callbacks"]}
    rates = [stage["lr"] for stage in callbacks.get("TwoStageTraining", {}).get("stages", []) if "lr" in stage]
    assert ([float(found["last"])] if found["last"] else []) == [pytest.approx(factor * rate) for rate in rates]


@each_recipe
def test_recipe_logs_below_runs_under_its_own_name(file: Path) -> None:
    trainer = parsed(file)["trainer"]
    logger = trainer["logger"]["init_args"]
    assert trainer["default_root_dir"] == f"{logger['save_dir']}/{logger['name']}" == f"runs/{file.stem}"


def test_imagenet_trains_in_the_two_stages_of_its_header_and_with_the_rate_of_more_gpus(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = FOLDER / "resnet18_imagenet.yaml"
    stage_one, stage_two, more_gpus = re.findall(r"`(--model\.\S+ [^`]+)`", " ".join(header(file)))
    rest = [*tiny_data("ImageFolder"), *SMALL, *ONE_STEP, *smaller(file)]
    main(["fit", "--config", str(file), *stage_one.split(), *rest])
    checkpoint = "runs/resnet18_imagenet/version_0/checkpoints/best.ckpt"
    main(["fit", "--config", str(file), *stage_two.replace("CHECKPOINT", checkpoint).split(), *rest])
    main(["fit", "--config", str(file), *more_gpus.split(), *rest])
    one, two, four = (parsed(tmp_path / f"runs/resnet18_imagenet/version_{i}/config.yaml")["model"] for i in range(3))
    assert (four["init_args"]["optimizer"]["init_args"]["lr"], four["init_args"]["warmup_epochs"]) == (5e-3, 5)
    assert one["init_args"]["optimizer"]["init_args"]["weight_decay"] == 1e-5
    assert one["init_args"]["latent_weight_decay"] == 1e-5
    assert (one["init_args"]["binary"]["stage"], two["init_args"]["binary"]["stage"]) == ("activations", "both")


def test_recipe_with_a_warm_up_allows_a_fast_dev_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "quickstart", *SMALL, "--trainer.fast_dev_run", "true"])


# Stages


STAGED = [file for file in FILES if "TwoStageTraining" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", STAGED, ids=[file.stem for file in STAGED])
def test_stages_end_with_binary_weights_and_without_decay(file: Path) -> None:
    trainer = parsed(file)["trainer"]
    (callback,) = [c for c in trainer["callbacks"] if c["class_path"] == "TwoStageTraining"]
    stages = callback["init_args"]["stages"]
    epochs = trainer["max_epochs"]
    ends = [round(stage["until"] * (epochs if stage["until"] < 1 else 1)) for stage in stages[:-1]]
    assert [b - a for a, b in zip([0, *ends], [*ends, epochs], strict=True)] == [ends[0]] * len(stages)
    assert (stages[-1]["stage"], stages[-1]["weight_decay"]) == ("both", 0.0)


@pytest.mark.parametrize("file", STAGED, ids=[file.stem for file in STAGED])
def test_staged_recipe_goes_through_its_stages(
    file: Path, tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps a stage, on a network of a few channels, with its teacher's kind of network and its callbacks."""
    monkeypatch.chdir(tmp_path)
    config = parsed(file)
    (callback,) = [c for c in config["trainer"]["callbacks"] if c["class_path"] == "TwoStageTraining"]
    stages = callback["init_args"]["stages"]
    for number_, stage in enumerate(stages[:-1], 1):
        stage["until"] = number_
    for name in ("warmup_epochs", "backbone_args"):
        config["model"]["init_args"].pop(name, None)
    Path(file.name).write_text(yaml.safe_dump(config), encoding="utf-8")
    tiny = ["--model.backbone", "test_resnet", "--model.distillation.teacher", "test_resnet", "--data.image_size", "32"]
    steps = ["--trainer.max_epochs", str(len(stages)), "--trainer.limit_train_batches", "2"]
    data = tiny_data(config["data"]["class_path"])
    rest = [*data, *SMALL, *offline(file), *tiny, *steps, "--trainer.log_every_n_steps", "1"]
    main(["fit", "--config", file.name, *rest])
    log = tmp_path / "runs" / file.stem / "version_0"
    with (log / "metrics.csv").open(newline="", encoding="utf-8") as opened:
        seen = [float(row["stage"]) for row in csv.DictReader(opened) if row.get("stage")]
    assert seen == sorted(seen)
    assert set(seen) == set(range(1, len(stages) + 1))
    checkpoint = torch.load(log / "checkpoints" / "last.ckpt", weights_only=True)
    binary = [value["stage"] for key, value in checkpoint["state_dict"].items() if key.endswith("_extra_state")]
    assert binary
    assert set(binary) == {"both"}
    assert not any(key.startswith("teacher") for key in checkpoint["state_dict"])


def test_a_recipe_learns_from_the_teacher_of_its_header(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [file for file in FILES if "First its teacher: " in file.read_text(encoding="utf-8")]
    assert files
    for file in files:
        (teacher,) = re.findall(r"First its teacher: design-train (.+)", "\n".join(header(file)))
        for command in (shlex.split(teacher), commands(file)[0]):
            main([*command, *tiny_data(parsed(file)["data"]["class_path"]), *SMALL, *ONE_STEP, *smaller(file)])
        checkpoint = parsed(file)["model"]["init_args"]["distillation"]["teacher"]
        assert f"distillation from {checkpoint}" in caplog.text


# Overlays

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=[file.stem for file in OVERLAYS])


@each_overlay
def test_overlay_says_what_it_changes_and_is_no_whole_configuration(overlay: Path) -> None:
    assert Recipe(overlay.stem, overlay.read_text(encoding="utf-8")).overlay
    assert "data" not in parsed(overlay)
    for command in commands(overlay):
        recipe, first = command[2], f"overlays/{overlay.stem}"
        assert recipe in NAMES
        assert first in command[3:]


@pytest.mark.parametrize(
    ("overlay", "command"),
    [(file, command) for file in OVERLAYS for command in commands(file)],
    ids=[f"{file.stem}-{i}" for file in OVERLAYS for i in range(len(commands(file)))],
)
def test_command_of_an_overlay_trains_what_it_says(
    overlay: Path, command: list[str], tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = FOLDER / f"{command[2]}.yaml"
    data = [*tiny_data(parsed(file)["data"]["class_path"]), *few_validated(file)]
    main([*command, *data, *SMALL, *ONE_STEP, *smaller(file), *offline(file), "--model.warmup_epochs", "0"])
    saved = parsed(tmp_path / "runs" / file.stem / "version_0" / "config.yaml")
    model, was = saved["model"]["init_args"], parsed(file)["model"]["init_args"]
    changed = parsed(overlay).get("model", {}).get("init_args", {}).get("binary", {})
    on_command_line = {option.rpartition(".")[2] for option in command if option.startswith("--model.binary.")}
    for key, value in changed.items():
        assert key in on_command_line or model["binary"][key] == value
    for key, value in (was["binary"] or {}).items():
        assert key in changed or model["binary"][key] == value
    kinds = [callback["class_path"].rpartition(".")[2] for callback in saved["trainer"]["callbacks"]]
    added = [callback["class_path"] for callback in parsed(overlay).get("trainer", {}).get("callbacks+", [])]
    assert kinds == [callback["class_path"] for callback in parsed(file)["trainer"]["callbacks"]] + added


QUICKNET = FOLDER / "overlays/quicknet.yaml"
FOR_QUICKNET = re.findall(r"[a-z]+\w+", " ".join(header(QUICKNET)).partition("for: ")[2].partition(" Not for")[0])


@pytest.mark.parametrize("name", FOR_QUICKNET)
@pytest.mark.slow
def test_quicknet_runs_on_the_recipes_that_it_names(
    name: str, tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = FOLDER / f"{name}.yaml"
    data = [*tiny_data(parsed(file)["data"]["class_path"]), *few_validated(file)]
    rest = [*SMALL, *ONE_STEP, *smaller(file), *offline(file)]
    if file in STAGED:  # a single step has no room for a warm-up before its second stage
        rest += ["--model.warmup_epochs", "0"]
    main(["fit", "--config", name, *data, "--config", "overlays/quicknet", *rest])
    saved = parsed(tmp_path / "runs" / name / "version_0" / "config.yaml")
    clippings = [c for c in saved["trainer"]["callbacks"] if c["class_path"].endswith(".LatentWeightClipping")]
    assert [clipping["init_args"]["bound"] for clipping in clippings] == [1.25]


def test_quicknet_names_every_recipe() -> None:
    others = re.findall(r"real2binary\w+|\w*bnn_vgg\w+|float_\w+", QUICKNET.read_text(encoding="utf-8"))
    assert {*FOR_QUICKNET, *others, "quickstart"} == set(NAMES)


@pytest.mark.parametrize("name", ["resnet18_cifar10", "resnet20_cifar10", "vgg_small_cifar10"])
def test_recipe_of_design_is_that_of_recu_with_the_overlay(name: str) -> None:
    design, recu = (parsed(FOLDER / f"{each}.yaml") for each in (name, f"recu_{name}"))
    recu["model"]["init_args"]["binary"] |= parsed(FOLDER / "overlays/design.yaml")["model"]["init_args"]["binary"]
    design["model"]["init_args"]["binary"].setdefault("activation", "design")
    for config in (design, recu):
        del config["trainer"]["default_root_dir"], config["trainer"]["logger"]
    assert design == recu
