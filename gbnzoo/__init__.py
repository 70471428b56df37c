"""Ghost-BatchNorm models for timm. Importing this package registers every architecture with timm."""

import gbnzoo.models  # noqa: F401
from gbnzoo.fusion import fuse_ghost_batchnorm, unfuse_ghost_batchnorm
from gbnzoo.norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormAct2d,
    convert_ghost_batchnorm,
    revert_ghost_batchnorm,
)

__version__ = "0.1.0"

__all__ = [
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormAct2d",
    "convert_ghost_batchnorm",
    "fuse_ghost_batchnorm",
    "revert_ghost_batchnorm",
    "unfuse_ghost_batchnorm",
]
