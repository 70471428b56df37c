"""The paper's networks, one family a file, and the twins of timm's. Importing this package registers them with timm."""

from gbnzoo.models import variants  # noqa: F401
from gbnzoo.models.alexnet import AlexNet
from gbnzoo.models.cifar_resnet import CifarResNet
from gbnzoo.models.cifar_vgg import CifarVgg
from gbnzoo.models.mlp import Mlp
from gbnzoo.models.preact_resnet import PreActResNet
from gbnzoo.models.resnet9 import ResNet9

__all__ = ["AlexNet", "CifarResNet", "CifarVgg", "Mlp", "PreActResNet", "ResNet9"]
