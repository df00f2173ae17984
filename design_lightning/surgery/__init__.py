"""Surgery: from a float network to a binary one, in place, with a report of every layer."""

from design_lightning.surgery.binarize import binarize_
from design_lightning.surgery.config import BinaryConfig
from design_lightning.surgery.float_layers import BINARY_TWINS
from design_lightning.surgery.probe import ProbeError, probe
from design_lightning.surgery.record import SurgeryRecord, surgery_record
from design_lightning.surgery.report import BinarizationReport, Row
from design_lightning.surgery.shortcuts import reattach_shortcuts_
from design_lightning.surgery.stages import binary_layers, set_stage_
from design_lightning.surgery.unbinarize import unbinarize_

__all__ = [
    "BINARY_TWINS",
    "BinarizationReport",
    "BinaryConfig",
    "ProbeError",
    "Row",
    "SurgeryRecord",
    "binarize_",
    "binary_layers",
    "probe",
    "reattach_shortcuts_",
    "set_stage_",
    "surgery_record",
    "unbinarize_",
]
