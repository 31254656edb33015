"""Checkpoints of a training run: the newest state, complete or absent."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .records import read_json, write_json
from .run import StageError, newest_checkpoint


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("step_"))


class Checkpoints:
    """The newest state of a training run, `<folder>/step_<number>/`, which appears by atomic rename.

    Args:
        folder: Of the checkpoints.
        accelerator: Saves and restores model, optimizer and random states of all processes.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def save(self, step: int, progress_state: Mapping[str, Any]) -> None:
        """Save after optimizer step `step`, then delete older ones."""
        target = self.folder / f"step_{step:08d}"
        unfinished = self.folder / "unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "num_processes": self.accelerator.num_processes,
                "precision": self.accelerator.mixed_precision,
                **progress_state,
            }
            write_json(unfinished / "progress.json", state)
            unfinished.replace(target)
            for older in self.folder.glob("step_*"):
                if older != target:
                    shutil.rmtree(older)
        self.accelerator.wait_for_everyone()

    def load_newest(self) -> Mapping[str, Any] | None:
        """Restore the newest complete checkpoint and return its progress; None when there is none.

        Raises:
            StageError: it was saved with another number of processes, which changes every batch.
        """
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return None
        state = read_json(newest / "progress.json")
        if state["num_processes"] != self.accelerator.num_processes:
            raise StageError(
                f"{newest} was made by {state['num_processes']} process(es), but this run has "
                f"{self.accelerator.num_processes}; use the same number, or delete the folder to start over."
            )
        self.accelerator.load_state(str(newest))
        return state

    def clear(self) -> None:
        """Delete all checkpoints, once the finished model is saved."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
