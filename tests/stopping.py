"""How tests press Ctrl-C: in a session of its own, where the signal goes to all processes as a terminal sends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, and what was on stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of stderr."""
        return self.err.splitlines()[-1]


def heed_signals() -> None:
    """A shell's background job ignores Ctrl-C, and so would all that is started from it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(
    command: list[str],
    ready: Callable[[str], bool],
    folder: Path,
    *,
    number: int = signal.SIGINT,
    times: int = 1,
    within: float = 240,
) -> Ended:
    """Start a Python command, stop it with all its processes when it is ready, and see that nobody is left.

    Args:
        command: What follows `python`.
        ready: Of what is on stderr by now: whether to stop it.
        folder: Where its output goes.
        number: The signal.
        times: How often it comes, a moment apart.
        within: Seconds that the start and the end may take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "stdout", folder / "stderr"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out_file, stderr=err_file, env=environment, start_new_session=True,
            preexec_fn=heed_signals,
        )  # fmt: skip
    family: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + within
        while not ready(err.read_text()):
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < deadline, f"not ready to be stopped: {err.read_text()}"
            time.sleep(0.005)
        family = {psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)}
        for _ in range(times):
            os.killpg(process.pid, number)
            time.sleep(0.3 if times > 1 else 0)
        status = process.wait(timeout=within)
        _, left = psutil.wait_procs(family, timeout=20)
        assert not left, f"still there: {[each.cmdline() for each in left]}"
    finally:
        for each in family:
            if each.is_running():
                each.kill()
        process.kill()
        process.wait()
    return Ended(status, out.read_text(), err.read_text())
