"""The keys of configuration files and where they stand, which the parsed values do not tell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

_NULL, _TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


@dataclass(frozen=True)
class Key:
    """A key of a YAML file.

    Args:
        file: which has it.
        line: from 1 on.
        position: of its first character, from 0 on.
        path: the names of the keys that it stands below, and its own at the end.
        value: its value as the file has it.
        home: a number of the mapping that it is of.
        kind: the `class_path` that it is an argument of; empty if of none.
    """

    file: Path
    line: int
    position: int
    path: tuple[str, ...]
    value: yaml.Node
    home: int
    kind: str = ""

    @property
    def section(self) -> str:
        """The names of the keys that it stands below, with dots."""
        return ".".join(self.path[:-1])


def files_of(args: Sequence[str]) -> list[Path]:
    """The configuration files of a command line."""
    paths = (Path(arg.rpartition("=")[2]) for arg in args if arg.endswith((".yaml", ".yml")))
    return [path for path in paths if path.is_file()]


def keys_of(path: Path) -> Iterator[Key]:
    """Every key of a file, in its order; none where the file is no YAML."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    if root is not None:
        yield from _below(path, root, (), "")


def _below(file: Path, node: yaml.Node, path: tuple[str, ...], kind: str) -> Iterator[Key]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _below(file, item, path, "")
    elif isinstance(node, yaml.MappingNode):
        named = next((value.value for key, value in node.value if key.value == "class_path"), "")
        for key, value in node.value:
            inner = (*path, str(key.value))
            yield Key(file, key.start_mark.line + 1, key.start_mark.index, inner, value, id(node), kind)
            yield from _below(file, value, inner, str(named) if key.value == "init_args" else "")


def check_keys(path: Path) -> None:
    """Refuses what the parser would pass over: a key that stands twice in one place, and a section that holds no keys.

    Raises:
        ValueError: with the file and the line.
    """
    first: dict[tuple[int, str], Key] = {}
    for key in keys_of(path):
        place, name = f"({path}, line {key.line})", key.path[-1]
        before = first.setdefault((key.home, name), key)
        if name != "<<" and before.position != key.position:  # the same one is seen again through an alias
            raise ValueError(f"{name!r} stands twice, in line {before.line} already: leave one of them out {place}")
        if not _may_be(key):
            is_list = isinstance(key.value, yaml.SequenceNode)
            found = "a list" if is_list else repr(key.value.value) if key.value.value else "empty"
            raise ValueError(f"{name} is {found}, where `key: value` pairs should stand {place}")


def _may_be(key: Key) -> bool:
    """Whether a value is of the kind that its key wants, as far as that is pairs or none."""
    tag, name = key.value.tag, key.path[-1]
    if isinstance(key.value, yaml.MappingNode):
        return True
    if name in ("trainer", "init_args"):
        return False
    if key.path in (("model",), ("data",)):
        return tag in (_TEXT, _NULL)
    if key.path in (("model", "init_args", "binary"), ("model", "binary")):
        return tag == _NULL or (tag == _TEXT and str(key.value.value).endswith((".yaml", ".yml")))
    return True
