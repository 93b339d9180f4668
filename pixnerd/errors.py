"""What the user is told when an input cannot work."""


class InputError(ValueError):
    """A wrong input, explained in one sentence: what it is, its value, what is allowed.

    The command line prints the sentence alone and exits with code 2; any other exception keeps its traceback.
    """
