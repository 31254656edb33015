"""The one error for what a person can mend; everything else is our own bug and keeps its traceback."""


class InputError(ValueError):
    """Something that was given cannot be used: what was got, what was expected, what to do, in one sentence.

    The commands and stages end with the message alone. More exact kinds of it are subclasses.
    """
