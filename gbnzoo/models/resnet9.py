"""ResNet-9, David Page's network for DAWNBench (myrtle.ai, "How to train your ResNet", 2018; davidcpage/cifar10-fast).

Unlike the source its classifier has a bias, as every head in timm. All weights start as torch's.
"""

from functools import partial

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import nn

from gbnzoo.models._base import Classifier, cifar10_cfg
from gbnzoo.norm import GhostBatchNorm2d
from gbnzoo.pretrained import register_model


class Residual(nn.Module):
    """Two units of convolution, BatchNorm and ReLU, added to their input; no ReLU follows the sum."""

    def __init__(self, channels: int, norm_layer: partial):
        super().__init__()
        self.res1 = conv_bn(channels, channels, norm_layer)
        self.res2 = conv_bn(channels, channels, norm_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.res2(self.res1(x))


def conv_bn(in_chs: int, out_chs: int, norm_layer: partial) -> nn.Sequential:
    conv = nn.Conv2d(in_chs, out_chs, 3, padding=1, bias=False)
    return nn.Sequential(conv, norm_layer(out_chs), nn.ReLU(inplace=True))


class ResNet9(Classifier):
    """A stem and three layers that double the width and halve height and width; the first and last carry a residual.

    Args:
        channels: width of the stem and of each layer.
        logit_scale: factor on the features before the classifier.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        ghost_batch_size: samples normalised together in training; None for the whole batch.
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int] = (64, 128, 256, 512),
        logit_scale: float = 0.125,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "max",
        drop_rate: float = 0.0,
        ghost_batch_size: int | None = None,
    ):
        super().__init__()
        norm_layer = partial(GhostBatchNorm2d, ghost_batch_size=ghost_batch_size)
        self.in_chans = in_chans
        self.logit_scale = logit_scale
        prep, first, second, third = channels
        self.layers = nn.Sequential(
            conv_bn(in_chans, prep, norm_layer),
            nn.Sequential(*conv_bn(prep, first, norm_layer), nn.MaxPool2d(2), Residual(first, norm_layer)),
            nn.Sequential(*conv_bn(first, second, norm_layer), nn.MaxPool2d(2)),
            nn.Sequential(*conv_bn(second, third, norm_layer), nn.MaxPool2d(2), Residual(third, norm_layer)),
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"layers.{i}"} for i, width in enumerate(channels)
        ]
        self.init_head(third, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^layers\.0", "blocks": r"^layers\.(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.layers, x)
        return self.layers(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x * self.logit_scale, pre_logits=pre_logits)


default_cfgs = generate_default_cfgs({"resnet9_gbn": cifar10_cfg(pool_size=(4, 4), first_conv="layers.0.0")})


@register_model
def resnet9_gbn(pretrained: bool = False, **kwargs) -> ResNet9:
    """ResNet-9 of 64 to 512 channels, 6.6M parameters."""
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(ResNet9, "resnet9_gbn", pretrained, feature_cfg=feature_cfg, **kwargs)
