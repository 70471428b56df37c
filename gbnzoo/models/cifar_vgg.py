"""VGG-16 for small images.

Hoffer et al. 2017 (arXiv 1705.08741) report a VGG on CIFAR-10 but released none. We chose the one most used there,
kuangliu/pytorch-cifar's: the thirteen convolutions of configuration D (Simonyan and Zisserman 2014, arXiv 1409.1556), each
followed by BatchNorm and ReLU, and one linear classifier on the 512 features left of a 32x32 image. All weights start as
torch's.
"""

from functools import partial

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import nn

from gbnzoo.models._base import Classifier, cifar10_cfg
from gbnzoo.norm import GhostBatchNorm2d
from gbnzoo.pretrained import register_model


class CifarVgg(Classifier):
    """Stages of 3x3 convolutions, each ended by 2x2 max pooling.

    Args:
        stages: channels of each convolution of each stage.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        ghost_batch_size: samples normalised together in training; None for the whole batch.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        ghost_batch_size: int | None = None,
    ):
        super().__init__()
        norm_layer = partial(GhostBatchNorm2d, ghost_batch_size=ghost_batch_size)
        self.in_chans = in_chans
        self.feature_info = []
        modules = []
        in_chs = in_chans
        for i, stage in enumerate(stages):
            layers = []
            for out_chs in stage:
                layers += [nn.Conv2d(in_chs, out_chs, 3, padding=1), norm_layer(out_chs), nn.ReLU(inplace=True)]
                in_chs = out_chs
            modules.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
            self.feature_info.append({"num_chs": in_chs, "reduction": 2 ** (i + 1), "module": f"stages.{i}"})
        self.stages = nn.Sequential(*modules)
        self.init_head(in_chs, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stages\.0", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)


default_cfgs = generate_default_cfgs({"cifar_vgg16_gbn": cifar10_cfg(pool_size=(1, 1), first_conv="stages.0.0")})


@register_model
def cifar_vgg16_gbn(pretrained: bool = False, **kwargs) -> CifarVgg:
    """VGG-16 with BatchNorm and a linear classifier, 14.7M parameters."""
    stages = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(
        CifarVgg, "cifar_vgg16_gbn", pretrained, feature_cfg=feature_cfg, stages=stages, **kwargs
    )
