"""How tests run the stages of `training/`: in this process one after another, or as processes that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
from accelerate.state import AcceleratorState, GradientState, PartialState


def forget_processes() -> None:
    """Let the next stage set accelerate up anew: its state lives as long as the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def launch(command: list[str]) -> subprocess.Popen[str]:
    """Start a script in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_everything(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process and all its children, as a scheduler does."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.communicate()
