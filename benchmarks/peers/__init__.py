"""What the engines are measured against, one file each.

Every file has ``build(...)``, which does all that is done once and returns ``call(seed)``; a call
generates one batch and returns it as a NumPy array, so that it is finished when it returns.
"""
