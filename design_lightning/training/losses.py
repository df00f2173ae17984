"""Losses of binary networks beside `torch.nn.CrossEntropyLoss`, whose `label_smoothing` covers smoothing."""

import torch.nn.functional as F
from torch import Tensor, nn


class SquaredHinge(nn.Module):
    """The squared hinge loss of one class against the rest.

        loss = mean over images and classes of max(0, margin - t * logit)^2,  t = +1 for the image's class, -1 for others

    Courbariaux et al., "Binarized Neural Networks", 2016, arXiv:1602.02830; the paper of DeSign trains its VGG with it.

    Args:
        margin: how far on the right side a logit costs nothing.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-dim, of logits [B, K] and labels [B]."""
        signs = 2 * F.one_hot(labels, logits.shape[-1]).to(logits.dtype) - 1
        return (self.margin - signs * logits).clamp_min(0).square().mean()
