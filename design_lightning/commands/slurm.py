"""What `design-train submit` asks of SLURM: a request, whether the cluster can meet it, and the script."""

import importlib.resources
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from design_lightning._names import did_you_mean

NOTICE = 90
"""The seconds before its end at which a job is told, as in the script's `--signal`."""
INTERACTIVE = ("bash", "interactive")
"""Names of jobs in which Lightning does not look at SLURM."""
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<plain>\d+(?::\d+){0,2}))")
_UNLIMITED = ("infinite", "UNLIMITED", "n/a")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        nodes: how many.
        gpus: of each node; 0 trains on its CPUs.
        tasks: processes on each node; one a GPU where there are any.
        cpus: cores of each process: one, and one a worker of its data.
        time: until the end, as SLURM writes it: `minutes`, `hours:minutes:seconds`, `days-hours`, ...
        partition: its name; the cluster's default where None.
        name: of the job.
        extra: other options of sbatch, such as `{"account": "vision"}`.

    Raises:
        ValueError: if no cluster could do that.
    """

    nodes: int = 1
    gpus: int = 1
    tasks: int | None = None
    cpus: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    name: str = "design-train"
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus", 0), ("tasks", 1), ("cpus", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        if self.gpus and self.tasks not in (None, self.gpus):
            raise ValueError(f"tasks is {self.tasks}, but there is one a GPU, {self.gpus}; leave it out")
        if self.name in INTERACTIVE or not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"name is {self.name!r}, but must be of letters, digits, '.', '_' and '-', and none of "
                f"{', '.join(INTERACTIVE)}, in which Lightning does not look at SLURM"
            )
        own = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "job-name", "output"}
        for option in self.extra:
            if option in own | {"requeue", "no-requeue", "signal", "open-mode"}:
                raise ValueError(f"sbatch's --{option} is set by the script and the options of submit")
        if "array" in self.extra:
            raise ValueError("sbatch's --array would have several jobs share one folder: submit each by itself")
        if seconds(self.time) <= NOTICE:
            raise ValueError(f"time is {self.time!r}, but a job is told {NOTICE} seconds before its end: ask for more")

    @property
    def processes(self) -> int:
        """On each node."""
        return self.gpus or self.tasks or 1

    @property
    def directives(self) -> dict[str, str | None]:
        """The options of sbatch; None takes one out of the script."""
        return {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.processes),
            "gpus-per-node": str(self.gpus) if self.gpus else None,
            "cpus-per-task": str(self.cpus),
            "time": self.time,
            "partition": self.partition,
            **self.extra,
        }


def seconds(time: str) -> int:
    """A time limit of SLURM in seconds.

    Raises:
        ValueError: if SLURM would not read it.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(
            f"time is {time!r}; SLURM reads minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds, for example 24:00:00 or 2-12"
        )
    if found["plain"]:
        parts = [int(part) for part in found["plain"].split(":")]
        hours, minutes, rest = (0, parts[0], 0) if len(parts) == 1 else (0, *parts) if len(parts) == 2 else tuple(parts)
        return 3600 * hours + 60 * minutes + rest
    days, hours, minutes, rest = (int(found[name] or 0) for name in ("days", "h", "m", "s"))
    return 86400 * days + 3600 * hours + 60 * minutes + rest


@dataclass(frozen=True)
class _Node:
    partition: str
    is_default: bool
    name: str
    gpus: int
    cpus: int
    limit: str
    is_up: bool
    most: str


