"""The arm `designed`: a kernel for each binary layer, searched on the pre-activations of the trained Sign network.

Two commands a network: Sign's own screening run again, with its checkpoint kept, and `design-train design --per_layer` on 1,000
training images, with the paper's score (total variation) and the published levels. What they give is kept among the results.
"""

import json
import os
from pathlib import Path
from typing import IO, Any

import yaml
from study import ROOT, Run
from training import LOGS, call, shown


def designed_file(folder: Path, network: str) -> Path:
    """Where the overrides of a network are."""
    return folder / f"accuracy_designed_{network}.yaml"


def read_overrides(folder: Path, network: str) -> dict[str, Any] | None:
    """The overrides of a network; None before they are made."""
    path = designed_file(folder, network)
    if not path.exists():
        return None
    overrides: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["overrides"]
    return overrides


def commands(sign: Run, data: str) -> list[list[str]]:
    """What makes the overrides: a training of Sign, and the search."""
    place = LOGS / "designing" / sign.network.name
    keep = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(place), "filename": "sign"}}
    training = sign.command(data)
    training[training.index("--trainer.logger.name") + 1] = f"designing/{sign.network.name}/training"
    training += ["--trainer.enable_checkpointing", "true", "--trainer.callbacks+", json.dumps(keep)]
    search = ["design-train", "design", "--images", str(Path(data) / "train"), "--checkpoint", str(place / "sign.ckpt")]
    search += ["--per_layer", "--size", "2x2", "--levels", "published", "--score", "tv"]
    return [training, [*search, "--out", str(place / "overrides.yaml")]]


def make_overrides(sign: Run, data: str, folder: Path, claim: IO[str] | None = None) -> None:
    """Makes the overrides of a network.

    Args:
        sign: Sign's screening run on it, at its better rate.
        data: the folder of CIFAR-10, as class folders.
        folder: of the results.
        claim: an open file that the processes shall keep open.

    Raises:
        FailedError: if a command ends with an error.
    """
    place = ROOT / LOGS / "designing" / sign.network.name
    (place / "sign.ckpt").unlink(missing_ok=True)  # or the new one would get another name
    made = commands(sign, data)
    for name, command in zip(("training.txt", "search.txt"), made, strict=True):
        call(command, place / name, claim)
    header = "".join(f"#   {shown(command)}\n" for command in made)
    path = designed_file(folder, sign.network.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(f"# Made by\n{header}" + (place / "overrides.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    os.replace(aside, path)
