"""ResNets for small images: `resnet20_cifar` and `resnet18_cifar`.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385: a stem of one 3x3 convolution without
a pool, and stages of basic blocks. By default every 3x3 convolution has a real-valued shortcut of its own (Liu et al.,
"Bi-Real Net", ECCV 2018, arXiv:1808.00278), which carries what the bits lose.
"""

from typing import Any, Literal, get_args

import torch.nn.functional as F
from timm.layers import create_classifier, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from design_lightning.models._common import cifar_cfg, scaled

Shortcut = Literal["conv", "avg", "pad"]


class CifarResNet(nn.Module):
    """Images [B, C, H, W] to logits [B, num_classes].

    Args:
        blocks: how many basic blocks each stage has; every stage but the first halves the image.
        channels: of each stage.
        num_classes: of the classifier; 0 leaves it out.
        in_chans: C.
        width: factor of the channels.
        double_shortcut: a shortcut around each 3x3 convolution; else one around each block of two.
        shortcut: where the channels change: `conv`, a strided 1x1 convolution and a norm; `avg`, an average pool, a 1x1
            convolution and a norm; `pad`, every second pixel and channels of zeros, without parameters.
        norm_affine: whether the batch norms learn a scale and a shift.
        act_layer: the activations, a class or a name that timm knows.
        global_pool: as in timm; an empty text goes with num_classes=0 alone.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: if `width` is not positive, or the shortcut is unknown.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: tuple[int, ...],
        num_classes: int = 10,
        in_chans: int = 3,
        width: float = 1.0,
        double_shortcut: bool = True,
        shortcut: Shortcut = "conv",
        norm_affine: bool = True,
        act_layer: str | type[nn.Module] = nn.Hardtanh,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise ValueError(f"unknown shortcut {shortcut!r}: use one of {', '.join(get_args(Shortcut))}")
        activation = get_act_layer(act_layer)
        widths = [scaled(c, width) for c in channels]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0], affine=norm_affine)
        self.act1 = activation()
        self.feature_info = [{"num_chs": widths[0], "reduction": 1, "module": "act1"}]
        fan_in = widths[0]
        for i, (count, out) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if block == 0 and i > 0 else 1
                stage.append(BasicBlock(fan_in, out, stride, activation, double_shortcut, shortcut, norm_affine))
                fan_in = out
            self.add_module(f"layer{i + 1}", stage)
            self.feature_info.append({"num_chs": out, "reduction": 2**i, "module": f"layer{i + 1}"})
        self._stages = [f"layer{i + 1}" for i in range(len(blocks))]
        self.num_features = fan_in
        self.global_pool, self.fc = create_classifier(fan_in, num_classes, pool_type=global_pool)
        self.head_hidden_size = fan_in * self.global_pool.feat_mult()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of layers, for a learning rate that decays with the depth."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of so many classes, behind another pool if one is given."""
        reference = next(self.parameters())
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        for made in (self.global_pool, self.fc):
            made.to(reference.device, reference.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the last stage's features, [B, num_features, H / 4, W / 4] with three stages."""
        x = self.act1(self.bn1(self.conv1(x)))
        for name in self._stages:
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """From the last stage's features to logits, or to what the classifier sees."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.forward_head(self.forward_features(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms, and one shortcut around both or one around each. Arguments as in `CifarResNet`."""

    def __init__(
        self,
        fan_in: int,
        channels: int,
        stride: int,
        activation: type[nn.Module],
        double_shortcut: bool,
        shortcut: Shortcut,
        norm_affine: bool,
    ) -> None:
        super().__init__()
        self.double_shortcut = double_shortcut
        self.conv1 = nn.Conv2d(fan_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, affine=norm_affine)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, affine=norm_affine)
        self.act2 = activation()
        changes = stride != 1 or fan_in != channels
        self.downsample: nn.Module = (
            _downsample(fan_in, channels, stride, shortcut, norm_affine) if changes else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shortcut = self.downsample(x)
        x = self.bn1(self.conv1(x))
        if self.double_shortcut:
            x = shortcut = self.act1(x + shortcut)
        else:
            x = self.act1(x)
        y: Tensor = self.act2(self.bn2(self.conv2(x)) + shortcut)
        return y


class PadShortcut(nn.Module):
    """The shortcut without parameters (option A of He et al.): every `stride`-th pixel, and zeros for the new channels.

    Half of the zeros come before the channels and half behind, so that a stream keeps its middle.
    """

    def __init__(self, fan_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (channels - fan_in) // 2
        self.behind = channels - fan_in - self.before

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))

    def extra_repr(self) -> str:  # noqa: D102
        return f"stride={self.stride}, channels=+{self.before + self.behind}"


def _downsample(fan_in: int, channels: int, stride: int, shortcut: Shortcut, norm_affine: bool) -> nn.Module:
    if shortcut == "pad":
        return PadShortcut(fan_in, channels, stride)
    if shortcut == "avg" and stride > 1:
        # With odd sizes the last window hangs over the border, and averages what is inside.
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(
            pool, nn.Conv2d(fan_in, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=norm_affine)
        )
    return nn.Sequential(
        nn.Conv2d(fan_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels, affine=norm_affine)
    )


default_cfgs = generate_default_cfgs(
    {
        "resnet20_cifar.untrained": cifar_cfg("conv1", pool_size=(8, 8)),
        "resnet18_cifar.untrained": cifar_cfg("conv1", pool_size=(4, 4)),
    }
)


def _create(name: str, pretrained: bool, **arguments: Any) -> CifarResNet:
    feature_cfg = {"out_indices": tuple(range(len(arguments["blocks"]) + 1))}
    model: CifarResNet = build_model_with_cfg(CifarResNet, name, pretrained, feature_cfg=feature_cfg, **arguments)
    return model


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 16-32-64 channels, three blocks each. Arguments as in `CifarResNet`; there are no pretrained weights.

    Its shortcuts have no parameters by default (`pad`), as in section 4.2 of the paper.
    """
    return _create(
        "resnet20_cifar", pretrained, **{"blocks": (3, 3, 3), "channels": (16, 32, 64), "shortcut": "pad", **kwargs}
    )


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a stem for 32 x 32 pixels. Arguments as in `CifarResNet`; there are no pretrained weights."""
    return _create("resnet18_cifar", pretrained, **{"blocks": (2, 2, 2, 2), "channels": (64, 128, 256, 512), **kwargs})
