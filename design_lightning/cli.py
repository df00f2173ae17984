"""The door: `design-train COMMAND ...`.

This file imports neither torch nor Lightning, so that `design-train --help` answers at once; a command's module is
imported when the command is known.
"""

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from design_lightning._names import did_you_mean

COMMANDS = {
    "fit": ("train a network", "design_lightning.commands.lightning"),
    "submit": ("hand a training to a SLURM cluster", "design_lightning.commands.submit"),
    "validate": ("measure a checkpoint on the validation images", "design_lightning.commands.lightning"),
    "test": ("measure a checkpoint on the test images, class by class", "design_lightning.commands.lightning"),
    "predict": ("write a CSV of path, label and probability for images", "design_lightning.commands.lightning"),
    "export": ("write a checkpoint as packed, ONNX and OpenVINO files", "design_lightning.commands.export"),
    "summary": ("show a network stage by stage: bits, operations, bytes", "design_lightning.commands.summary"),
    "sensitivity": ("measure what each layer loses by being binary", "design_lightning.commands.sensitivity"),
    "design": ("search for a threshold kernel on images", "design_lightning.commands.design"),
    "gallery": ("draw one image through every published kernel", "design_lightning.commands.gallery"),
    "benchmark": (
        "time training steps, or inference, beside the float network's",
        "design_lightning.commands.benchmark",
    ),
    "shard": ("pack images in folders into WebDataset shards", "design_lightning.commands.shard"),
    "plugins": ("list the plugins that are installed, and what they add", "design_lightning.commands.plugins"),
    "recipes": ("list the packaged configurations", "design_lightning.commands.recipes"),
}
"""From a command to its line of help and the module whose `main(command, args)` runs it."""

DEBUG = "DESIGN_TRAIN_DEBUG"

USERS_ERRORS = (ValueError, OSError, ImportError)
"""What this project raises for its user to mend."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command. Errors of the user's input end the process with one line and the code 1, wrong arguments with 2."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return
    if args[0] == "--version":
        from design_lightning import __version__

        print(f"design-train {__version__}")
        return
    command = args[0]
    if command not in COMMANDS:
        fail(f"unknown command {command!r}: {did_you_mean(command, COMMANDS)}", code=2)
    from design_lightning.commands.plugins import import_plugins

    try:
        if command != "plugins":  # which looks at what each of them adds
            import_plugins()
        importlib.import_module(COMMANDS[command][1]).main(command, args[1:])
    except USERS_ERRORS as error:
        own = users_error(error)
        if os.environ.get(DEBUG) or own is None:
            raise
        fail(" ".join(" ".join([str(own), *getattr(own, "__notes__", [])]).split()))


def fail(message: str, code: int = 1) -> NoReturn:
    """Prints one line on standard error and ends the process."""
    print(f"design-train: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, (line, _) in COMMANDS.items())
    return (
        "usage: design-train COMMAND [options]\n\n"
        "Binarize a timm network, train it, ship it as a 1-bit model.\n\n"
        f"commands:\n{commands}\n\n"
        "start here:    design-train fit --config quickstart\n"
        "a command's options:    design-train COMMAND --help\n"
        f"{DEBUG}=1 shows the traceback of an error"
    )


def users_error(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that this project raised, with a message made for the user; None if there is none.

    jsonargparse wraps what a constructor raises, and names it as the cause. Where this project wraps an error of its own, it says
    more: of which file it is. A file that Python itself could not open for this project is the user's to mend as well. An error
    from elsewhere keeps its traceback.
    """
    here = Path(__file__).resolve().parent
    homes = (here, here.parent / "callbacks")
    while error is not None:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, OSError) and error.filename is not None:
            while files and _is_pythons(files[-1]):
                files.pop()
        is_ours = files and any(files[-1].resolve().is_relative_to(home) for home in homes)
        if is_ours and isinstance(error, USERS_ERRORS):
            return error
        error = error.__cause__
    return None


def _is_pythons(file: Path) -> bool:
    """Whether a file belongs to the standard library."""
    return file.is_relative_to(sysconfig.get_path("stdlib")) and not {"site-packages", "dist-packages"} & set(
        file.parts
    )
