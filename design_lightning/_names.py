"""What messages name: from a name in a configuration to the thing, from a wrong name to the nearest right one, errors in a line."""

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str], show_all_below: int = 30) -> str:
    """The end of an error message: the nearest known names, or all of them where they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    if len(known) <= show_all_below:
        return f"known are {', '.join(known)}"
    return "no known name is near it"


def in_a_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """All classes that derive from a class and are loaded, those of a class before its next sibling."""
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def class_by_name(name: str, known: Mapping[str, type[T]], base: type[T], kind: str) -> type[T]:
    """The class that a configuration names: a key of `known`, or the dotted path of a subclass of `base`.

    Raises:
        ValueError: if the name is neither; names the nearest known ones.
    """
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(f"unknown {kind} {name!r}: {did_you_mean(name, known)} (or give the dotted path of a class)")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{kind} {name!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found
