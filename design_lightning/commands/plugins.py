"""Plugins: packages that register a module under the entry-point group `design_lightning.plugins`.

Importing the module is all that happens: it defines callbacks, data modules or networks and registers kernels, estimators and
the like (`dl.register`), which configurations then find by name. A plugin that fails to import is named, and does not stop the
rest. `design-train plugins` lists them; examples/plugin is one.
"""

import importlib.metadata
import warnings
from collections.abc import Sequence

from design_lightning._names import in_a_line, subclasses

GROUP = "design_lightning.plugins"


def import_plugins() -> list[str]:
    """Imports every plugin, and returns the names of those that worked."""
    worked = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        if error := _failure(entry):
            warnings.warn(f"plugin {entry.name!r} ({entry.value}) is left out: {error}", stacklevel=2)
        else:
            worked.append(entry.name)
    return worked


def main(command: str, args: Sequence[str]) -> None:
    """Prints every plugin, its package and what it added; ends with 1 if one is broken."""
    from design_lightning.commands.options import Options

    Options(command, "Lists the plugins that are installed, and what each adds.").parse_args(args)
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    broken = 0
    entries = importlib.metadata.entry_points(group=GROUP)
    for entry in entries:
        before = _names()
        error = _failure(entry)
        broken += bool(error)
        added = {kind: sorted(names - before[kind]) for kind, names in _names().items()}
        lines = [f"{kind}: {', '.join(names)}" for kind, names in added.items() if names]
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package of unknown name"
        console.print(Text(f"{entry.name}  {package}, module {entry.value}", style="bold"))
        text = Text(f"broken: {error}", style="red") if error else Text("\n".join(lines) or "adds nothing by a name")
        console.print(Padding(text, (0, 0, 0, 2), expand=False))
    if not entries:
        print(f"no plugin is installed; one is a package with an entry point in the group {GROUP}")
    if broken:
        raise SystemExit(1)


def _failure(entry: importlib.metadata.EntryPoint) -> str:
    """Imports a plugin; what went wrong, if something did."""
    try:
        entry.load()
    except Exception as error:  # whatever a foreign module may raise
        return in_a_line(error)
    return ""


def _names() -> dict[str, set[str]]:
    """What configurations may name just now, by kind."""
    import timm
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    from design_lightning.binary.registry import REGISTRIES
    from design_lightning.commands.lightning import import_classes

    import_classes()
    classes = {"callback": Callback, "data": LightningDataModule, "model": LightningModule}
    return {
        **{field: set(known) for field, (_, known) in REGISTRIES.items()},
        **{kind: {found.__name__ for found in subclasses(base)} for kind, base in classes.items()},
        "backbone": set(timm.list_models()),
    }
