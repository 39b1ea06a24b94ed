"""Residual Attention Networks, composed of the layers in `Module`."""

from Model.geometries import Geometry, Stage

__all__ = ["Geometry", "Stage", "attention_56", "attention_92", "network", "residual_attention_network"]


def __getattr__(name):
    """Import the builders when they are asked for: reading the tables, as flags do, must start no framework."""
    if name not in __all__:
        raise AttributeError(f"module 'Model' has no attribute {name!r}")
    from Model import builder

    return getattr(builder, name)
