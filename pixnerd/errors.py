"""What the user is told when an input cannot work, or a training run cannot go on."""


class InputError(ValueError):
    """A wrong input, explained in one sentence: what it is, its value, what is allowed.

    The command line prints the sentence alone and exits with code 2; any other exception keeps its traceback.
    """


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or not a number; the message names the step and the last good checkpoint."""
