"""Binarized networks as files, and back."""

from typing import TYPE_CHECKING

from design_lightning._lazy import lazy_attributes

if TYPE_CHECKING:
    from design_lightning.export.about import About
    from design_lightning.export.checkpoint import load, save
    from design_lightning.export.conversion import Conversion, convert_
    from design_lightning.export.formats import FORMATS, export_model
    from design_lightning.export.report import Exported, Exports
    from design_lightning.export.runtime import ExportedNetwork, open_exported
    from design_lightning.export.verification import Agreement, DisagreementError

__all__ = [
    "FORMATS",
    "About",
    "Agreement",
    "Conversion",
    "DisagreementError",
    "Exported",
    "ExportedNetwork",
    "Exports",
    "convert_",
    "export_model",
    "load",
    "open_exported",
    "save",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "About": ".about",
        **dict.fromkeys(("load", "save"), ".checkpoint"),
        **dict.fromkeys(("Conversion", "convert_"), ".conversion"),
        **dict.fromkeys(("FORMATS", "export_model"), ".formats"),
        **dict.fromkeys(("Exported", "Exports"), ".report"),
        **dict.fromkeys(("ExportedNetwork", "open_exported"), ".runtime"),
        **dict.fromkeys(("Agreement", "DisagreementError"), ".verification"),
    },
)
