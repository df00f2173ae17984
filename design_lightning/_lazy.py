"""Public names that import their module on first use, so that `import design_lightning` costs milliseconds (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_attributes(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose public names live in the modules that `homes` maps them to.

    Args:
        package: the package's `__name__`.
        homes: from a public name to its module, relative to the package (`.kernel`); the name of a submodule to itself.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name], package)
        return module if homes[name] == f".{name}" else getattr(module, name)

    return get, lambda: sorted(homes)
