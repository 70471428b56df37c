"""A ghost twin, `<name>_gbn`, of every timm architecture that holds a BatchNorm.

The original's entry point builds the twin, whose norm layers then change their class: it has the original's arguments,
state-dict keys, pretrained weights by the original's tags, and eval. `ghost_batch_size` is its one more argument.

Which architectures hold a BatchNorm is read from `batchnorm_models.csv`, for to build all of timm takes minutes.
"""

import csv
import logging
from pathlib import Path

import timm
from timm.models import (
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_notrace_module,
    resolve_pretrained_cfg,
)
from torch import nn

from gbnzoo.norm import FOLDING_MODULES, become_ghosts
from gbnzoo.pretrained import register_model

for _folding_module in FOLDING_MODULES:
    register_notrace_module(_folding_module)

default_cfgs = {}
_logger = logging.getLogger(__name__)


def batch_norm_counts() -> dict[str, int]:
    """Number of BatchNorm layers in each of timm's architectures, as far as this package knows them."""
    with open(Path(__file__).with_name("batchnorm_models.csv"), newline="") as file:
        return {row["architecture"]: int(row["batch_norms"]) for row in csv.DictReader(file)}


def register_twins() -> None:
    """Register the twin of every architecture that this timm has and is known to hold a BatchNorm."""
    counts = batch_norm_counts()
    architectures = [name for name in timm.list_models() if not name.endswith("_gbn")]
    for name in architectures:
        if counts.get(name):
            _register_twin(name)
    unknown = [name for name in architectures if name not in counts]
    if unknown:
        _logger.warning(
            "timm %s has %d architectures that this gbnzoo does not know and gives no twin (%s); for one of them use"
            " gbnzoo.convert_ghost_batchnorm(timm.create_model(name), ghost_batch_size)",
            timm.__version__,
            len(unknown),
            ", ".join(unknown),
        )


def _register_twin(original: str) -> None:
    name = f"{original}_gbn"
    build = model_entrypoint(original)

    def twin(
        pretrained: bool = False,
        ghost_batch_size: int | None = None,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: dict | None = None,
        **kwargs,
    ) -> nn.Module:
        # Always the twin's own cfg: without one the original would resolve its default.
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        model = build(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
        become_ghosts(model, ghost_batch_size)
        return model

    twin.__name__ = twin.__qualname__ = name
    twin.__doc__ = f"timm's {original} over ghosts of `ghost_batch_size` samples; None for plain BatchNorm."
    globals()[name] = twin
    tags = {cfg.tag: cfg for cfg in get_arch_pretrained_cfgs(original).values()}
    default_cfgs.update(generate_default_cfgs({f"{name}.{tag}" if tag else name: cfg for tag, cfg in tags.items()}))
    register_model(twin)


register_twins()
