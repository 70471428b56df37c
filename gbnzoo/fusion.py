"""Blocks that hand their ghost layers the ReLU, and the residual addition before it, that follow them.

A kernel does both in the pass that normalises, see gbnzoo.kernels. Only how long training takes changes: in eval, under FX,
and around a layer that somebody has hooked or replaced by another, a fused block does what it did before.
"""

import os
from itertools import zip_longest

import torch
import torch.fx
from timm.models import checkpoint_seq
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from gbnzoo.models.cifar_resnet import CifarResNet
from gbnzoo.models.preact_resnet import PreActBlock, PreActResNet
from gbnzoo.norm import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, has_hooks, is_plain_relu


def fuse_ghost_batchnorm(model: nn.Module) -> nn.Module:
    """Let every block of a model whose structure shows it fuse norm and ReLU, and norm, addition and ReLU; in place.

    These are timm's ResNets and their blocks, this package's, and every nn.Sequential in which a ReLU follows a ghost layer.
    The modules stay the objects they are and only change their class, to a subclass of it: parameters, state dict, hooks and
    eval are untouched. `torch.jit.script` compiles no fused block: for that `unfuse_ghost_batchnorm` first.

    `GBNZOO_FUSION=0` in the environment turns it off: the model is then returned as it is.

    Returns:
        The same model.
    """
    if os.environ.get("GBNZOO_FUSION") != "0":
        for module in model.modules():
            module.__class__ = _FUSED_CLASSES.get(type(module), type(module))
    return model


def unfuse_ghost_batchnorm(model: nn.Module) -> nn.Module:
    """Make every fused block of a model the class it was, in place.

    Returns:
        The same model.
    """
    for module in model.modules():
        module.__class__ = _PLAIN_CLASSES.get(type(module), type(module))
    return model


class FusedSequential(nn.Sequential):
    """As nn.Sequential."""

    def forward(self, input: Tensor) -> Tensor:
        if not _may_fuse(self, input):
            return super().forward(input)
        done = None
        for module, following in zip_longest(self, list(self)[1:]):
            if module is done:
                done = None
            elif following is not None and _fuses(module, following):
                input, done = module.normalize(input, relu=True), following
            else:
                input = module(input)
        return input


class FusedBasicBlock(BasicBlock):
    """As timm's."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_fuse(self, x):
            return super().forward(x)
        y = _norm_relu(self.bn1, self.act1, self.conv1(x), self.drop_block)
        return _end_block(self, self.bn2, self.act2, self.conv2(self.aa(y)), x)


class FusedBottleneck(Bottleneck):
    """As timm's."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_fuse(self, x):
            return super().forward(x)
        y = _norm_relu(self.bn1, self.act1, self.conv1(x))
        y = _norm_relu(self.bn2, self.act2, self.conv2(y), self.drop_block)
        return _end_block(self, self.bn3, self.act3, self.conv3(self.aa(y)), x)


class FusedResNet(ResNet):
    """As timm's."""

    def forward_features(self, x: Tensor) -> Tensor:
        if not _may_fuse(self, x):
            return super().forward_features(x)
        x = self.maxpool(_norm_relu(self.bn1, self.act1, self.conv1(x)))
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        if self.grad_checkpointing:
            return checkpoint_seq(layers, x, flatten=True)
        for layer in layers:
            x = layer(x)
        return x


class FusedCifarResNet(CifarResNet):
    """As CifarResNet."""

    def forward_stem(self, x: Tensor) -> Tensor:
        return _norm_relu(self.bn1, self.act1, self.conv1(x)) if _may_fuse(self, x) else super().forward_stem(x)


class FusedPreActBlock(PreActBlock):
    """As PreActBlock."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_fuse(self, x):
            return super().forward(x)
        activated = _norm_relu(self.bn1, self.act1, x)
        residual = self.conv2(_norm_relu(self.bn2, self.act2, self.conv1(activated)))
        return residual + self.shortcut(activated if self.starts_stage else x)


class FusedPreActResNet(PreActResNet):
    """As PreActResNet."""

    def forward_end(self, x: Tensor) -> Tensor:
        return _norm_relu(self.norm, self.act, x) if _may_fuse(self, x) else super().forward_end(x)


_FUSED_CLASSES = {
    fused.__base__: fused
    for fused in (
        FusedSequential,
        FusedBasicBlock,
        FusedBottleneck,
        FusedResNet,
        FusedCifarResNet,
        FusedPreActBlock,
        FusedPreActResNet,
    )
}
_PLAIN_CLASSES = {fused: plain for plain, fused in _FUSED_CLASSES.items()}


def _may_fuse(block: nn.Module, x: Tensor) -> bool:
    return block.training and not isinstance(x, torch.fx.Proxy)


def _fuses(norm: nn.Module, act: nn.Module) -> bool:
    ghost_classes = (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)
    return type(norm) in ghost_classes and not has_hooks(norm) and is_plain_relu(act)


def _norm_relu(norm: nn.Module, act: nn.Module, x: Tensor, between: nn.Module | None = None) -> Tensor:
    if between is not None and type(between) is not nn.Identity:
        return act(between(norm(x)))
    return norm.normalize(x, relu=True) if _fuses(norm, act) else act(norm(x))


def _end_block(block: BasicBlock | Bottleneck, norm: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """act(norm(x) + shortcut), and what else may stand between."""
    between = [module for module in (block.se, block.drop_path) if module is not None]
    is_fused = not between and _fuses(norm, act)
    if not is_fused:
        x = norm(x)
        for module in between:
            x = module(x)
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    if is_fused:
        return norm.normalize(x, shortcut, relu=True)
    x += shortcut
    return act(x)
