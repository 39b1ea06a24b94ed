"""Trains Residual Attention Networks: recipes, data, training loop, runs, pictures and command-line tools.

Nothing is imported here, so that reading flags or an archive does not start a framework.
"""
