"""Errors that are the user's to mend: shown as one message, without a traceback."""


class UserError(ValueError):
    """Something given by the user cannot be used. The message says what disagrees and what to do."""


class CheckpointError(UserError):
    """A model folder that cannot be used: files or weights are missing, surplus or of another shape."""


class ArgumentError(UserError):
    """Flags that contradict each other, the checkpoint or the machine."""
