"""The fully connected network F1 of Keskar et al. 2016 (arXiv 1609.04836), as in the code of Hoffer et al. 2017
(arXiv 1705.08741). All weights start as torch's."""

import math
from functools import partial
from itertools import pairwise

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import nn

from gbnzoo.norm import GhostBatchNorm1d


class Mlp(nn.Module):
    """Hidden layers of Linear, BatchNorm and ReLU on the flattened image, then a linear classifier.

    Args:
        width: features of each hidden layer.
        depth: number of hidden layers.
        img_size: height and width of the images, one number where they are equal; fixed once built.
        num_classes, in_chans: as in timm.
        global_pool: "" alone, since nothing spatial is left to pool.
        drop_rate: dropout before the classifier, 0 <= drop_rate < 1.
        ghost_batch_size: samples normalised together in training; None for the whole batch.

    Raises:
        ValueError: if asked to pool.
    """

    grad_checkpointing = False

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
    ):
        super().__init__()
        img_size = to_2tuple(img_size)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = width
        sizes = [in_chans * math.prod(img_size)] + [width] * depth
        norm_layer = partial(GhostBatchNorm1d, ghost_batch_size=ghost_batch_size)
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(ins, outs), norm_layer(outs), nn.ReLU(inplace=True))
                for ins, outs in pairwise(sizes)
            )
        )
        self.feature_info = [
            {"num_chs": width, "reduction": max(img_size), "module": f"layers.{i}"} for i in range(depth)
        ]
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"blocks": r"^layers\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes leave it out."""
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: an MLP leaves nothing to pool; leave it out or give ''")
        self.num_classes = num_classes
        like = self.layers[-1][0].weight
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.flatten(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.layers, x)
        return self.layers(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


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
            "classifier": "fc",
            "license": "apache-2.0",
        }
    }
)


@register_model
def mlp5_gbn(pretrained: bool = False, **kwargs) -> Mlp:
    """F1: five hidden layers of 512 on 28x28 grey images, 1.46M parameters."""
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(Mlp, "mlp5_gbn", pretrained, feature_cfg=feature_cfg, **kwargs)
