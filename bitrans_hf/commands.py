"""How a command ends: with its result, with one sentence about an error that the user can fix, or by a signal.

Ctrl-C (SIGINT) and SIGTERM end a command with status 130 or 143 and one sentence on stderr: what is kept and how to
continue. No process prints a traceback: worker processes ignore Ctrl-C and end with this one.
"""

import importlib
import io
import multiprocessing
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from .hub.errors import ends_with_a_sentence
from .progress import fall_silent, working

STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _State:
    """State of this process.

    Attributes:
        signal: Number of the first signal to stop; None before.
        starting: Whether only imports have run, so that there is nothing to clean up.
        kept: Returns what a stop leaves behind, see `if_stopped`.
        spoken: Whether the last sentence has been printed.
        process: Its process id, by which a forked copy recognizes itself.
    """

    signal: int | None = None
    starting: bool = False
    kept: Callable[[], str] = field(default=lambda: "")
    spoken: bool = False
    process: int = field(default_factory=os.getpid)


_state = _State()


def is_first_process() -> bool:
    """Return whether this process prints for all that were launched together."""
    return os.environ.get("RANK", "0") == "0"


def if_stopped(kept: Callable[[], str]) -> None:
    """Set the last sentence of a command that is stopped from now on.

    Args:
        kept: Returns what follows "stopped", such as "in stage seeds; finished seeds are kept".
    """
    _state.kept = kept


@contextmanager
def starting(command: str, *, quiet: bool) -> Iterator[None]:
    """Report that a command is starting, since its imports take seconds; a signal ends it at once."""
    before, _state.starting = _state.starting, True
    try:
        with _watching(), working(f"{command}: loading PyTorch and its libraries", quiet=quiet):
            yield
    finally:
        _state.starting = before


def run_script(module: str) -> NoReturn:
    """Import a module and run its `main`; scripts call this before their own imports.

    The start is reported before the imports, and Ctrl-C works during them too.
    """

    def main() -> None:
        with starting(module.removesuffix(".__main__").rpartition(".")[2], quiet=starts_quietly(sys.argv[1:])):
            loaded = importlib.import_module(module)
        loaded.main()
        leave_process_group()

    run_command(main)
    sys.exit()


def run_command(main: Callable[[], Any]) -> None:
    """Run a command; a signal, or an error that the user can fix, ends it with one sentence instead of a traceback.

    Raises:
        SystemExit: with the sentence, with 130 (Ctrl-C) or 143 (SIGTERM) after it was printed, or with 141 if the
            program that reads stdout ended first, as in `bitrans check photos | head`.
    """
    global _state
    _state = _State()
    fall_silent(silent=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # Windows writes to files and pipes in a code page of few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    with _watching():
        try:
            with ends_with_a_sentence(), _flushed_output():
                main()
        except BaseException as error:
            if _state.signal is None and not isinstance(error, KeyboardInterrupt):
                if isinstance(error, BrokenPipeError) and _reader_is_gone():
                    _end_without_reader()
                raise
            # Other errors that a stop brings about, such as that of a connection whose other end is gone, say nothing.
            _last_sentence()
            _clear_frames(error)
            # At the very end, after the workers were joined: Python gives up its handlers before the process is gone.
            multiprocessing.util.Finalize(None, _ignore_stops, exitpriority=-1000)
            raise SystemExit(128 + (_state.signal or signal.SIGINT)) from None


@contextmanager
def children_without_signals() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C; this process handles it at the end of the block."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker  # not there on Windows

    resource_tracker.ensure_running()  # starting it later would unblock the signal
    pending: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    hook, sys.excepthook = sys.excepthook, _excepthook_of_worker
    try:
        yield
    finally:
        sys.excepthook = hook
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if pending:
            signal.raise_signal(signal.SIGINT)


def is_stopped() -> bool:
    """Return whether the command was told to stop and is cleaning up."""
    return _state.signal is not None


def starts_quietly(words: Sequence[str]) -> bool:
    """Return whether a command with these arguments is silent while it starts."""
    return not is_first_process() or asks_for_quiet(words)


def asks_for_quiet(words: Sequence[str]) -> bool:
    """Return the value of the last `--quiet` on a command line, before a parser exists."""
    quiet = False
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name, _, value = word.partition("=")
        if name == "--quiet":
            quiet = (value or following).lower() not in ("false", "no", "off")
    return quiet


def leave_process_group() -> None:
    """Destroy the process group of a launch once, after all stages."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def _flushed_output() -> Iterator[None]:
    """Write what stdout still holds at the end of the block, where an error can be answered; a bug comes first."""
    try:
        yield
    except SystemExit:
        _flush_stdout()
        raise
    _flush_stdout()


def _flush_stdout() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _reader_is_gone() -> bool:
    """Return whether stdout is a pipe whose other end is closed; False on Windows, which has no `poll`."""
    if not hasattr(select, "poll"):
        return False
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, replaced by something in memory, or closed
        return False
    pipe = select.poll()
    pipe.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in pipe.poll(0))


def _end_without_reader() -> NoReturn:
    """End as SIGPIPE ends other programs: without a traceback, and with a sentence only if a stage was interrupted."""
    if _state.kept():
        _last_sentence()
    # Python writes the rest of the buffer when it ends, and would report the error then.
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    raise SystemExit(128 + 13) from None


def _clear_frames(error: BaseException | None) -> None:
    """Release what an error's frames hold, so that loaders end their worker processes and generators close."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _excepthook_of_worker(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of a worker's thread, except a connection that a stopped process broke off."""
    if not issubclass(kind, EOFError | OSError | multiprocessing.AuthenticationError):
        sys.__excepthook__(kind, error, trace)


# ---- Signals.


@contextmanager
def _watching() -> Iterator[None]:
    """Handle signals in this block; a signal that is ignored, as in a shell's background job, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    heeded = [number for number in STOPS if before[number] not in (signal.SIG_IGN, None)]
    hook, sys.unraisablehook = sys.unraisablehook, _stop_again
    for number in heeded:
        signal.signal(number, _on_stop)
    try:
        yield
    finally:
        if _state.signal is None:  # else the rest of the process is cleaning up
            sys.unraisablehook = hook
            for number in heeded:
                signal.signal(number, before[number])


def _on_stop(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt at the first signal; end at once at the second, or if there is nothing to clean up."""
    if os.getpid() != _state.process:  # a worker that was forked; the main process has the word
        os._exit(128 + number)
    if _state.signal is not None or _state.starting:
        _state.signal = _state.signal or number
        _last_sentence()
        for child in multiprocessing.active_children():
            child.kill()
        # Semaphores, of which the resource tracker would speak otherwise.
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]
        os._exit(128 + _state.signal)
    _state.signal = number
    raise KeyboardInterrupt


def _ignore_stops() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _last_sentence() -> None:
    """Print what is kept and how to continue."""
    if _state.spoken or not is_first_process():
        return
    _state.spoken = True
    kept = "before it began" if _state.starting else _state.kept()
    fall_silent()
    sys.stderr.write(f"stopped{kept and ' '}{kept}; to go on, rerun the same command.\n")
    sys.stderr.flush()


def _stop_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Stop a moment later if the signal arrived where Python ignores errors, as in a `__del__`."""
    if _state.signal is None or not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number, _state.signal = _state.signal, None
    thread = threading.main_thread().ident
    assert thread is not None
    again = threading.Timer(0.01, signal.pthread_kill, (thread, number))
    again.daemon = True
    again.start()
