"""`MixupCutmix`: pairs of training images mixed, with soft labels."""

from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from design_lightning.training.losses import SquaredHinge


@dataclass(frozen=True)
class MixupCutmix:
    """Mixes each training image with another one of its batch, by timm: blended (mixup), or with a box of it (cutmix).

    One draw a batch, from numpy's generator. The last image of an odd batch stays as it is. The labels become soft, [B, K], and
    stay so (smoothed, if that is asked for) when mixing is off. Light augmentation is what published 1-bit recipes use; mixing
    serves long trainings.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412; Yun et al., "CutMix", ICCV 2019,
    arXiv:1905.04899.

    Args:
        mixup: alpha of the Beta distribution that the share of an image is drawn from; 0 leaves mixup out.
        cutmix: the same for cutmix.
        prob: the share of batches that are mixed.
        switch_prob: the share of cutmix among them, where both are on.
        label_smoothing: of the labels, mixed or not.
        off_epoch: the first epoch, counted from 0, without mixing; null mixes to the end.

    Raises:
        ValueError: if a value is out of range, or nothing would be mixed.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0
    off_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0 or self.mixup + self.cutmix == 0:
            raise ValueError(
                f"mixup is {self.mixup} and cutmix {self.cutmix}; give one of them an alpha above 0, such as mixup: 0.2, "
                "or leave mixing out"
            )
        if not 0 < self.prob <= 1:
            raise ValueError(f"prob is {self.prob}; it is the share of batches that are mixed, above 0 and at most 1")
        if not 0 <= self.switch_prob <= 1:
            raise ValueError(f"switch_prob is {self.switch_prob}; it is the share of cutmix, from 0 to 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        if self.off_epoch is not None and self.off_epoch < 1:
            raise ValueError(
                f"off_epoch is {self.off_epoch}, so nothing would be mixed; give 1 or more, or leave it out"
            )

    def check_loss(self, loss: nn.Module | None) -> None:
        """Refuses a loss that takes no soft labels, and two smoothings.

        Raises:
            ValueError: says which.
        """
        if isinstance(loss, SquaredHinge):
            raise ValueError(
                "mixing makes labels soft, and SquaredHinge takes whole ones; use CrossEntropyLoss, or no mixing"
            )
        smoothing = getattr(loss, "label_smoothing", 0.0)
        if smoothing and self.label_smoothing:
            raise ValueError(
                f"the loss has label_smoothing {smoothing} and mixing has {self.label_smoothing}; set one of the two"
            )

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W], mixed, and soft labels [B, K], of images and labels [B], which stay as they are."""
        targets: Tensor = mixup_target(labels, num_classes, smoothing=self.label_smoothing)
        even = len(images) - len(images) % 2
        if not even or (self.off_epoch is not None and epoch >= self.off_epoch):
            return images, targets
        mix = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.prob,
            switch_prob=self.switch_prob,
            label_smoothing=self.label_smoothing,
            num_classes=num_classes,
        )
        mixed, mixed_targets = mix(images[:even].clone(), labels[:even])  # timm mixes in place
        return torch.cat([mixed, images[even:]]), torch.cat([mixed_targets, targets[even:]])
