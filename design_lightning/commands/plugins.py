"""Plugins: packages that register a module under the entry-point group `design_lightning.plugins`.

Importing the module is all that happens: it defines callbacks, kernels, estimators or data modules, which configurations
then find by name. A plugin that fails to import is named, and does not stop the rest.
"""

import importlib.metadata
import warnings

GROUP = "design_lightning.plugins"


def import_plugins() -> list[str]:
    """Imports every plugin, and returns the names of those that worked."""
    worked = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever a foreign module may raise
            warnings.warn(
                f"plugin {entry.name!r} ({entry.value}) is left out: {type(error).__name__}: {error}", stacklevel=2
            )
        else:
            worked.append(entry.name)
    return worked
