"""Binarized networks as files, and back."""

from design_lightning.export.checkpoint import load, save

__all__ = ["load", "save"]
