"""Files that a command writes: complete or absent, never over its input, never read back as input."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .file_names import MAX_NAME_BYTES
from .hub.errors import InputError

OUTPUT_MARK = ".bitrans_output"
"""Marker file in folders that we wrote; no list of images includes such a folder."""


def mark_output(folder: Path) -> None:
    """Create a folder for results that is never read as a folder of images, even if it lies among them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / OUTPUT_MARK).is_file():
        (folder / OUTPUT_MARK).write_text(
            "bitrans wrote this folder and does not read images from it.\n", encoding="utf-8"
        )


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether `path` is `folder` or below it, whether it exists or not.

    Folders are compared by identity on disk, so that links, relative paths and letter case do not matter.
    """
    if not folder.exists():
        return False
    resolved = path.resolve()
    return any(place.exists() and place.samefile(folder) for place in (resolved, *resolved.parents))


def refuse_same_folder(output: Path, inputs: Path, option: str) -> None:
    """Check that results are not written into the input folder.

    Args:
        output: Where results go.
        inputs: A folder that is read.
        option: How the caller said `output`: "--out".

    Raises:
        InputError: they are one folder.
    """
    if output.exists() and inputs.exists() and output.samefile(inputs):
        raise InputError(
            f"{option} {output} is the folder that is read, so results would mix with or replace its files; give "
            f"another folder, such as {output / 'results'}."
        )


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[Path], option: str) -> None:
    """Check that no output file is an input file; arguments as for `refuse_same_folder`, for files.

    Raises:
        InputError: one is.
    """
    read = {(status.st_dev, status.st_ino) for status in (path.stat() for path in inputs if path.exists())}
    for path in outputs:
        if path.exists() and ((status := path.stat()).st_dev, status.st_ino) in read:
            raise InputError(
                f"{option} would replace {path}, which is one of the files to be read; give another folder."
            )


# ---- Writing.


class DiskFullError(InputError, OSError):
    """No space is left for a file; the message names it and says what to do."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder and rename it to `path` at the end: readers see all or nothing.

    The temporary file is removed when the body raises. Its name keeps `path`'s suffix, which libraries look at, and
    carries the process id, so that two processes do not share it. It is short, however long `path`'s own name is.

    Raises:
        DiskFullError: the disk is full, or a quota or a limit on file sizes is reached.
    """
    end = f".{os.getpid()}.tmp{path.suffix}"
    name = f".{path.stem}{end}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{end}"
    temporary = path.with_name(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"no room left to write {path} ({error.strerror}); make room and rerun the same command: files that "
            "are there are whole and are not made twice."
        ) from error
