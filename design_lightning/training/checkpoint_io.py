"""`AtomicCheckpointIO`: a checkpoint is written whole or not at all, whatever kills the process or fills the disk."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from design_lightning._files import written_whole

PARTIAL = ".partial_checkpoint"
"""What a file is called while it is written. Not after its checkpoint: Lightning takes for one what has `hpc_ckpt_` in its name."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has the disk confirm it, and renames it: the one before it stands until then.

    Lightning's own is written to the folder for temporary files and then moved, which across file systems is a copy: what kills
    it leaves half a checkpoint in place of the last one. Paths of other systems than this machine's (`s3://...`) are left to
    Lightning.
    """

    def load_checkpoint(self, path: str | Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            ValueError: if it is none, or cut off.
        """
        try:
            loaded: dict[str, Any] = super().load_checkpoint(path, *arguments, **named)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever a file may raise that is none
            raise ValueError(
                f"{path} is no checkpoint of an earlier run: it is cut off, of another origin, or holds other things than tensors "
                "and plain values; move it away, or give another"
            ) from error
        return loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: if it cannot be written; the earlier file of that name is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(place, place.with_name(PARTIAL)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            before = "the one before it is as it was" if place.exists() else "there was none before it"
            reason = _write_error(error)
            if reason is None:
                raise
            raise OSError(f"the checkpoint {place} cannot be written ({reason}); {before}") from None


def _write_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system among an error and what led to it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
