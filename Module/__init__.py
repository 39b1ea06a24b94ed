"""The layers of the Residual Attention Network (Wang et al., CVPR 2017)."""

from Module.attention_block import AttentionBlock, Branches
from Module.dropout import Dropout
from Module.inception_unit import InceptionUnit
from Module.normalization import BatchNormalization
from Module.residual_unit import ResidualUnit, Unit
from Module.resnext_unit import ResNeXtUnit
from Module.upsampling import BilinearUpsampling

__all__ = [
    "AttentionBlock",
    "BatchNormalization",
    "BilinearUpsampling",
    "Branches",
    "Dropout",
    "InceptionUnit",
    "ResNeXtUnit",
    "ResidualUnit",
    "Unit",
]