def check_cluster(request: Request) -> None:
    """Compares a request with the cluster's partitions.

    Raises:
        FileNotFoundError: if there is no SLURM here.
        ValueError: if the cluster cannot meet the request, whatever it is doing now.
    """
    nodes = _nodes()
    known = {node.partition for node in nodes}
    if request.partition is None:
        chosen = [node for node in nodes if node.is_default]
        if not chosen:
            raise ValueError(f"this cluster has no default partition; set partition: {', '.join(sorted(known))}")
    else:
        chosen = [node for node in nodes if node.partition == request.partition]
        if not chosen:
            raise ValueError(
                f"no partition {request.partition!r} on this cluster: {did_you_mean(request.partition, known)}"
            )
    where = f"partition {chosen[0].partition!r}"
    if not chosen[0].is_up:
        raise ValueError(f"{where} takes no jobs now; choose another, or ask its administrators")
    limit = chosen[0].limit
    if limit not in _UNLIMITED and seconds(request.time) > seconds(limit):
        raise ValueError(f"time is {request.time}, but {where} allows {limit}; a requeued job gets its time anew")
    most = chosen[0].most
    if most not in _UNLIMITED and request.nodes > int(most):
        raise ValueError(f"nodes is {request.nodes}, but {where} gives a job at most {most}")
    if request.nodes > len(chosen):
        raise ValueError(f"nodes is {request.nodes}, but {where} has {len(chosen)}")
    needed = request.processes * request.cpus
    for asked, what, has in (
        (request.gpus, f"{request.gpus} GPUs", [node.gpus for node in chosen]),
        (needed, f"{request.processes} processes of {request.cpus} CPUs", [node.cpus for node in chosen]),
    ):
        enough = sum(count >= asked for count in has)
        if enough < request.nodes:
            raise ValueError(
                f"{request.nodes} nodes with {what} each are asked for, but {where} has {enough}; the largest node has {max(has)}"
            )


def _nodes() -> list[_Node]:
    """Every node of every partition."""
    found = []
    for line in run("sinfo", "--noheader", "--Node", "--format=%P|%N|%G|%c|%l|%a|%s").splitlines():
        partition, name, gres, cpus, limit, available, job_size = line.strip().split("|")
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))
        found.append(
            _Node(
                partition.rstrip("*"),
                partition.endswith("*"),
                name,
                gpus,
                int(cpus.rstrip("+")),
                limit,
                available.startswith("up"),
                job_size.rpartition("-")[2],
            )
        )
    if not found:
        raise ValueError("sinfo lists no node: this cluster has none for you")
    return found


def answers() -> bool:
    """Whether a SLURM is here, and lists its nodes."""
    return shutil.which("sinfo") is not None and not subprocess.run(["sinfo"], capture_output=True).returncode


def run(*command: str) -> str:
    """What a command of SLURM prints.

    Raises:
        FileNotFoundError: if there is none of that name.
        ValueError: if it fails; with its own words.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no {command[0]} on the PATH: submit from a login node of a SLURM cluster")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{command[0]} refused: {' '.join(done.stderr.split()) or f'code {done.returncode}'}")
    return done.stdout


def script(request: Request, folder: Path, arguments: Sequence[str]) -> str:
    """`scripts/slurm/train.sbatch` for a request.

    Args:
        request: fills in the `#SBATCH` lines.
        folder: of the job.
        arguments: of `fit`, before those that are given to sbatch.
    """
    text = importlib.resources.files("design_lightning.scripts").joinpath("slurm/train.sbatch").read_text("utf-8")
    values = {**request.directives, "output": str(folder / "slurm-%j.log")}
    lines = []
    for line in text.splitlines():
        option = line.removeprefix("#SBATCH --").partition("=")[0] if line.startswith("#SBATCH") else ""
        if option == "requeue":  # behind all that the script has values for
            lines += [f"#SBATCH --{name}={value}" for name, value in values.items() if value is not None]
        if option not in values:
            lines.append(line)
    return _assign(
        "\n".join(lines) + "\n",
        {
            "train": f"({shlex.join([sys.executable, '-m', 'design_lightning', 'fit'])})",
            "arguments": f'({shlex.join(arguments)} "$@")',
            "folder": shlex.quote(str(folder)),
        },
    )


def _assign(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=.*$", lambda _, v=f"{name}={value}": v, text, flags=re.MULTILINE)  # type: ignore[misc]
        assert count == 1, f"train.sbatch sets {name} {count} times"
    return text
