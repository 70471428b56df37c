"""AlexNets with BatchNorm after every layer, as in the code of Hoffer et al. 2017 (arXiv 1705.08741).

C1 and C3 of Keskar et al. 2016 (arXiv 1609.04836) are one shallow network with 10 or 100 classes; ImageNet's follows
Krizhevsky 2014, "One weird trick" (arXiv 1404.5997). All weights start as torch's.
"""

from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import nn

from gbnzoo.models._base import Classifier, cifar10_cfg
from gbnzoo.norm import GhostBatchNorm1d, GhostBatchNorm2d
from gbnzoo.pretrained import register_model


def fully_connected(in_features: int, out_features: int, norm_layer: partial) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features, bias=False)
    return nn.Sequential(linear, norm_layer(out_features), nn.ReLU(inplace=True))


class AlexNet(Classifier):
    """Convolutions, then fully connected hidden layers with dropout on the flattened feature map.

    Args:
        convs: for each convolution its channels, kernel size, stride, padding, and what follows it, in order: "p" for 3x3
            max pooling with stride 2, "n" for BatchNorm, "r" for ReLU.
        map_size: height and width of the feature map that is flattened; another is averaged to it.
        hidden: features of each fully connected layer.
        num_classes, in_chans: as in timm.
        global_pool: "" only; the hidden layers read every position of the map.
        drop_rate: dropout after each hidden layer, 0 <= drop_rate < 1.
        ghost_batch_size: samples normalised together in training; None for the whole batch.
    """

    pools = False

    def __init__(
        self,
        convs: tuple[tuple[int, int, int, int, str], ...],
        map_size: int,
        hidden: tuple[int, int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "",
        drop_rate: float = 0.5,
        ghost_batch_size: int | None = None,
    ):
        super().__init__()
        norm_2d = partial(GhostBatchNorm2d, ghost_batch_size=ghost_batch_size)
        self.in_chans = in_chans
        self.feature_info = []
        layers = []
        in_chs, reduction = in_chans, 1
        for i, (out_chs, kernel_size, stride, padding, rest) in enumerate(convs):
            parts = {"p": nn.MaxPool2d(3, stride=2), "n": norm_2d(out_chs), "r": nn.ReLU(inplace=True)}
            conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, bias=False)
            layers.append(nn.Sequential(conv, *(parts[letter] for letter in rest)))
            in_chs, reduction = out_chs, reduction * stride * (2 if "p" in rest else 1)
            self.feature_info.append({"num_chs": out_chs, "reduction": reduction, "module": f"features.{i}"})
        self.features = nn.Sequential(*layers)

        norm_1d = partial(GhostBatchNorm1d, ghost_batch_size=ghost_batch_size)
        self.hidden = nn.Sequential(
            nn.AdaptiveAvgPool2d(map_size),
            nn.Flatten(),
            *fully_connected(in_chs * map_size**2, hidden[0], norm_1d),
            nn.Dropout(drop_rate),
            *fully_connected(*hidden, norm_1d),
        )
        self.init_head(hidden[-1], num_classes, global_pool, drop_rate)
        self.num_features = in_chs

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        return {"stem": r"^features\.0", "blocks": [(r"^features\.(\d+)", None), (r"^hidden\.(\d+)", (99999,))]}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.features, x)
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(self.hidden(x), pre_logits=pre_logits)


default_cfgs = generate_default_cfgs(
    {
        "cifar_alexnet_gbn": cifar10_cfg(pool_size=(7, 7), first_conv="features.0.0"),
        "alexnet_owt_gbn": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (6, 6),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "features.0.0",
            "classifier": "head.fc",
            "license": "apache-2.0",
        },
    }
)


def _create(variant: str, pretrained: bool, convs: tuple, **kwargs) -> AlexNet:
    feature_cfg = {"out_indices": tuple(range(len(convs))), "flatten_sequential": True}
    return build_model_with_cfg(AlexNet, variant, pretrained, feature_cfg=feature_cfg, convs=convs, **kwargs)


@register_model
def cifar_alexnet_gbn(pretrained: bool = False, **kwargs) -> AlexNet:
    """C1 (10 classes) and C3 (100 classes): two 5x5 convolutions and two hidden layers, 1.4M parameters."""
    convs = ((64, 5, 1, 2, "pnr"), (64, 5, 1, 2, "pnr"))
    return _create("cifar_alexnet_gbn", pretrained, convs, map_size=7, hidden=(384, 192), **kwargs)


@register_model
def alexnet_owt_gbn(pretrained: bool = False, **kwargs) -> AlexNet:
    """One-weird-trick AlexNet for 224x224 images, 61.1M parameters; all but the first convolution normalise after ReLU."""
    convs = (
        (64, 11, 4, 2, "pnr"),
        (192, 5, 1, 2, "prn"),
        (384, 3, 1, 1, "rn"),
        (256, 3, 1, 1, "rn"),
        (256, 3, 1, 1, "prn"),
    )
    return _create("alexnet_owt_gbn", pretrained, convs, map_size=6, hidden=(4096, 4096), **kwargs)
