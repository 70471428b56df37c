"""The fully connected network F1 of Keskar et al. 2016 (arXiv 1609.04836), as in the code of Hoffer et al. 2017
(arXiv 1705.08741). All weights start as torch's, unless asked for zeros."""

import math
from functools import partial
from itertools import pairwise

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs
from torch import nn

from gbnzoo.models._base import Classifier
from gbnzoo.norm import GhostBatchNorm1d
from gbnzoo.pretrained import register_model


class Mlp(Classifier):
    """Hidden layers of Linear, BatchNorm and ReLU on the flattened image, then a linear classifier.

    Args:
        width: features of each hidden layer.
        depth: number of hidden layers.
        img_size: height and width of the images, one number where they are equal.
        num_classes, in_chans, drop_rate: as in timm.
        global_pool: "" only; no map is left to pool.
        ghost_batch_size: samples normalised together in training; None for the whole batch.
        weight_init: "" for torch's own; "zeros" sets all weights of linear layers to 0, a saddle point: nothing but the last
            bias has a gradient there, and descent never leaves it without noise.

    Raises:
        ValueError: for another weight_init.
    """

    pools = False

    def __init__(
        self,
        width: int = 512,
        depth: int = 5,
        img_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        in_chans: int = 1,
        global_pool: str = "",
        drop_rate: float = 0.0,
        ghost_batch_size: int | None = None,
        weight_init: str = "",
    ):
        super().__init__()
        if weight_init not in ("", "zeros"):
            raise ValueError(f"weight_init {weight_init!r}; wanted '' or 'zeros'")
        norm_layer = partial(GhostBatchNorm1d, ghost_batch_size=ghost_batch_size)
        img_size = to_2tuple(img_size)
        self.in_chans = in_chans
        self.flatten = nn.Flatten()
        layers = []
        self.feature_info = []
        for ins, outs in pairwise([in_chans * math.prod(img_size)] + [width] * depth):
            self.feature_info.append({"num_chs": outs, "reduction": max(img_size), "module": f"layers.{len(layers)}"})
            layers.append(nn.Sequential(nn.Linear(ins, outs), norm_layer(outs), nn.ReLU(inplace=True)))
        self.layers = nn.Sequential(*layers)
        self.init_head(width, num_classes, global_pool, drop_rate)
        if weight_init == "zeros":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"blocks": r"^layers\.(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.flatten(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.layers, x)
        return self.layers(x)


default_cfgs = generate_default_cfgs(
    {
        "mlp5_gbn": {
            "num_classes": 10,
            "input_size": (1, 28, 28),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.1307,),
            "std": (0.3081,),
            "first_conv": None,
            "classifier": "head.fc",
            "license": "apache-2.0",
        }
    }
)


@register_model
def mlp5_gbn(pretrained: bool = False, **kwargs) -> Mlp:
    """F1: five hidden layers of 512 on 28x28 grey images, 1.46M parameters."""
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(Mlp, "mlp5_gbn", pretrained, feature_cfg=feature_cfg, **kwargs)
