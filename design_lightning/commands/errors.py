"""From jsonargparse's messages to one line: what is wrong, the nearest right name, and where it stands."""

import dataclasses
import difflib
import inspect
import re
import shlex
from collections.abc import Sequence
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from design_lightning._names import did_you_mean, subclasses
from design_lightning.cli import USERS_ERRORS
from design_lightning.commands.recipes import recipes
from design_lightning.commands.yaml_files import Key, files_of, keys_of
from design_lightning.surgery import BinaryConfig

_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_OPTION = re.compile(r"(?:Option|Key|Group|key|accept option) '([\w.]+)'")
_REQUIREMENT = re.compile(r"Requirement '(([\w-]+)[^']*)' not met")
_NEITHER = re.compile(r"Neither `(tensorboard)` nor")
_PROBLEM = re.compile(r"Problem with given class_path '([\w.]+)'")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_AMBIGUOUS = re.compile(r"Multiple subclasses with name (\w+)\..*? ambiguity: (.+?)\.?\n")
_MISSING = re.compile(r"required: (.+)")
_SECTIONS = ("trainer", "model", "data", "config", "seed_everything", "ckpt_path")
_UNRECOGNIZED = re.compile(r"[Uu]nrecognized arguments: (.+)")
_EXPECTED = re.compile(r"Expected an? (?:<class '([\w.]+)'>|([\w\[\], .]+?))(?:\.|\n|$)")
_CHOICE = re.compile(r"Expected a typing\.Literal\[([^\]]+)\]")
_VALUE = re.compile(r"(?:Given value|Got value): (.*)")


def explain(message: str, args: Sequence[str], options: Sequence[str] = ()) -> str:
    """One line for a person.

    Args:
        message: what jsonargparse says.
        args: the command line, in which and in whose configurations the wrong word is looked up.
        options: those that the command has by itself.
    """
    key = _last(_KEY.findall(message))
    if message.startswith("Unexpected config"):
        wrong = (
            path for path in files_of(args) if not isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
        )
        return f"{next(wrong, 'the configuration')} holds no `key: value`; see a recipe for how one looks"
    if message.startswith("Problems parsing config"):
        return _not_yaml(args) or " ".join(message.split())
    if found := _AMBIGUOUS.search(message):
        name, classes = found.group(1), found.group(2).replace(", ", " or ")
        return f"{_full_key(key, args)}several classes are called {name!r}: write {classes}{_where(name, args)}"
    if found := _MISSING.search(message):
        names = [name.rpartition(".")[2] for name in found.group(1).split(", ")]
        missing = ", ".join(names)
        if not set(names) <= set(_SECTIONS):
            return f"{_full_key(key, args)}{missing} is missing: a class that you chose needs it among its init_args"
        return f"no {missing} given: start from a recipe with --config NAME; design-train recipes lists them"
    if found := _UNKNOWN_OPTION.search(message):
        return _unknown_option(found.group(1), args, options)
    if found := _UNRECOGNIZED.search(message):
        word = found.group(1).split()[0]
        if not word.startswith("-"):
            hint = f": did you mean --config {word}?" if word in recipes() else ""
            return f"unexpected {word!r}{hint}"
        return _unknown_option(word.lstrip("-").partition("=")[0], args, options)
    if found := _NO_MODULE.search(message):
        return f"{_full_key(key, args)}cannot import {found.group(1)!r}; is its folder on PYTHONPATH?"
    kinds = dict.fromkeys(a or b for a, b in _EXPECTED.findall(message))
    kinds = {kind: None for kind in kinds if kind != "NoneType" and not kind.startswith(("path but", "typing"))}
    names = _UNKNOWN_CLASS.findall(message)
    is_number = {"float", "int", "bool"} & kinds.keys()
    if names and (not is_number or difflib.get_close_matches(_last(names), _class_names(), n=1, cutoff=0.8)):
        name = _last(names)
        near = did_you_mean(name, _class_names(), show_all_below=0)
        return f"{_full_key(key, args)}unknown class {name!r}: {near}{_where(name, args)}"
    value = _last(_VALUE.findall(message)).strip()
    if value and not value.startswith("Namespace("):
        if choices := _CHOICE.search(message):
            options = [str(choice) for choice in yaml.safe_load(f"[{choices.group(1)}]")]
            if value.startswith("["):  # a list: which of them
                value = next((str(item) for item in yaml.safe_load(value) if str(item) not in options), value)
            if nearest := difflib.get_close_matches(value, options, n=1):
                return f"{_full_key(key, args)}{value!r}: did you mean {nearest[0]!r}?{_where(value, args)}"
            others = f", nor {' or '.join(kinds)}" if kinds else ""
            return f"{_full_key(key, args)}{value!r} is none of {choices.group(1)}{others}{_where(value, args)}"
        if kinds:
            return f"{_full_key(key, args)}expected {' or '.join(kinds)}, not {value!r}{_where(value, args)}"
    text = " ".join(message.split())
    return text if len(text) <= 240 else f"{text[:160]} ... {text[-80:]}"


def why_not_built(error: BaseException, args: Sequence[str]) -> str:
    """One line on a class of a configuration whose constructor refused; empty if it is not the user's to mend.

    Args:
        error: what jsonargparse raised.
        args: as of `explain`.
    """
    name = _last(_PROBLEM.findall(str(error))).rpartition(".")[2]
    while error.__cause__ is not None:
        error = error.__cause__
    if not name or not isinstance(error, (*USERS_ERRORS, MisconfigurationException)):
        return ""
    text = " ".join(str(error).split())
    if found := _REQUIREMENT.search(text) or _NEITHER.search(text):
        package, module = found.group(1), found.groups()[-1]
        text = f"{module} is not installed: pip install {shlex.quote(package)}"
    return f"{name}: {text}{_where(name, args)}"


