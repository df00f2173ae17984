"""An exported file in the place of a model: `design-train validate | test | predict --ckpt_path model.onnx`."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from design_lightning.export import open_exported
from design_lightning.training.batch_checks import check_floats
from design_lightning.training.image_classifier import ImageClassifier


class ExportedClassifier(ImageClassifier):
    """Validates, tests and predicts with a file of `design-train export`, in the file's own engine, on the CPU.

    Args:
        path: `.onnx`, OpenVINO's `.xml`, or `.safetensors`.
        num_classes: K; comes from the data if there is one, or else from the file's labels.
        input_size: (C, H, W) of the images; comes from the data if there is one.
        class_names: one for each class; the file's, or else the data's.
        mean: by which the data normalises its images. A warning says if the file was trained with another.
        std: the same.

    Raises:
        ValueError: if the file is none of this project's, takes images of another size, or has another number of labels.
    """

    def __init__(
        self,
        path: str,
        num_classes: int | None = None,
        input_size: tuple[int, int, int] | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        network = open_exported(path)
        labels = network.about.labels
        if num_classes is None:
            if labels is None:
                raise ValueError(
                    f"neither the data nor {Path(path).name} says how many classes there are: set num_classes"
                )
            num_classes = len(labels)
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f"{Path(path).name} knows {len(labels)} labels, but the data has {num_classes} classes")
        if input_size is not None and network.input_shape not in (None, tuple(input_size)):
            raise ValueError(
                f"{Path(path).name} takes images of {list(network.input_shape or ())}, but those of the data are "
                f"{list(input_size)}: set --data.image_size"
            )
        for name, ours, theirs in (("mean", network.about.mean, mean), ("std", network.about.std, std)):
            if ours is not None and theirs is not None and list(ours) != list(theirs):
                rank_zero_warn(
                    f"the data normalises by {name} {list(theirs)}, but {Path(path).name} was trained with {list(ours)}"
                )
        super().__init__(num_classes, labels or class_names, nn.CrossEntropyLoss())
        self._network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        check_floats(images)
        return self._network(images.detach().float().cpu()).to(images.device)
