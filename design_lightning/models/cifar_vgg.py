"""VGG-like networks of the literature on binary networks: `vgg_small` and `bnn_vgg`.

Three stages of two 3x3 convolutions each, 128-128-256-256-512-512 channels. A stage halves the image at its end, by a max
pool between the second convolution and its norm: so a binarizer behind the norm sees the maxima, not the maximum of bits.

    vgg_small   one linear layer, the classifier. Zhang et al., "LQ-Nets", ECCV 2018, arXiv:1807.10029; also of IR-Net
                (arXiv:1909.10788) and ReCU (arXiv:2103.12369).
    bnn_vgg     two linear layers of 1,024 and the classifier, each with a norm. Courbariaux et al., "Binarized Neural
                Networks", 2016, arXiv:1602.02830; also of DeSign (arXiv:2405.02220).
"""

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from design_lightning.models._common import cifar_cfg, scaled

GRID = 4


class CifarVGG(nn.Module):
    """Images [B, C, H, W], H and W multiples of 8, to logits [B, num_classes].

    Args:
        num_classes: of the classifier; 0 leaves it out.
        in_chans: C.
        width: factor of every layer's width.
        hidden: widths of the linear layers before the classifier.
        norm_logits: a batch norm behind the classifier, as in `bnn_vgg`.
        norm_affine: whether the batch norms learn a scale and a shift.
        act_layer: the activations, a class or a name that timm knows.
        global_pool: what comes between the last stage and the linear layers: `grid` takes its 4 x 4 pixels side by side
            (as they are with 32 x 32 images; averaged to 4 x 4 with larger ones), and the names of timm (`avg`, `max`, ...)
            one value a channel. An empty text takes all pixels as they are, and goes with num_classes=0 alone.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: if `width` is not positive, or nothing is pooled before a classifier.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: float = 1.0,
        hidden: tuple[int, ...] = (),
        norm_logits: bool = False,
        norm_affine: bool = True,
        act_layer: str | type[nn.Module] = nn.Hardtanh,
        global_pool: str = "grid",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        activation = get_act_layer(act_layer)
        channels = [scaled(c, width) for c in (128, 256, 512)]
        self.in_chans = in_chans
        self.num_features = channels[-1]
        self.norm_logits = norm_logits
        self.norm_affine = norm_affine
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stages = nn.Sequential(
            *(
                _stage(fan_in, c, activation, norm_affine)
                for fan_in, c in zip([in_chans, *channels[:-1]], channels, strict=True)
            )
        )
        self.feature_info = [
            {"num_chs": c, "reduction": 2 ** (i + 1), "module": f"stages.{i}"} for i, c in enumerate(channels)
        ]
        self.hidden_widths = [scaled(features, width) for features in hidden]
        self._activation = activation
        self._make_head(num_classes, global_pool)

    def _make_head(self, num_classes: int, global_pool: str) -> None:
        if not global_pool and num_classes:
            raise ValueError(
                f"global_pool='' leaves [B, C, H, W], but {num_classes} classes need a pool; use 'grid' or 'avg'"
            )
        self.num_classes = num_classes
        self.pool_type = global_pool
        pixels = GRID**2
        if global_pool == "grid":
            self.global_pool: nn.Module = nn.Sequential(
                OrderedDict(pool=nn.AdaptiveAvgPool2d(GRID), flatten=nn.Flatten(1))
            )
        else:
            select = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            self.global_pool = select
            pixels = select.feat_mult()
        features = self.num_features * pixels
        self.hidden = nn.Sequential()
        for i, out in enumerate(self.hidden_widths if global_pool else [], start=1):
            self.hidden.add_module(f"linear{i}", nn.Linear(features, out, bias=False))
            self.hidden.add_module(f"norm{i}", nn.BatchNorm1d(out, affine=self.norm_affine))
            self.hidden.add_module(f"act{i}", self._activation())
            features = out
        self.head_hidden_size = features
        self._make_classifier()

    def _make_classifier(self) -> None:
        if not self.num_classes:
            self.fc: nn.Module = nn.Identity()
            self.fc_norm: nn.Module = nn.Identity()
            return
        self.fc = nn.Linear(self.head_hidden_size, self.num_classes, bias=not self.norm_logits)
        self.fc_norm = nn.BatchNorm1d(self.num_classes, affine=self.norm_affine) if self.norm_logits else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of layers, for a learning rate that decays with the depth."""
        return {"stem": r"^stages\.0\.(conv1|norm1)", "blocks": r"^stages\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of so many classes; with another pool, new linear layers before it, too.

        Raises:
            ValueError: if `global_pool` is empty, and `num_classes` is not 0.
        """
        reference = next(self.parameters())
        if global_pool is None or global_pool == self.pool_type:
            if num_classes and not self.pool_type:
                self._make_head(num_classes, self.pool_type)  # which says why this cannot be
            self.num_classes = num_classes
            self._make_classifier()
        else:
            self._make_head(num_classes, global_pool)
        for made in (self.global_pool, self.hidden, self.fc, self.fc_norm):
            made.to(reference.device, reference.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the last stage's features [B, num_features, H / 8, W / 8]."""
        features: Tensor = self.stages(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the last stage's features to logits, or to what the classifier sees."""
        x = self.hidden(self.global_pool(x))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc_norm(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.forward_head(self.forward_features(x))


def _stage(fan_in: int, channels: int, activation: type[nn.Module], norm_affine: bool) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(fan_in, channels, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(channels, affine=norm_affine),
            act1=activation(),
            conv2=nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            pool=nn.MaxPool2d(2),
            norm2=nn.BatchNorm2d(channels, affine=norm_affine),
            act2=activation(),
        )
    )


default_cfgs = generate_default_cfgs(
    {name: cifar_cfg("stages.0.conv1", pool_size=(4, 4)) for name in ("vgg_small.untrained", "bnn_vgg.untrained")}
)


def _create(name: str, pretrained: bool, **arguments: Any) -> CifarVGG:
    feature_cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2)}
    model: CifarVGG = build_model_with_cfg(CifarVGG, name, pretrained, feature_cfg=feature_cfg, **arguments)
    return model


@register_model
def vgg_small(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-small: six convolutions and a classifier. Arguments as in `CifarVGG`; there are no pretrained weights."""
    return _create("vgg_small", pretrained, **kwargs)


@register_model
def bnn_vgg(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """The VGG-like network of the BNN and DeSign papers. Arguments as in `CifarVGG`; there are no pretrained weights."""
    return _create("bnn_vgg", pretrained, **{"hidden": (1024, 1024), "norm_logits": True, **kwargs})
