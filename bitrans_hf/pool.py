"""A pool of processes that handles the images of a set and names those that fail."""

import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from .commands import children_without_signals, is_stopped
from .files import DiskFullError
from .hub.errors import InputError, MissingExtraError, sentence_of
from .progress import Counter
from .progress import progress as shown_progress

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The outcome for one image of a set.

    Attributes:
        image_id: As given with the job.
        result: What the function returned; None when it failed.
        error: None, or the reason for the failure, in one sentence.
    """

    image_id: str
    result: Result | None
    error: str | None = None


class ImageFailedError(InputError):
    """An image of a set failed and the caller asked to stop at failures; the message names it."""


class ImagePool:
    """Processes that handle sets of images, started once and reused for any number of sets.

    Results come in the order of the jobs. At most two jobs per process wait or run at a time, whatever the size of the
    set, and jobs are taken from their iterable only as needed. An image that fails, even one that kills its process,
    is named, and the others continue; only a full disk stops them. Workers start in a fresh interpreter, never as a
    copy of this process with its threads and GPU, so a script that uses the pool must keep its own work under `if
    __name__ == "__main__":`.

    Args:
        processes: Number of processes; None: one per core available to this process. With 1, this process does all the
            work.

    Example:
        >>> with ImagePool(processes=1) as pool:
        ...     [(o.image_id, o.result) for o in pool.run(len, [("a", "xyz"), ("b", "")])]
        [('a', 3), ('b', 0)]
    """

    def __init__(self, processes: int | None = None):
        if processes is not None and processes < 1:
            raise InputError(f"processes must be 1 or more, got {processes}.")
        self.processes = processes or available_cores()
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes after their current jobs; waiting jobs are dropped.

        If the command was told to stop, the processes end at once.
        """
        if self._executor is not None:
            if is_stopped():
                for process in list(self._executor._processes.values()):
                    process.kill()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def run(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[tuple[str, Job]],
        *,
        strict: bool = False,
        progress: str | None = None,
        total: int | None = None,
    ) -> Iterator[Outcome[Result]]:
        """Yield the outcome of each job in order.

        Args:
            function: Handles one job; importable by name, like everything sent to another process.
            jobs: (image id, argument of the function). To resume after a kill, leave out images that your store
                already holds.
            strict: Stop at the first image that fails.
            progress: Title of the progress on stderr; None shows none.
            total: Number of jobs for the progress, if `jobs` has no length.

        Raises:
            ImageFailedError: `strict` and an image failed.
            DiskFullError: the function had no space to write its result.
        """
        length = len(jobs) if total is None and isinstance(jobs, Sized) else total
        bar: Counter
        with shown_progress(total=length, desc=progress or "", unit="image", quiet=progress is None) as bar:
            for outcome in self._outcomes(function, jobs):
                if strict and outcome.error is not None:
                    raise ImageFailedError(f"image {outcome.image_id}: {outcome.error}")
                yield outcome
                bar.update()

    def _outcomes(
        self, function: Callable[[Job], Result], jobs: Iterable[tuple[str, Job]]
    ) -> Iterator[Outcome[Result]]:
        if self.processes == 1:
            for image_id, job in jobs:
                yield _work(function, image_id, job)
            return
        waiting: deque[tuple[str, Job, Future[Outcome[Result]] | None]] = deque()
        try:
            for image_id, job in jobs:
                waiting.append((image_id, job, self._submit(function, image_id, job)))
                if len(waiting) == 2 * self.processes:
                    yield self._next(function, waiting)
            while waiting:
                yield self._next(function, waiting)
        finally:  # the caller may stop early
            for _, _, future in waiting:
                # Killed processes break the pool, which cannot be told to futures that are cancelled.
                if future is not None and not is_stopped():
                    future.cancel()

    def _next(
        self,
        function: Callable[[Job], Result],
        waiting: deque[tuple[str, Job, Future[Outcome[Result]] | None]],
    ) -> Outcome[Result]:
        image_id, job, future = waiting.popleft()
        try:
            if future is not None:
                return future.result()
        except BrokenProcessPool:
            pass
        # A process died and took all waiting jobs along. Whose fault it was shows when each is tried alone.
        self.close()
        try:
            alone = self._submit(function, image_id, job)
            outcome = alone.result() if alone is not None else Outcome[Result](image_id, None, _DIED)
        except BrokenProcessPool:
            self.close()
            outcome = Outcome[Result](image_id, None, _DIED)
        again = [
            entry
            if entry[2] is not None and _succeeded(entry[2])
            else (*entry[:2], self._submit(function, *entry[:2]))
            for entry in waiting
        ]
        waiting.clear()
        waiting.extend(again)
        return outcome

    def _submit(self, function: Callable[[Job], Result], image_id: str, job: Job) -> Future[Outcome[Result]] | None:
        """Submit a job to the processes; None if they have died."""
        with children_without_signals():  # a job may start a process
            if self._executor is None:
                self._executor = ProcessPoolExecutor(self.processes, mp_context=_context(), initializer=_start_worker)
            try:
                return self._executor.submit(_work, function, image_id, job)
            except BrokenProcessPool:
                return None


_DIED = (
    "the process that worked on it died, for want of memory (try fewer processes) or because the script does not keep "
    'its work under `if __name__ == "__main__":`.'
)


def _work(function: Callable[[Job], Result], image_id: str, job: Job) -> Outcome[Result]:
    try:
        return Outcome(image_id, function(job))
    except (DiskFullError, MissingExtraError):  # all others would fail alike
        raise
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:  # a bug of ours, which no other image makes good
            error.add_note(f"while working on the image {image_id}")
            raise
        return Outcome(image_id, None, sentence)


def _succeeded(future: "Future[Outcome[Result]]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _context() -> multiprocessing.context.BaseContext:
    """Fork workers from a server that imports this package once, if the system has one; otherwise each imports it.

    A worker also imports the caller's script. The server also imports what is slow there and already imported here.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(name for name in _SLOW_IMPORTS if name in sys.modules)])
    return context


_SLOW_IMPORTS = ("accelerate", "datasets", "timm", "torchvision", "transformers.modeling_utils")
"""Seconds each."""


def _start_worker() -> None:
    """Leave Ctrl-C to the parent on Windows too, do not outlive it when it is killed, and keep to one core."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
