"""The runs of a table of variants: several at a time, one process per stage, equal trainings done once."""

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from ..commands import if_stopped
from ..progress import Counter, progress, say_progress, say_result
from .recipe import Recipe
from .records import recipe_parts
from .run import holds
from .seeds import DEPENDS_ON as SEEDS_DEPEND_ON
from .train import DEPENDS_ON as TRAINING_DEPENDS_ON


class Cell(NamedTuple):
    """One run of the table."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}/seed{self.seed}"


class Job(NamedTuple):
    """A stage of a run; `trained_by` is the run whose training it uses, itself or another."""

    stage: Literal["train", "seeds"]
    cell: Cell
    trained_by: Cell


class RunGrid:
    """The runs that a table needs.

    A run that shares another's training waits for it, and takes no slot meanwhile.

    Args:
        recipes: Run -> its recipe, in the order of starting.
        arguments: Returns the command-line arguments of a run's stages.
        parallel: Stages at the same time.
        quiet: Print no plan and no progress.
    """

    def __init__(
        self,
        recipes: Mapping[Cell, Recipe],
        arguments: Callable[[Cell], Sequence[str]],
        *,
        parallel: int,
        quiet: bool,
    ):
        self.recipes, self.arguments, self.parallel, self.quiet = recipes, arguments, parallel, quiet
        self.trainings = plan_trainings(recipes)
        self.failed: dict[str, str] = {}
        self.environment = dict(os.environ)
        if parallel > 1:
            # Left alone, every run would take all cores and all of them would wait for each other.
            threads = max(1, (os.cpu_count() or 1) // parallel)
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._ready = deque(Job("train", cell, cell) for cell in self.trainings)
        self._processes: set[subprocess.Popen[str]] = set()

    def run(self) -> dict[str, str]:
        """Run what is missing; return the failed runs with their reasons."""
        if_stopped(lambda: "before all runs were done; finished runs and checkpoints are kept")
        if not self.quiet:
            say_progress(
                f"ablation: {len(self.recipes)} runs, {len(self.trainings)} trainings to do, {self.parallel} at a time"
            )
        missing = {cell for sharing in self.trainings.values() for cell in sharing}
        running: dict[Future[str | None], Job] = {}
        bar: Counter
        with (
            ThreadPoolExecutor(self.parallel) as pool,
            progress(total=len(self.recipes), desc="ablation", unit="run", quiet=self.quiet) as bar,
            self._stopping_processes(),
        ):
            for cell in self.recipes:
                if cell not in missing:
                    self._ended(cell, None, bar)
            while self._ready or running:
                while self._ready and len(running) < self.parallel:
                    job = self._ready.popleft()
                    running[pool.submit(self._work, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._follow(running.pop(future), future.result(), bar)
        return dict(sorted(self.failed.items()))

    def _work(self, job: Job) -> str | None:
        """Run a stage; return the reason if it failed."""
        recipe = self.recipes[job.cell]
        if job.stage == "train":
            if finished(recipe, "train"):
                return None
            train = stage_folder(recipe, "train")
            if train.is_symlink() and not train.exists():
                train.unlink()  # it led to the training of a row whose folder was deleted
        elif job.cell != job.trained_by:
            share_training(self.recipes[job.trained_by], recipe)
        return run_stage(job.stage, self.arguments(job.cell), self.environment, self._processes)

    def _follow(self, job: Job, reason: str | None, bar: Counter) -> None:
        """Note how a stage ended, and release what waited for it."""
        if job.stage == "seeds":
            self._ended(job.cell, reason, bar)
        elif reason is None:  # seeds come before other trainings: a row is whole as soon as it can be
            self._ready.extendleft(Job("seeds", other, job.cell) for other in reversed(self.trainings[job.cell]))
        else:
            shared = f"it shares the training of {job.cell}, where {reason}"
            for other in self.trainings[job.cell]:
                self._ended(other, reason if other == job.cell else shared, bar)

    def _ended(self, cell: Cell, reason: str | None, bar: Counter) -> None:
        if reason:
            self.failed[str(cell)] = reason
        bar.update()
        say_result(f"{cell}: {'failed' if reason else 'done'}")

    @contextmanager
    def _stopping_processes(self) -> Iterator[None]:
        """Terminate the processes if the block is interrupted; each keeps its last checkpoint."""
        try:
            yield
        except BaseException:
            for process in list(self._processes):
                process.terminate()
            raise


def plan_trainings(recipes: Mapping[Cell, Recipe]) -> dict[Cell, list[Cell]]:
    """Choose one run to train for all runs with equal trainings and without finished seeds.

    It is the one whose training is finished, else one that has started, else the first.

    Returns:
        Run that trains -> the runs, including itself, that still need its training.
    """
    alike: dict[str, list[Cell]] = {}
    for cell, recipe in recipes.items():
        key = json.dumps(recipe_parts(recipe, TRAINING_DEPENDS_ON), sort_keys=True)
        if holds(recipe, "train", TRAINING_DEPENDS_ON) is False:
            key = str(cell)  # a training of another recipe lies there: train.py refuses it, and others need not wait
        alike.setdefault(key, []).append(cell)
    trainings = {}
    for cells in alike.values():
        missing = [cell for cell in cells if not finished(recipes[cell], "seeds")]
        if missing:
            trained = [cell for cell in cells if finished(recipes[cell], "train")]
            begun = [cell for cell in missing if holds(recipes[cell], "train", TRAINING_DEPENDS_ON)]
            trainings[(trained or begun or missing)[0]] = missing
    return trainings


def share_training(source: Recipe, recipe: Recipe) -> None:
    """Link `train` of a run to the finished one of `source`, unless its own is finished.

    A partial training there is deleted: it would end like the finished one.
    """
    if finished(recipe, "train"):
        return
    train = stage_folder(recipe, "train")
    if train.is_symlink():
        train.unlink()
    elif train.is_dir():
        shutil.rmtree(train)
    train.parent.mkdir(parents=True, exist_ok=True)
    target = stage_folder(source, "train").resolve()
    train.symlink_to(os.path.relpath(target, train.parent.resolve()), target_is_directory=True)


def stage_folder(recipe: Recipe, stage: str) -> Path:
    """Return the folder of a run's stage."""
    return Path(recipe.output_dir) / recipe.name / stage


def finished(recipe: Recipe, stage: str) -> bool:
    """Return whether a run's "train" or "seeds" is finished with this recipe."""
    depends_on = {"train": TRAINING_DEPENDS_ON, "seeds": SEEDS_DEPEND_ON}[stage]
    return (stage_folder(recipe, stage) / "done.json").is_file() and bool(holds(recipe, stage, depends_on))


def run_stage(
    stage: str, arguments: Sequence[str], environment: Mapping[str, str], running: set[subprocess.Popen[str]]
) -> str | None:
    """Run a stage in a process of its own, one of `running` meanwhile; return the last line of the error, or None."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitrans_hf.stages", stage, *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    running.add(process)
    _, error = process.communicate()
    running.discard(process)
    if not process.returncode:
        return None
    said = error.strip().splitlines()
    return f"{stage} ended with {process.returncode}" + (f", {said[-1]}" if said else "")
