"""What mkdocstrings does to docstrings before it shows them: an example becomes a block of code, brackets stay brackets."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *\n).+)*", re.MULTILINE)


class Examples(griffe.Extension):
    """Fences doctests, which Markdown would take for quotations, and keeps `[...][L]` from being read as a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of each object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring's text with its doctests fenced and its adjoining brackets escaped."""
    parts = re.split(r"(`[^`\n]*`|^ *>>> .*(?:\n(?! *\n).+)*)", text, flags=re.MULTILINE)
    escaped = "".join(part if i % 2 else part.replace("][", r"]\[") for i, part in enumerate(parts))
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", escaped)
