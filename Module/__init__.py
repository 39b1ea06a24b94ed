"""The layers of the Residual Attention Network (Wang et al., CVPR 2017)."""

from Module.attention_block import AttentionBlock, SoftMask
from Module.normalization import BatchNormalization
from Module.residual_unit import ResidualUnit
from Module.upsampling import BilinearUpsampling

__all__ = ["AttentionBlock", "BatchNormalization", "BilinearUpsampling", "ResidualUnit", "SoftMask"]