def _not_yaml(args: Sequence[str]) -> str:
    for path in files_of(args):
        text = path.read_text(encoding="utf-8")
        try:
            yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            return f"{path}{place}: not YAML: {error.problem}"
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            return f"{path}, line {line}: not YAML: {error.reason}"
    return ""


def _last(found: Sequence[str]) -> str:
    return found[-1] if found else ""


def _unknown_option(name: str, args: Sequence[str], options: Sequence[str]) -> str:
    given = _as_given(name, args)
    section, _, leaf = given.rpartition(".")
    key = None if any(arg.startswith(f"--{given}") for arg in args) else _key_of(leaf, args)
    place = f" ({key.file}, line {key.line})" if key else ""
    section, kind = (key.section, _class_of(key, args)) if key and not section else (section, "")
    if given.partition(".")[0] not in _SECTIONS and "." in given:
        near, leaf = difflib.get_close_matches(given.partition(".")[0], _SECTIONS, n=1), given.partition(".")[0]
        hint = f": did you mean {near[0]!r}?" if near else ""
    elif section == "trainer" or section.endswith("binary") or kind:
        hint = f": {did_you_mean(leaf, _option_names(section, kind))}"
    elif leaf in (known := _option_names(section)):
        return f"{given!r} is no argument of the class chosen there{place}"
    else:
        of_command = [] if section else difflib.get_close_matches(leaf, options, n=3, cutoff=0.6)
        near = of_command or difflib.get_close_matches(leaf, known, n=3, cutoff=0.6)
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown option {given!r}{hint}{place}"


def _key_of(leaf: str, args: Sequence[str]) -> Key | None:
    """The key of that name in the configurations, of which the last one counts; one that is in its place is another."""
    keys = [key for path in reversed(files_of(args)) for key in keys_of(path) if key.path[-1] == leaf]
    wrong = (key for key in keys if leaf not in _option_names(key.section, _class_of(key, args)))
    return next(wrong, keys[0] if keys else None)


def _class_of(key: Key, args: Sequence[str]) -> str:
    """The `class_path` that a key is an argument of, which may stand in an earlier file; empty if it is of none."""
    named = (*key.path[:-2], "class_path")
    given = (each for path in reversed(files_of(args)) for each in keys_of(path) if each.path == named)
    is_one = key.path[-2:-1] == ("init_args",) and len(key.path) <= 4  # not of a list, whose items have one path
    return key.kind or next((str(each.value.value) for each in given if is_one), "")


def _as_given(name: str, args: Sequence[str]) -> str:
    """The option as the command line spells it, with what stands before its last part."""
    for arg in args:
        option = arg.lstrip("-").partition("=")[0].rstrip("+")
        if arg.startswith("-") and (option == name or option.endswith(f".{name}")):
            return option
    return name


def _full_key(key: str, args: Sequence[str]) -> str:
    return f"{_as_given(key, args)}: " if key else ""


def _where(word: str, args: Sequence[str]) -> str:
    """` (FILE, line N)` for a word that stands in a configuration rather than on the command line."""
    whole = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    if any(whole.search(arg) for arg in args if not arg.endswith((".yaml", ".yml"))):
        return ""
    pattern = re.compile(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])")
    for path in reversed(files_of(args)):  # the last one counts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line.partition("#")[0]):
                return f" ({path}, line {number})"
    return ""


def place_of(message: str, args: Sequence[str]) -> str:
    """`(FILE, line N)` of the value, or else the key, that a message of this project is about; empty if in no file."""
    words = [*re.findall(r"'([^']+)'", message), *re.findall(r"^(?:\w+\.)*(\w+)(?:=| is | must )", message)]
    return next((place.strip() for word in words if (place := _where(word, args))), "")


def _class_names() -> set[str]:
    """The classes that a configuration may name."""
    roots = (
        Callback,
        LightningDataModule,
        LightningModule,
        Logger,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
        torch.nn.modules.loss._Loss,
    )
    return {kind.__name__ for root in roots for kind in subclasses(root) if not kind.__name__.startswith("_")}


def _option_names(section: str, kind: str = "") -> set[str]:
    """The arguments of a section: of the trainer, of `BinaryConfig`, of a class, or else of all classes that are loaded."""
    binary = {field.name for field in dataclasses.fields(BinaryConfig)}
    trainer = set(inspect.signature(Trainer).parameters)
    if section.endswith("binary"):
        return binary
    if section == "trainer":
        return trainer
    roots = (
        LightningDataModule,
        LightningModule,
        Callback,
        Logger,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
    )
    kinds = [kind for root in roots for kind in subclasses(root)]
    if chosen := [each for each in kinds if kind and each.__name__ == kind.rpartition(".")[2]]:
        return _arguments(chosen[0])
    names = {name for each in kinds for name in inspect.signature(cast(Any, each)).parameters}
    return (names | binary | trainer | {*_SECTIONS, "class_path", "init_args"}) - {"args", "kwargs"}


def _arguments(kind: type[Any]) -> set[str]:
    """Those of a class that a configuration may give, with those of its base where it passes on what else comes."""
    found: dict[str, inspect.Parameter] = {}
    for each in (each for each in kind.__mro__ if "__init__" in vars(each)):
        parameters = inspect.signature(vars(each)["__init__"]).parameters
        found |= parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return set(found) - {"self", "args", "kwargs", "params", "optimizer"}
