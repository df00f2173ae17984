"""`design-train submit` without a cluster: what it writes, and what it refuses. `sinfo` and `sbatch` are stand-ins.

tests/cluster has the real ones.
"""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from design_lightning.cli import main
from design_lightning.commands.slurm import seconds

SINFO = """
short|n1|(null)|16|30:00|up|1
short|n2|(null)|16|30:00|up|1
main*|n1|gpu:a100:8(S:0-1)|64|2-00:00:00|up|1-infinite
main*|n2|gpu:a100:8(S:0-1)|64|2-00:00:00|up|1-infinite
main*|n3|gpu:a100:4(S:0),gpu:v100:2|32|2-00:00:00|up|1-infinite
old|n4|gpu:2|8|infinite|inact|1-infinite
"""
RECIPE = ["--config", "quickstart", "--model.backbone_args", "{width: 0.125}"]
FITTING = "--nodes 2 --gpus 8 --cpus 8 --time 24:00:00"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with `sinfo`, and `sbatch`, which notes its arguments and says 4711."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "sinfo", f"cat <<'END'\n{SINFO.strip()}\nEND")
    program(folder / "sbatch", f'echo "$@" >> {folder}/asked\necho "4711;cluster"')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def submit(*options: str) -> None:
    main(["submit", *RECIPE, *options])


def directives(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, flags=re.MULTILINE)
    assert len(found) == len(dict(found)), "an option of sbatch is given twice"
    return dict(found)


