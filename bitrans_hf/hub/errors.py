"""The one error for what a person can fix, and which other errors are of that sort; all else keeps its traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something that was given cannot be used: what was got, what was expected, what to do, in one sentence.

    The commands and stages end with the message alone. More exact kinds of it are subclasses.
    """


class MissingFileError(InputError, FileNotFoundError):
    """A file that is needed is not there; the message says which, and what makes it."""


class MissingExtraError(InputError, ImportError):
    """A package that only some uses need is not installed; the message says how to install it."""


_DISK_REMEDIES = {
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the name: a part of it is a file, not a folder",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "take it away or give another name",
    errno.EACCES: "change its permissions or give another place",
    errno.EPERM: "change its permissions or give another place",
    errno.EROFS: "give a place on a disk that can be written to",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "its links lead in a circle: fix them",
    errno.ENOSPC: "make room on the disk and rerun the same command",
    errno.EDQUOT: "make room in your quota and rerun the same command",
    errno.EFBIG: "raise the limit on the size of files and rerun the same command",
    errno.EMFILE: "raise the limit on open files (ulimit -n) or use fewer workers",
    errno.EADDRINUSE: "give another --port",
}


def sentence_of(error: BaseException) -> str | None:
    """Return the sentence that a command ends with, or None for a bug of ours, which must show its traceback.

    Three sorts of errors have one: `InputError`; what the operating system says of the user's disk or network, such as
    a full disk; and what huggingface_hub says of a value in a model's configuration.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK_REMEDIES:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}; {_DISK_REMEDIES[error.errno]}."
    # By name: a file of the Hub imports nothing but what every transformers needs.
    if type(error).__name__ in ("StrictDataclassFieldValidationError", "StrictDataclassClassValidationError"):
        reason = error.__cause__
        return str(reason) if isinstance(reason, InputError | TypeError) else None
    return None


@contextmanager
def ends_with_a_sentence() -> Iterator[None]:
    """End the process with status 1 and one sentence at an error that a person can fix; let all others through."""
    try:
        yield
    except Exception as error:  # looked at, and raised again unless it is of that sort
        sentence = sentence_of(error)
        if sentence is None:
            raise
        raise SystemExit(f"error: {sentence}") from error
