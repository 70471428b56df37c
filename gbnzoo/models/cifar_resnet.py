"""Residual networks for small images, with basic blocks that end in BatchNorm, addition, ReLU.

ResNet-20 to -110 and WRN-16-4 are built as in the code of Hoffer et al. 2017 (arXiv 1705.08741): unlike He et al.'s
CIFAR networks (arXiv 1512.03385) they cross from stage to stage with a 1x1 convolution and BatchNorm, and their WRN-16-4,
unlike Zagoruyko and Komodakis's (arXiv 1605.07146), has these blocks and a stem as wide as its first stage. Convolutions
start normal with variance 2 / (kernel area · output channels), classifiers as torch's.
"""

from functools import partial

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from timm.models.resnet import BasicBlock, downsample_avg, downsample_conv
from torch import nn

from gbnzoo.models._base import Classifier, cifar10_cfg, init_he_normal
from gbnzoo.norm import GhostBatchNorm2d
from gbnzoo.pretrained import register_model


class CifarResNet(Classifier):
    """A 3x3 stem without pooling, then stages of basic blocks; every stage but the first halves height and width.

    Args:
        blocks: basic blocks of each stage.
        channels: width of each stage; the stem is as wide as the first.
        avg_down: shortcuts between stages average 2x2 pixels before their 1x1 convolution, not skip three of four.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        ghost_batch_size: samples normalised together in training; None for the whole batch.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: tuple[int, ...] = (16, 32, 64),
        avg_down: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        ghost_batch_size: int | None = None,
    ):
        super().__init__()
        norm_layer = partial(GhostBatchNorm2d, ghost_batch_size=ghost_batch_size)
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = norm_layer(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": channels[0], "reduction": 1, "module": "act1"}]

        make_shortcut = downsample_avg if avg_down else downsample_conv
        stages = []
        for i, (depth, out_chs) in enumerate(zip(blocks, channels, strict=True)):
            in_chs = channels[max(i - 1, 0)]
            shortcut = make_shortcut(in_chs, out_chs, 1, stride=2, norm_layer=norm_layer) if i else None
            first = BasicBlock(in_chs, out_chs, stride=2 if i else 1, downsample=shortcut, norm_layer=norm_layer)
            others = [BasicBlock(out_chs, out_chs, norm_layer=norm_layer) for _ in range(depth - 1)]
            stages.append(nn.Sequential(first, *others))
            self.feature_info.append({"num_chs": out_chs, "reduction": 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.init_head(channels[-1], num_classes, global_pool, drop_rate)
        init_he_normal(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1|bn1", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.act1(self.bn1(self.conv1(x)))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)


default_cfgs = generate_default_cfgs(
    {
        # scikit-learn's digits.
        "resnet8_thin_gbn": cifar10_cfg(input_size=(1, 8, 8), pool_size=(2, 2), mean=(0.3066,), std=(0.3766,)),
        "resnet20_gbn": cifar10_cfg(),
        "resnet32_gbn": cifar10_cfg(),
        "resnet44_gbn": cifar10_cfg(),
        "resnet56_gbn": cifar10_cfg(),
        "resnet110_gbn": cifar10_cfg(),
        "wide_resnet16_4_gbn": cifar10_cfg(),
        "cifar_resnet18_gbn": cifar10_cfg(pool_size=(4, 4)),
    }
)


def _create(variant: str, pretrained: bool, blocks: tuple[int, ...], **kwargs) -> CifarResNet:
    feature_cfg = {"out_indices": tuple(range(len(blocks) + 1)), "flatten_sequential": True}
    return build_model_with_cfg(CifarResNet, variant, pretrained, feature_cfg=feature_cfg, blocks=blocks, **kwargs)


@register_model
def resnet8_thin_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """One block a stage of 8, 16 and 32 channels: the quickstart's network, for 8x8 grey digits."""
    return _create("resnet8_thin_gbn", pretrained, blocks=(1, 1, 1), channels=(8, 16, 32), **kwargs)


@register_model
def resnet20_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20 for CIFAR: 3 blocks a stage, 0.27M parameters."""
    return _create("resnet20_gbn", pretrained, blocks=(3, 3, 3), **kwargs)


@register_model
def resnet32_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32 for CIFAR: 5 blocks a stage, 0.47M parameters."""
    return _create("resnet32_gbn", pretrained, blocks=(5, 5, 5), **kwargs)


@register_model
def resnet44_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-44 for CIFAR, the paper's main network: 7 blocks a stage, 0.66M parameters."""
    return _create("resnet44_gbn", pretrained, blocks=(7, 7, 7), **kwargs)


@register_model
def resnet56_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56 for CIFAR: 9 blocks a stage, 0.86M parameters."""
    return _create("resnet56_gbn", pretrained, blocks=(9, 9, 9), **kwargs)


@register_model
def resnet110_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-110 for CIFAR: 18 blocks a stage, 1.7M parameters."""
    return _create("resnet110_gbn", pretrained, blocks=(18, 18, 18), **kwargs)


@register_model
def wide_resnet16_4_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """WRN-16-4 as Hoffer et al. built it: 2 blocks a stage of 64, 128 and 256 channels, 2.8M parameters."""
    return _create("wide_resnet16_4_gbn", pretrained, blocks=(2, 2, 2), channels=(64, 128, 256), **kwargs)


@register_model
def cifar_resnet18_gbn(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 with a CIFAR stem, as in the full-batch training of Geiping et al. 2021 (arXiv 2109.14119): 11.2M."""
    kwargs = {"blocks": (2, 2, 2, 2), "channels": (64, 128, 256, 512), "avg_down": True, **kwargs}
    return _create("cifar_resnet18_gbn", pretrained, **kwargs)
