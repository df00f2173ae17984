"""A logger by its bare name: one line of YAML, or one option."""

import importlib.util
import shlex
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from design_lightning.cli import main

FIT = shlex.split(
    "fit --config quickstart --trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 2 "
    "--trainer.limit_val_batches 1 --data.batch_size 8 --trainer.log_every_n_steps 1 --model.warmup_epochs 0"
)
PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_line_of_yaml_logs_to_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    Path("logger.yaml").write_text("trainer: {logger: TensorBoardLogger}\n")
    monitor = '--trainer.callbacks+={"class_path": "SignFlipMonitor", "init_args": {"every_n_steps": 1}}'
    main([*FIT, "--config", "logger.yaml", monitor])
    lines = dict(line.partition(": ")[::2] for line in capsys.readouterr().out.splitlines())
    folder = Path(lines["logs"])
    assert folder == Path("runs/quickstart/version_0")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "val/top1", "flips/mean"} <= set(events.Tags()["scalars"])
    assert any(name.startswith("maps/") for name in events.Tags()["images"])
    assert "backbone: resnet18_cifar" in (folder / "hparams.yaml").read_text()


def test_one_option_logs_to_two_places(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [
        f'{{"class_path": "{name}", "init_args": {{"save_dir": "logs"}}}}'
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    main([*FIT, f"--trainer.logger=[{', '.join(loggers)}]"])
    assert "val/top1" in next(Path("logs").rglob("metrics.csv")).read_text()
    assert next(Path("logs").rglob("events.out*")).stat().st_size > 1000


def test_csv_says_that_it_takes_no_pictures(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        main([*FIT, "--trainer.logger", "CSVLogger", "--trainer.callbacks+=SignFlipMonitor"])
    assert "SignFlipMonitor draws nothing: CSVLogger takes no pictures" in caplog.text


@pytest.mark.parametrize("name", PACKAGES)
def test_a_logger_whose_package_is_missing_names_the_command_that_installs_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is installed")
    with pytest.raises(SystemExit):
        main([*FIT, "--trainer.logger", name])
    lines = capsys.readouterr().err.splitlines()
    assert f"{name}: {PACKAGES[name]} is not installed: pip install '{PACKAGES[name]}>=" in lines[-1]
    assert lines[-1].startswith("design-train: error: ")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_line_of_yaml_is_the_logger_of_that_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("logger.yaml").write_text(f"trainer: {{logger: {name}}}\n")
    with pytest.raises(SystemExit):
        main([*FIT, "--config", "logger.yaml", "--print_config"])
    assert f"class_path: lightning.pytorch.loggers.{name}" in capsys.readouterr().out
    assert issubclass(getattr(__import__("lightning.pytorch.loggers", fromlist=[name]), name), Logger)


def test_runs_of_a_logger_of_services_keep_a_configuration_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("service.py").write_text(
        "from lightning.pytorch.loggers import Logger\n"
        "class Service(Logger):\n"
        "    name, save_dir, experiment = 'project', 'runs', None\n"
        "    def __init__(self, version: str) -> None: super().__init__(); self._version = version\n"
        "    @property\n"
        "    def version(self): return self._version\n"
        "    def log_metrics(self, *_, **__): pass\n"
        "    def log_hyperparams(self, *_, **__): pass\n"
    )
    monkeypatch.syspath_prepend(".")
    for version in ("abc", "def"):
        main([*FIT, "--trainer.logger", "service.Service", "--trainer.logger.version", version])
        lines = dict(line.partition(": ")[::2] for line in capsys.readouterr().out.splitlines())
        assert Path(lines["logs"]) == Path("runs/project") / version
        assert Path(lines["checkpoint"]).is_relative_to(lines["logs"])
        assert f"version: {version}" in (Path(lines["logs"]) / "config.yaml").read_text()
