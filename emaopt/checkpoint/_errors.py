"""What can be wrong with a checkpoint, as types: a program can tell them apart.

Both are `ValueError`s. A path that leads nowhere is a `FileNotFoundError`.
"""


class DamagedError(ValueError):
    """A file of the checkpoint is missing, cut off, or not what was saved."""


class MismatchError(ValueError):
    """The checkpoint is sound, but does not hold what was asked for."""
