"""What a binarized model remembers of its surgery: enough to do the same to another float network of its kind."""

from dataclasses import dataclass, field

from torch import nn

from design_lightning.surgery.config import BinaryConfig

_NAME = "_surgery"


@dataclass(frozen=True)
class SurgeryRecord:
    """How a model was binarized.

    Args:
        config: the configuration.
        input_shape: that of the probe's batch; None where no probing forward went through.
        shortcuts: from each layer with a shortcut of surgery's to the module behind which it ends.
    """

    config: BinaryConfig
    input_shape: tuple[int, ...] | None
    shortcuts: dict[str, str] = field(default_factory=dict)


def record_surgery(model: nn.Module, record: SurgeryRecord) -> None:
    """Leaves the record on the model, as a plain attribute."""
    model.__dict__[_NAME] = record


def forget_surgery(model: nn.Module) -> None:
    """Takes the record off the model."""
    model.__dict__.pop(_NAME, None)


def surgery_record(model: nn.Module) -> SurgeryRecord | None:
    """How a model was binarized; None if it was not, or as a part of a larger one."""
    record: SurgeryRecord | None = model.__dict__.get(_NAME)
    return record
