"""Weights of which each process holds a part: what trains on, what resumes, and what is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from ddp_parity import config, fit
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

import design_lightning as dl
from design_lightning.callbacks import BatchNormRecalibration, LatentWeightClipping, SignFlipMonitor, TwoStageTraining
from design_lightning.training.sharding import check_strategy, is_sharded


def sharded(*callbacks: str, **strategy: Any) -> dict[str, Any]:
    """The configuration of a run on two processes, with more callbacks by name, and a strategy changed."""
    found = config("sharded", "group", "32-true")
    found["trainer"]["callbacks"] += [{"class_path": name} for name in callbacks]
    found["trainer"]["strategy"]["init_args"] |= strategy
    return found


def error(folder: Path, settings: dict[str, Any]) -> str:
    """What `design-train fit` says on standard error, where it ends with 1."""
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "design_lightning", "fit", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_all_callbacks_that_need_whole_weights_are_named_at_once_before_training(tmp_path: Path) -> None:
    said = error(tmp_path, sharded("SignFlipMonitor", "ExportModel", "BinaryWeightAveraging"))
    assert "no process holds the whole weights, which these callbacks need: SignFlipMonitor, ExportModel, " in said
    assert "BinaryWeightAveraging; leave them out, or use strategy ddp" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (
            {"data_parallel_size": "auto", "tensor_parallel_size": "auto"},
            "set tensor_parallel_size to 1, and data_parallel",
        ),
        ({"save_distributed_checkpoint": True}, "set save_distributed_checkpoint to false for one file"),
    ],
    ids=("tensor parallel", "folders"),
)
def test_a_strategy_that_a_classifier_cannot_follow_is_refused(tmp_path: Path, strategy: dict, said: str) -> None:
    assert said in error(tmp_path, sharded(**strategy))


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_flattened_weights_are_refused_whatever_the_callbacks(strategy: type) -> None:
    message = f"{strategy.__name__} has not been tried with binary layers.*use strategy ddp, or ModelParallelStrategy"
    module: Any = dl.DesignClassifier("resnet20_cifar", num_classes=10, backbone_args={"width": 0.25})
    for callback in (LatentWeightClipping(), TwoStageTraining(), BatchNormRecalibration(), SignFlipMonitor()):
        pretended: Any = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[callback])
        with pytest.raises(ValueError, match=message):
            callback.setup(pretended, module, "fit")
    with pytest.raises(ValueError, match=message):
        check_strategy(pretended)
    assert is_sharded(pretended)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_any_of_its_checkpoints_as_if_never_stopped(tmp_path: Path) -> None:
    settings = sharded("BatchNormRecalibration")
    del settings["model"]["init_args"]["backbone_args"]["norm_layer"]  # batch norm, with statistics
    settings["trainer"]["callbacks"] = [
        {"class_path": "PreemptionCheckpoint", "init_args": {"every_n_steps": 7}},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": ".", "filename": "{epoch}", "save_top_k": -1}},
        *settings["trainer"]["callbacks"][1:],
    ]
    fit(tmp_path, settings)
    whole = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    network = dl.DesignClassifier.load_from_checkpoint(tmp_path / "epoch=1.ckpt").state_dict()
    assert network.keys() == whole["state_dict"].keys()
    for name in ("epoch=0.ckpt", "hpc_ckpt_1.ckpt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        fit(folder, copy.deepcopy(settings), "--ckpt_path", str(tmp_path / name))
        resumed = torch.load(folder / "epoch=1.ckpt", weights_only=True)
        assert resumed["global_step"] == whole["global_step"] == 20
        for key, value in whole["state_dict"].items():
            other = resumed["state_dict"][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
