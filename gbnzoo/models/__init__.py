"""The paper's networks, one family a file. Importing this package registers them with timm."""

from gbnzoo.models.cifar_resnet import CifarResNet
from gbnzoo.models.mlp import Mlp

__all__ = ["CifarResNet", "Mlp"]