def test_a_job_is_written_and_submitted(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(*FITTING.split(), "--config", "cluster/slurm", "--extra.account", "vision", "--name", "mine")
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    folder = Path(printed["folder"])
    assert printed["job"] == "4711"
    assert printed["log"] == str(folder / "slurm-4711.log")
    assert folder.parent == tmp_path / "runs" / "quickstart"
    assert (programs / "asked").read_text() == f"--parsable {folder}/train.sbatch\n"
    script = (folder / "train.sbatch").read_text()
    assert directives(script) == {
        "job-name": "mine",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "8",
        "time": "24:00:00",
        "output": str(folder / "slurm-%j.log"),
        "account": "vision",
        "open-mode": "append",
        "requeue": "",
        "signal": "SIGUSR1@90",
    }
    assert subprocess.run(["bash", "-n", str(folder / "train.sbatch")]).returncode == 0
    assert shlex.quote(str(folder / "config.yaml")) in script
    config = yaml.safe_load((folder / "config.yaml").read_text())
    trainer = config["trainer"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["accelerator"]) == (2, 8, "gpu")
    assert (trainer["strategy"], trainer["sync_batchnorm"]) == ("ddp", True)
    assert trainer["default_root_dir"] == trainer["logger"]["init_args"]["save_dir"] == str(folder)
    assert trainer["callbacks"][-1]["class_path"].endswith("PreemptionCheckpoint")
    assert not {"nodes", "gpus", "dry_run", "folder", "config"} & set(config)


def test_what_was_written_is_what_fit_takes(programs: Path, tmp_path: Path) -> None:
    submit(*["--gpus", "0", "--tasks", "2", "--cpus", "1", "--folder", "job", "--trainer.callbacks+=RandomStates"])
    short = [
        "--trainer.max_steps",
        "1",
        "--trainer.limit_val_batches",
        "1",
        "--data.num_workers",
        "0",
        "--data.batch_size",
        "4",
    ]
    main(["fit", "--config", "job/config.yaml", "--trainer.devices", "1", *short])
    assert list((tmp_path / "job").rglob("last.ckpt"))


def test_a_dry_run_prints_the_script_and_leaves_nothing(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit("--gpus", "0", "--tasks", "2", "--cpus", "1", "--time", "10:00", "--dry-run")
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "gpus-per-node" not in directives(script)
    assert directives(script)["ntasks-per-node"] == "2"
    assert not (programs / "asked").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ("--nodes 4 --gpus 8", "nodes is 4, but partition 'main' has 3"),
        ("--nodes 3 --gpus 8", "3 nodes with 8 GPUs each are asked for, but partition 'main' has 2"),
        ("--gpus 9", "1 nodes with 9 GPUs each are asked for, but partition 'main' has 0; the largest node has 8"),
        ("--gpus 8 --cpus 9", "1 nodes with 8 processes of 9 CPUs each are asked for"),
        ("--partition mian", "no partition 'mian' on this cluster: did you mean 'main'?"),
        ("--partition old --cpus 1", "partition 'old' takes no jobs now"),
        ("--partition short --gpus 0 --time 31:00", "time is 31:00, but partition 'short' allows 30:00"),
        (
            "--partition short --gpus 0 --time 30:00 --nodes 2",
            "nodes is 2, but partition 'short' gives a job at most 1",
        ),
        ("--extra.array 0-3", "sbatch's --array would have several jobs share one folder"),
        ("--time 25h", "time is '25h'; SLURM reads minutes, minutes:seconds,"),
        ("--time 1:30", "time is '1:30', but a job is told 90 seconds before its end"),
        ("--nodes 0", "nodes is 0, but must be at least 1"),
        ("--gpus 2 --tasks 3", "tasks is 3, but there is one a GPU, 2"),
        ("--name interactive", "none of bash, interactive"),
        ("--extra.nodes 3", "sbatch's --nodes is set by"),
        ("--trainer.strategy dpd", "trainer.strategy is 'dpd': did you mean"),
        ("--model.backbone resnet81", "unknown backbone 'resnet81'"),
        ("--trainer.callbacks+=TwoStageTraining --trainer.callbacks.patience 0", "patience=0 must be at least 1"),
        ("--folder bin", "exists; a job that it is of goes on with: sbatch"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_written(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, refusal: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        submit(*shlex.split(options))
    assert ended.value.code == 1
    assert refusal in capsys.readouterr().err.splitlines()[-1]
    assert not (programs / "asked").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_wrong_option_is_refused_as_by_fit(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        submit("--trainer.max_epocs", "3")
    assert ended.value.code == 2
    assert "did you mean 'max_epochs'" in capsys.readouterr().err


def test_what_sbatch_refuses_leaves_no_folder(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(programs / "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(SystemExit):
        submit("--folder", "job")
    assert capsys.readouterr().err.splitlines()[-1].endswith("sbatch refused: sbatch: error: Invalid account")
    assert not (tmp_path / "job").exists()


def test_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        submit()
    assert "no sinfo on the PATH: submit from a login node" in capsys.readouterr().err
    submit("--dry-run")
    assert "no SLURM answers here" in capsys.readouterr().err
    program(tmp_path / "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    submit("--dry-run")
    assert "no SLURM answers here" in capsys.readouterr().err


class Preempted(Callback):
    """Sends SIGUSR1 to its own process within the third step."""

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


SLURM = {
    "SLURM_JOB_NAME": "mine",
    "SLURM_JOB_ID": "4711",
    "SLURM_NODELIST": "localhost",
    **dict.fromkeys(("SLURM_NTASKS", "SLURM_NNODES"), "1"),
    **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
}


@pytest.mark.own_process
@pytest.mark.slow
def test_a_requeued_job_goes_on_from_its_own_checkpoint_whatever_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--data.num_workers", "0"]
    job = ["fit", *RECIPE, *short, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.batch_size", "8"]
    main([*job, "--trainer.max_epochs", "1"])
    (start,) = tmp_path.rglob("last.ckpt")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    job += ["--ckpt_path", str(start), "--trainer.max_epochs", "3", "--trainer.default_root_dir", "job"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        main([*job, f"--trainer.callbacks+={__name__}.Preempted"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert ended.value.code == 128 + signal.SIGUSR1
    assert torch.load("job/hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    assert f"the checkpoint path at {start}" in caplog.text
    caplog.clear()
    main(job)
    assert "the checkpoint path at job/hpc_ckpt_1.ckpt" in caplog.text
    assert torch.load("job/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 4


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216_000),
        ("1-0:30", 88_200),
        ("1-0:0:30", 86_430),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, expected: int) -> None:
    assert seconds(time) == expected
