"""The options of the commands that need neither Lightning nor a configuration."""

import argparse
import difflib
from typing import NoReturn

from design_lightning.cli import fail


class Options(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest option where one is unknown.

    Args:
        command: the command's name.
        description: its line of help.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"design-train {command}",
            description=description,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Ends the process with the message, and where to look."""
        word = message.partition("unrecognized arguments: ")[2].split()
        if word:
            name = word[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            message = f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
        fail(f"{message} (see: {self.prog} --help)", code=2)
