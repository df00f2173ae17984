"""`design-train submit` on a real SLURM: what is pre-empted ends like an undisturbed job, and what dies ends with its cause."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

HERE = Path(__file__).parent
CANNOT_BE_HAD = 3
ASKED = ["--nodes", "1", "--gpus", "0", "--tasks", "2", "--cpus", "1", "--time", "20:00"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SLURM of this one machine; yields the environment to use it in."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([HERE / "start_slurm", folder], capture_output=True, text=True)
    if started.returncode == CANNOT_BE_HAD:
        pytest.skip(f"SLURM cannot be had here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    yield {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    subprocess.run([HERE / "stop_slurm", folder], check=True)


def submit(environment: dict[str, str], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "design_lightning", "submit", *options, *ASKED]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def submitted(environment: dict[str, str], folder: Path, *options: str) -> str:
    done = submit(environment, folder, "--config", str(HERE / "two_stages.yaml"), *options)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert Path(printed["log"]).parent == Path(printed["folder"])
    return printed["job"]


def wait_for(job: str, environment: dict[str, str], minutes: float = 10) -> dict[str, str]:
    """Until the job has ended; SLURM's two minutes between a requeue and the next start are cut short."""
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], env=environment, capture_output=True, text=True, check=True
        ).stdout
        facts = dict(part.split("=", 1) for part in shown.split() if "=" in part)
        if facts["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
            return facts
        if facts["JobState"] == "PENDING":
            time.sleep(3)  # a job that starts within the second of its requeue is refused: "Job credential revoked"
            update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(update, env=environment, capture_output=True)
        time.sleep(0.5)
    raise AssertionError(f"job {job} has not ended after {minutes} minutes: {shown}")


@pytest.mark.slow
def test_a_preempted_job_ends_with_the_weights_of_an_undisturbed_one(cluster: dict[str, str], tmp_path: Path) -> None:
    signalled, requeued = "scancel --signal=USR1 JOB", "scontrol requeue JOB"
    commands = {3: signalled, 8: requeued, -1: signalled, 14: signalled}
    preempting = {"class_path": "preempting.Preempting", "init_args": {"commands": commands}}
    (tmp_path / "preempting.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks+": [preempting]}}, sort_keys=False)
    )
    undisturbed = submitted(cluster, tmp_path, "--folder", "undisturbed")
    preempted = submitted(cluster, tmp_path, "--folder", "preempted", "--config", "preempting.yaml")
    for job, folder, restarts in ((undisturbed, "undisturbed", 0), (preempted, "preempted", len(commands))):
        log = tmp_path / folder / f"slurm-{job}.log"
        facts = wait_for(job, cluster)
        assert facts["JobState"] == "COMPLETED", log.read_text()
        assert int(facts["Restarts"]) == restarts, log.read_text()
    whole, resumed = (
        torch.load(tmp_path / folder / "checkpoints" / "final.ckpt", weights_only=True)
        for folder in ("undisturbed", "preempted")
    )
    assert whole["global_step"] == resumed["global_step"] == 24
    assert whole["callbacks"]["TwoStageTraining"]["stage"] == 1
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed["state_dict"][name]), name
    log = (tmp_path / "preempted" / f"slurm-{preempted}.log").read_text()
    for line in ("SIGUSR1: ended at step 4", "SIGTERM: ended at step 9", "SIGUSR1: ended at step 15"):
        assert line in log, log
    assert log.count("requeued after SIGUSR1") == 3

    # What this cluster cannot do is refused before anything is written or submitted.
    for asked, refusal in {
        "--nodes 2": "nodes is 2, but partition 'tests' has 1",
        "--gpus 1": "1 nodes with 1 GPUs each are asked for, but partition 'tests' has 0",
        "--extra.nodelist nowhere": "sbatch refused: sbatch: error: ",
    }.items():
        config = ["--config", str(HERE / "two_stages.yaml"), "--folder", "refused"]
        command = [sys.executable, "-m", "design_lightning", "submit", *config, *ASKED[:2], "--cpus", "1"]
        command += ["--gpus", "0", "--time", "20:00", *shlex.split(asked)]
        done = subprocess.run(command, cwd=tmp_path, env=cluster, capture_output=True, text=True)
        assert done.returncode == 1
        assert refusal in done.stderr
        assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("killed", "task 1: Killed"),
        ("refuses", "design-train: error: process 1 of 2: the images are torch.uint8, where a network takes "),
    ],
)
def test_a_task_that_dies_ends_the_job_with_its_cause(
    cluster: dict[str, str], tmp_path: Path, how: str, cause: str
) -> None:
    dying = {"class_path": "dying.Dying", "init_args": {"rank": 1, "how": how}}
    (tmp_path / "dying.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [dying]}}, sort_keys=False))
    job = submitted(cluster, tmp_path, "--folder", "dead", "--config", "dying.yaml")
    facts = wait_for(job, cluster)
    log = (tmp_path / "dead" / f"slurm-{job}.log").read_text()
    assert facts["JobState"] == "FAILED", log
    assert facts["Restarts"] == "0", log
    assert cause in log
    assert "Traceback" not in log
    # Another attempt goes on behind the last step that was saved before.
    assert torch.load(tmp_path / "dead" / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 4
