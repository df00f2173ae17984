"""The fenced blocks of Markdown pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `output` is the block of plain text that follows it at once, which a reader takes for what it prints."""

    page: str
    language: str
    text: str
    output: str = ""

    @property
    def first_line(self) -> str:
        return self.text.strip().splitlines()[0]


@dataclass(frozen=True)
class Command:
    """A line `$ ...` of a console block, and the lines below it."""

    page: str
    line: str
    output: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    name = page.relative_to(ROOT).as_posix()
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        if match["language"] == "text" and found and not text[end : match.start()].strip():
            last = found.pop()
            found.append(Block(name, last.language, last.text, match["text"]))
        else:
            found.append(Block(name, match["language"], match["text"]))
        end = match.end()
    return found


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page's console blocks."""
    for block in blocks_of(page):
        if block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                yield Command(block.page, line, output)


def shows(output: str, printed: str) -> bool:
    """Whether a page's output is what was printed: the same words in the same order, where `...` stands for any."""
    pattern = r"\s+".join(re.escape(word) for word in output.split())
    return re.search(pattern.replace(re.escape("..."), r"[\s\S]*?"), printed) is not None
