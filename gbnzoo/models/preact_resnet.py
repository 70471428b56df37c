"""Pre-activation residual networks for small images: BatchNorm and ReLU come before each convolution.

WRN-28-10 as in Zagoruyko and Komodakis 2016 (arXiv 1605.07146), without their optional dropout between convolutions;
ResNet-20 as in He et al. 2016 (arXiv 1603.05027). Both start each stage by normalising before the paths part. Convolutions
start normal with variance 2 / (kernel area · channels): input channels for the former, output channels for the latter, as
in their authors' code; classifiers as torch's.
"""

from functools import partial

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import nn

from gbnzoo.models._base import Classifier, cifar10_cfg, init_he_normal
from gbnzoo.norm import GhostBatchNorm2d
from gbnzoo.pretrained import register_model


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, added to the block's input.

    The first block of a stage adds to its normalised input instead, widened where needed by a 1x1 convolution.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, starts_stage: bool, norm_layer: partial):
        super().__init__()
        self.starts_stage = starts_stage
        self.bn1 = norm_layer(in_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
        self.bn2 = norm_layer(out_chs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if in_chs == out_chs else nn.Conv2d(in_chs, out_chs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.act1(self.bn1(x))
        residual = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        return residual + self.shortcut(activated if self.starts_stage else x)


class PreActResNet(Classifier):
    """A 3x3 stem, three stages of pre-activation blocks, and a last BatchNorm and ReLU.

    Args:
        blocks: blocks of each stage.
        channels: width of each stage; every stage but the first halves height and width.
        init_mode: "fan_in" or "fan_out", the channels that the variance of initial convolutions is divided by.
        num_classes, in_chans, global_pool, drop_rate: as in timm.
        ghost_batch_size: samples normalised together in training; None for the whole batch.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: tuple[int, ...] = (16, 32, 64),
        init_mode: str = "fan_out",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        ghost_batch_size: int | None = None,
    ):
        super().__init__()
        norm_layer = partial(GhostBatchNorm2d, ghost_batch_size=ghost_batch_size)
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.feature_info = [{"num_chs": 16, "reduction": 1, "module": "conv1"}]

        stages = []
        in_chs = 16
        for i, (depth, out_chs) in enumerate(zip(blocks, channels, strict=True)):
            first = PreActBlock(in_chs, out_chs, 2 if i else 1, True, norm_layer)
            stages.append(
                nn.Sequential(first, *(PreActBlock(out_chs, out_chs, 1, False, norm_layer) for _ in range(depth - 1)))
            )
            self.feature_info.append({"num_chs": out_chs, "reduction": 2**i, "module": f"stages.{i}"})
            in_chs = out_chs
        self.stages = nn.Sequential(*stages)
        self.norm = norm_layer(in_chs)
        self.act = nn.ReLU(inplace=True)
        self.feature_info[-1]["module"] = "act"
        self.init_head(in_chs, num_classes, global_pool, drop_rate)
        init_he_normal(self, init_mode)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^conv1", "blocks": blocks}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.forward_end(x)

    def forward_end(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(x))


default_cfgs = generate_default_cfgs({"preact_resnet20_gbn": cifar10_cfg(), "wide_resnet28_10_gbn": cifar10_cfg()})


def _create(variant: str, pretrained: bool, **kwargs) -> PreActResNet:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(PreActResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def preact_resnet20_gbn(pretrained: bool = False, **kwargs) -> PreActResNet:
    """Pre-activation ResNet-20: 3 blocks a stage of 16, 32 and 64 channels, 0.27M parameters."""
    return _create("preact_resnet20_gbn", pretrained, blocks=(3, 3, 3), **kwargs)


@register_model
def wide_resnet28_10_gbn(pretrained: bool = False, **kwargs) -> PreActResNet:
    """WRN-28-10: 4 blocks a stage of 160, 320 and 640 channels, 36.5M parameters."""
    model_args = {"blocks": (4, 4, 4), "channels": (160, 320, 640), "init_mode": "fan_in"}
    return _create("wide_resnet28_10_gbn", pretrained, **(model_args | kwargs))
