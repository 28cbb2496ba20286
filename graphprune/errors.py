"""The two ways in which graphprune fails: the input was wrong, or a step could not be done."""


class InputError(ValueError):
    """The caller's input cannot be used. The message is one clear line; the command line exits with code 2."""


class TargetError(InputError):
    """No plan can meet the target. The message says the best that can be reached."""


class StepError(RuntimeError):
    """A step failed on valid input (a trace, a cut, an export). The message is one clear line; exit code 1."""
