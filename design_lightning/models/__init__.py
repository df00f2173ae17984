"""The papers' networks that timm lacks. Importing this package registers them, so that `timm.create_model` finds them.

>>> import timm
>>> import design_lightning.models
>>> timm.create_model("vgg_small", num_classes=10).num_classes
10

All are float networks; `design_lightning.binarize_` makes them binary. No trained weights are published for them.
"""

from design_lightning.models.cifar_resnet import CifarResNet, resnet18_cifar, resnet20_cifar
from design_lightning.models.cifar_vgg import CifarVGG, bnn_vgg, vgg_small

__all__ = ["CifarResNet", "CifarVGG", "bnn_vgg", "resnet18_cifar", "resnet20_cifar", "vgg_small"]
