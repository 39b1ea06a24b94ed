"""Residual Attention Networks, composed of the layers in `Module`.

After `import Model`, `keras.models.load_model` knows all layers of a saved network.
"""

import importlib.abc
import importlib.machinery
import sys

from Model.geometries import Geometry, Stage

__all__ = ["Geometry", "Stage", "attention_56", "attention_92", "network", "residual_attention_network"]


def __getattr__(name):
    """Import the builders on first use: programs that only read the tables must not start a framework."""
    if name not in __all__:
        raise AttributeError(f"module 'Model' has no attribute {name!r}")
    from Model import builder

    return getattr(builder, name)


def __dir__():
    return sorted({*globals(), *__all__})


class _RegisterLayers(importlib.abc.MetaPathFinder):
    """Registers the layers with Keras as soon as Keras is imported.

    Registration needs Keras, whose import takes seconds; programs that only read the tables do not wait for it.
    """

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name) if name == "keras" else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            importlib.import_module("Module")

        spec.loader.exec_module = execute_and_register
        return spec


if "keras" in sys.modules:
    importlib.import_module("Module")
else:
    sys.meta_path.insert(0, _RegisterLayers())
