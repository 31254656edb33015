"""Progress of a run: a bar on a terminal, otherwise a line at least every 30 seconds.

Results go to stdout. Progress goes to stderr and is not printed with `quiet`.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeAlias, TypeVar, cast

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0

Counter: TypeAlias = "tqdm[Any] | ProgressLines[Any]"
"""The progress of a loop that calls `update` itself."""

_stopped = threading.Event()
"""Set when the process is told to stop, so that its last sentence stays the last."""


def progress(
    items: Iterable[Item] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    quiet: bool = False,
) -> "tqdm[Item] | ProgressLines[Item]":
    """Wrap a loop in a progress bar, or in lines if stderr is not a terminal.

    Args:
        items: What the loop is over; None for a loop that calls `update` itself.
        desc: What is done.
        unit: One item, in the singular.
        total: Number of items, if `items` has no length.
        initial: Items that were finished earlier.
        leave: Keep the bar on the terminal at the end.
        quiet: Show nothing.
    """
    if quiet or sys.stderr.isatty():
        bar = tqdm(items, desc=desc, unit=unit, total=total, initial=initial, leave=leave, disable=quiet)
        return cast("tqdm[Item]", bar)
    return ProgressLines(items, desc=desc, unit=unit, total=total, initial=initial)


class ProgressLines(Generic[Item]):
    """Progress of a loop as lines on stderr, with the part of `tqdm`'s interface that its callers use.

    A thread prints a line every 30 seconds, also in the middle of an item that takes minutes. A shorter loop prints
    nothing.

    Args:
        items: What the loop is over; None for a loop that calls `update` itself.
        desc: What is done.
        unit: One item, in the singular.
        total: Number of items; None takes the length of `items`, if it has one.
        initial: Items that were done before.
        every: Seconds between two lines; None for `SECONDS_BETWEEN_LINES`.
        clock: Returns seconds.
    """

    def __init__(
        self,
        items: Iterable[Item] | None = None,
        *,
        desc: str,
        unit: str = "",
        total: int | None = None,
        initial: int = 0,
        every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.items, self.desc, self.unit = items, desc, unit
        self.total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
        self.n = self.initial = initial
        self.note = ""
        self._clock, self._started = clock, clock()
        self._every = SECONDS_BETWEEN_LINES if every is None else every
        self._spoke, self._closed = False, threading.Event()
        threading.Thread(target=self._speak, daemon=True, name="progress").start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)

    def __iter__(self) -> Iterator[Item]:
        finished = False
        try:
            for item in self.items or ():
                yield item
                self.update()
            finished = True
        finally:
            self.close(finished=finished)

    def update(self, n: int = 1) -> None:
        """Count `n` more items."""
        self.n += n

    def set_postfix(self, **values: Any) -> None:
        """Set text to append to the lines, such as the loss."""
        self.note = "".join(f", {name} {value}" for name, value in values.items())

    def close(self, *, finished: bool = True) -> None:
        """End; the last line says how long it took, if there was a line before."""
        if not self._closed.is_set():
            self._closed.set()
            if finished and self._spoke:
                say_progress(self.line())

    def line(self) -> str:
        """Return a line with the position, the rate and the time left."""
        seconds = self._clock() - self._started
        parts = []
        if self.unit:
            parts.append(f"{self.unit} {self.n:,}" + (f" of {self.total:,}" if self.total else ""))
        done = self.n - self.initial
        if done > 0 and seconds > 0:
            each = seconds / done
            parts.append(f"{each:.1f} s each" if each > 1 else f"{done / seconds:.1f}/s")
        parts.append(f"{tqdm.format_interval(seconds)} so far")
        if done > 0 and self.total:
            parts.append(f"{tqdm.format_interval(each * (self.total - self.n))} left" if seconds > 0 else "")
        return f"{self.desc}: {', '.join(filter(None, parts))}{self.note}"

    def _speak(self) -> None:
        while not self._closed.wait(self._every) and not _stopped.is_set():
            self._spoke = True
            say_progress(self.line())


def say_progress(text: str) -> None:
    """Print a line on stderr, between the steps of a bar if there is one."""
    if not _stopped.is_set():
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def say_result(text: str) -> None:
    """Print a line on stdout, between the steps of a bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


@contextmanager
def working(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Report work that counts no items: at its start, and every 30 seconds with the time so far."""
    if quiet:
        yield
        return
    say_progress(f"{what} ...")
    with ProgressLines[Any](desc=what):
        yield


def fall_silent(*, silent: bool = True) -> None:
    """Close all bars and print no more lines, because the last sentence follows. With False, resume."""
    if not silent:
        _stopped.clear()
        return
    _stopped.set()
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def size_text(size: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size = size / 1000
    return f"{size:.1f} GB"
