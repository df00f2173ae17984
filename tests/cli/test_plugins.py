"""The example plugin, installed as a package: what it adds is listed, and a training finds it by name."""

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import design_lightning as dl
from design_lightning.binary import STE, BinaryActivation, Estimator
from design_lightning.binary.registry import REGISTRIES
from design_lightning.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"
TRAINING = (
    "fit --config quickstart --trainer.accelerator cpu --trainer.max_steps 2 --trainer.limit_val_batches 1 --data.batch_size 8 "
    "--model.warmup_epochs 0 --model.binary.kernel checkers --model.binary.estimator triangle "
    "--model.binary.estimator_args.width 2.0 --trainer.callbacks+=UndecidedWeights"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the example in it, as pip installs it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    subprocess.run(["cp", "-r", EXAMPLE, source / "plugin"], check=True)  # pip leaves a build folder
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, source / "plugin"], check=True)
    return site


@pytest.fixture
def _forgotten_later() -> Iterator[None]:
    """Registers nothing beyond a test."""
    known = [dict(registry) for _, registry in REGISTRIES.values()]
    yield
    for (_, registry), before in zip(REGISTRIES.values(), known, strict=True):
        registry.clear()
        registry.update(before)


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _forgotten_later: None) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "design_example"]:
        del sys.modules[name]


def test_plugins_are_listed_with_what_they_add(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plugins"])
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("example  design-example 0.1.0, module design_example")
    added = [line.strip() for line in lines[first + 1 : first + 4]]
    assert added == ["kernel: checkers", "estimator: triangle", "callback: UndecidedWeights"]


def test_a_broken_plugin_is_listed_with_its_error_beside_the_others(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (installed / "broken_plugin.py").write_text("raise RuntimeError('made for another version')\n")
    (installed / "broken_thing-2.0.dist-info").mkdir()
    (installed / "broken_thing-2.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-thing\nVersion: 2.0\n"
    )
    (installed / "broken_thing-2.0.dist-info" / "entry_points.txt").write_text(
        "[design_lightning.plugins]\nbroken = broken_plugin\n"
    )
    monkeypatch.syspath_prepend(str(installed))
    with pytest.raises(SystemExit) as stopped:
        main(["plugins"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "broken  broken-thing 2.0, module broken_plugin\n  broken: RuntimeError: made for another version" in out
    assert "estimator: triangle" in out


def test_without_plugins_it_says_what_one_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    main(["plugins"])
    assert "a package with an entry point in the group design_lightning.plugins" in capsys.readouterr().out


def test_a_training_finds_kernel_estimator_and_callback_by_name(installed: Path, site: Path) -> None:
    # In a process of its own, as classes of this one stay known to it.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", "from design_lightning.cli import main; main()", *TRAINING.split()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    path = next(line for line in run.stdout.splitlines() if line.startswith("checkpoint: ")).partition(": ")[2]
    stored = torch.load(path, weights_only=True)["hyper_parameters"]["binary"]
    assert stored["kernel"]["levels"] == [[[0.3, 0.9], [0.9, 0.3]]]
    assert (stored["estimator"], stored["estimator_args"]) == ("triangle", {"width": 2.0})
    metrics = next(Path("runs/quickstart").rglob("metrics.csv")).read_text()
    assert "train/undecided" in metrics.splitlines()[0]
    importlib.import_module("design_example")
    layer = next(iter(dl.surgery.binary_layers(dl.DesignClassifier.load_from_checkpoint(path)).values()))
    assert type(layer.activation.estimator).__module__ == "design_example.estimator"  # type: ignore[union-attr]
    u = torch.tensor([-3.0, -1.0, 0.0, 0.5])
    assert layer.activation.estimator.derivative(u).tolist() == [0.0, 0.25, 0.5, 0.375]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ste", type("Mine", (Estimator,), {}), "estimator 'ste' is taken"),
        ("2x2_v1", dl.ThresholdKernel([[0.1]]), "kernel '2x2_v1' is taken"),
        ("a.b", STE, r"'a\.b' is no name to register"),
        ("none", type("Nothing", (BinaryActivation,), {}), "'none' is no name to register"),
    ],
)
@pytest.mark.usefixtures("_forgotten_later")
def test_names_that_cannot_be_registered(name: str, value: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dl.register(name, value)


@pytest.mark.usefixtures("_forgotten_later")
def test_what_is_registered_again_stays_and_other_things_are_refused() -> None:
    dl.register("ste", STE)
    dl.register("dots", dl.ThresholdKernel([[0.5]]))
    dl.register("dots", dl.ThresholdKernel([[0.5]]))
    assert dl.BinaryConfig(kernel="dots").threshold_kernel().levels == (((0.5,),),)
    with pytest.raises(ValueError, match="unknown kernel 'dot': did you mean 'dots'"):
        dl.BinaryConfig(kernel="dot")
    with pytest.raises(TypeError, match="neither a ThresholdKernel nor a subclass of Estimator"):
        dl.register("module", types.ModuleType)  # type: ignore[arg-type]
