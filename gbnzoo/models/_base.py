"""What all networks here share: a linear head with timm's handles on it, initial weights, and the CIFAR-10 default."""

import torch
from timm.layers import ClassifierHead
from torch import nn


class Classifier(nn.Module):
    """A network that ends in pooling, dropout and one linear classifier.

    A subclass builds its layers, sets `feature_info`, ends `__init__` with `init_head`, and has `forward_features`. Where
    hidden layers take the place of pooling it says so in `pools`.
    """

    pools = True

    def init_head(self, in_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """
        Args:
            in_features: channels, or features, that the head reads.
            num_classes: classes; 0 leaves out the classifier.
            global_pool: pooling of the feature map, by timm's names ("avg", "max", ...; "" for none).
            drop_rate: dropout before the classifier, 0 <= drop_rate < 1.
        """
        self.grad_checkpointing = False
        self.num_features = in_features
        self.head = ClassifierHead(in_features, 0, pool_type="", drop_rate=drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling unless `global_pool` is None.

        Raises:
            ValueError: if a network that does not pool is asked to.
        """
        if global_pool and not self.pools:
            raise ValueError(
                f"{type(self).__name__} does not pool: given global_pool={global_pool!r}, wanted '' or None"
            )
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.in_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def init_he_normal(model: nn.Module, mode: str = "fan_out") -> None:
    """He et al.'s convolutions: zero mean, variance 2 / (kernel area · output or input channels). The rest stays torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


def cifar10_cfg(**changes) -> dict:
    """timm's pretrained cfg for a network of 32x32 images; weights trained on other data bring their own."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **changes,
    }
