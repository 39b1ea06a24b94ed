"""Residual Attention Networks, composed of the layers in `Module`."""

from Model.residual_attention_network import (
    Geometry,
    Stage,
    attention_56,
    attention_92,
    residual_attention_network,
)

__all__ = ["Geometry", "Stage", "attention_56", "attention_92", "residual_attention_network"]
