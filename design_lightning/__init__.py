"""Binary neural networks in PyTorch: binarize any timm model in one call, train it with Lightning, ship it as 1-bit.

    import timm, design_lightning as dl
    model = timm.create_model("resnet18", num_classes=10)
    report = dl.binarize_(model, dl.BinaryConfig(kernel="2x2_v1"))
    print(report)

Importing this package imports neither torch nor Lightning; its names import their module on first use.
"""

from typing import TYPE_CHECKING

from design_lightning._lazy import lazy_attributes

if TYPE_CHECKING:
    from design_lightning import binary, data, export, kernels, models, surgery, training
    from design_lightning.binary import BinaryConv2d, BinaryLinear, DeSign, RSign, Sign, keep_for_backward_, register
    from design_lightning.export import convert_, export_model, load, open_exported, save
    from design_lightning.kernels import ThresholdKernel
    from design_lightning.surgery import BinarizationReport, BinaryConfig, binarize_, set_stage_, unbinarize_
    from design_lightning.training import DesignClassifier, DesignTrainer

__version__ = "0.1.0"

__all__ = [
    "BinarizationReport",
    "BinaryConfig",
    "BinaryConv2d",
    "BinaryLinear",
    "DeSign",
    "DesignClassifier",
    "DesignTrainer",
    "RSign",
    "Sign",
    "ThresholdKernel",
    "binarize_",
    "binary",
    "convert_",
    "data",
    "export",
    "export_model",
    "keep_for_backward_",
    "kernels",
    "load",
    "models",
    "open_exported",
    "register",
    "save",
    "set_stage_",
    "surgery",
    "training",
    "unbinarize_",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        **{name: f".{name}" for name in ("binary", "data", "export", "kernels", "models", "surgery", "training")},
        **dict.fromkeys(
            ("BinaryConv2d", "BinaryLinear", "DeSign", "RSign", "Sign", "keep_for_backward_", "register"), ".binary"
        ),
        **dict.fromkeys(("convert_", "export_model", "load", "open_exported", "save"), ".export"),
        "ThresholdKernel": ".kernels",
        **dict.fromkeys(("BinarizationReport", "BinaryConfig", "binarize_", "set_stage_", "unbinarize_"), ".surgery"),
        **dict.fromkeys(("DesignClassifier", "DesignTrainer"), ".training"),
    },
)
