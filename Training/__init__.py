"""What the training script and the notebooks share: recipe, data, fit, report, view.

Nothing is imported here: reading flags or an archive must not start a framework.
"""
