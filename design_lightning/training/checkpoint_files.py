"""Reading what Lightning wrote; imports no timm, so that the help of a command is quick."""

from pathlib import Path
from typing import Any

import torch

EXPORTED = (".onnx", ".xml", ".safetensors")

PREEMPTED = "hpc_ckpt_1.ckpt"
"""What `PreemptionCheckpoint` writes in `default_root_dir`, where Lightning looks for it: on SLURM, or with `ckpt_path="hpc"`."""


def is_exported(path: str | None) -> bool:
    """Whether a path is one of an exported file, and not of Lightning's checkpoints."""
    return path is not None and str(path).endswith(EXPORTED)


def read_checkpoint(path: str, option: str, weights_only: bool = True) -> dict[str, Any]:
    """What Lightning wrote in a checkpoint, on the CPU.

    Args:
        path: the file.
        option: what the user called it; named in errors.
        weights_only: False reads other things than tensors and plain values, too; only of a trusted file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option} {path!r} is no file; give the checkpoint of an earlier run")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # whatever a file may raise that is none
        # Not in torch's words, which advise to unpickle it.
        others = ", or holds other things than tensors and plain values" if weights_only else ""
        raise ValueError(
            f"{option} {path!r} is no checkpoint of an earlier run: it is cut off, of another origin{others}"
        ) from error
    if not isinstance(stored, dict) or "state_dict" not in stored:
        raise ValueError(f"{option} {path!r} is no checkpoint of an earlier run: it has no state_dict")
    return stored
