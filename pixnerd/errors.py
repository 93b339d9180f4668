"""What the user is told when an input is unusable or a training run cannot continue."""


class InputError(ValueError):
    """An invalid input, explained in one sentence: what it is, its value, what is allowed.

    The command line prints only this sentence and exits with code 2; any other exception keeps its traceback.
    """

    shared = False
    """whether every process of the program raises it, so that only one of them has to print it"""


class WriteError(InputError):
    """A file cannot be written: no room, no permission, no folder."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; the message names the step and the last good checkpoint."""
