"""A run and its stages: recipe, options, processes, stage folders that can be resumed, and messages."""

import datetime
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import InitProcessGroupKwargs, gather_object, parse_flag_from_env
from datasets import Dataset
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from .. import progress as speech
from ..commands import if_stopped
from ..files import atomic_write, mark_output
from ..hub.errors import InputError
from ..metrics.scores import SeedsRecord
from .build import load_images
from .precision import SHOWN, bf16_slowdown, has_native_bf16, why
from .recipe import CamRecipe, Recipe, RunOptions, TrainingRecipe, max_side_of, variants_of
from .records import provenance, read_json, recipe_differences, recipe_parts, write_json

T = TypeVar("T")

TrainingSection: TypeAlias = Literal["train", "affinity", "segmentation"]
"""Sections of a recipe that train a network, each in the stage of the same name."""

LONGEST_WAIT = datetime.timedelta(hours=12)
"""How long processes wait for each other: one may list many files or refine label maps after the others are done."""


class StageError(InputError):
    """A stage that cannot run or has to stop; the message says why and what to do."""


def how_to_run(stage: str) -> str:
    """Return the advice for a message about the missing result of another stage."""
    return f"run the stage {stage} with the same recipe first: python -m bitrans_hf.stages {stage}"


@dataclass(frozen=True)
class Run:
    """A run as one of its stages sees it.

    Attributes:
        recipe: What is wanted.
        options: What does not change the result.
        accelerator: Device, precision and the processes that share the work.
    """

    recipe: Recipe
    options: RunOptions
    accelerator: Accelerator

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        options: RunOptions,
        section: TrainingSection = "train",
        *,
        trains: bool = False,
        network: Path | None = None,
    ) -> "Run":
        """Begin a stage: join the process group, choose device and precision.

        The precision "auto" is chosen for the device when a network starts to train, and then stays fixed: a resumed
        training and the stages that use the trained network keep that precision on any machine.

        Args:
            recipe: What is wanted.
            options: What does not change the result.
            section: The recipe's section of the stage that trains the network; `train` if the recipe lacks it.
            trains: Whether this is that stage, which uses trackers.
            network: Folder of the stage that trained the network; None for this run's.
        """
        settings: TrainingRecipe = getattr(recipe, section) or recipe.train
        folder = Path(recipe.output_dir) / recipe.name / section
        if options.quiet or not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
            disable_progress_bars()
        precision: str = settings.precision
        # Told so where there is nothing else: Accelerate would not join the processes that torchrun starts there.
        on_cpu = options.cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        if precision == "auto":
            precision = auto_precision(network or folder, PartialState(cpu=on_cpu, timeout=LONGEST_WAIT))
        if is_initialized() and AcceleratorState().mixed_precision != precision:
            # Stages follow each other in one process, and Accelerate has no public way to change the precision of one;
            # the process group, which is kept apart, stays.
            AcceleratorState._reset_state()
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=settings.gradient_accumulation,
            log_with=(options.trackers or None) if trains else None,
            project_dir=folder if trains else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
        return cls(recipe, options, accelerator)

    # ---- What the recipe says.

    @property
    def max_side(self) -> int:
        """Longest side in pixels at which images are processed."""
        return max_side_of(self.recipe)

    @property
    def variants(self) -> dict[str, tuple[str, bool]]:
        """The (mode, refine) pairs of the run's seeds by their names; a CNN, which has no attention, has one."""
        return variants_of(self.recipe)

    def images(self, split: str | None, *, masks: bool) -> Dataset:
        """Load a split; see `load_images`."""
        return load_images(self.recipe.data, split, masks=masks)

    def refuse_cnn(self, section: str) -> None:
        """Raise StageError if a section wants the run's own Bi-Trans encoder, and the run trains a CNN."""
        if isinstance(self.recipe.model, CamRecipe):
            raise StageError(
                f"{section}.backbone bitrans is the run's own encoder, and model.architecture cam has none; choose "
                f"{section}.backbone resnet38 or a timm network, with its {section}.weights."
            )

    # ---- Folders.

    @property
    def folder(self) -> Path:
        """Folder of all stages, `<output_dir>/<name>/`."""
        return Path(self.recipe.output_dir) / self.recipe.name

    def stage_folder(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / stage

    def is_done(self, stage: str) -> bool:
        """Return whether a stage is finished."""
        return (self.stage_folder(stage) / "done.json").is_file()

    def metrics(self, stage: str) -> Mapping[str, Any]:
        """Return the metrics of a stage; empty if it is not finished."""
        return read_json(self.stage_folder(stage) / "metrics.json") if self.is_done(stage) else {}

    def seed_threshold(self) -> float:
        """Return the background score that the seeds are cut at: the recipe's, or what "auto" found.

        Raises:
            StageError: it is "auto", and there are no seeds.
        """
        threshold = self.recipe.seeds.threshold
        if threshold != "auto":
            return threshold
        found = SeedsRecord.from_json(self.metrics("seeds")).cut_at
        if found is None:
            raise StageError(
                f'seeds.threshold "auto" is found when seeds are made, and there are none in '
                f"{self.stage_folder('seeds')}; {how_to_run('seeds')}."
            )
        return found

    def trained_model(self) -> Path:
        """Return the folder of the trained model.

        Raises:
            StageError: there is none.
        """
        folder = self.stage_folder("train") / "model"
        if not folder.is_dir():
            raise StageError(f"no trained model at {folder}; {how_to_run('train')}.")
        return folder

    def remove_unfinished(self, folder: Path) -> None:
        """Delete partial files of a killed run: files have hidden names until they are complete."""
        if self.accelerator.is_main_process:
            for path in folder.rglob(".*.tmp.*"):
                path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    # ---- Processes.

    def own(self, count: int) -> range:
        """Return this process's share of the indices below `count`."""
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def union(self, names: Iterable[str]) -> set[str]:
        """Return the union of the names that the processes give."""
        return set(gather_object(sorted(names)))

    def wait(self) -> None:
        """Wait for all processes."""
        if self.accelerator.num_processes > 1:
            with self.working("waiting for the other processes"):
                self.accelerator.wait_for_everyone()

    # ---- What is said: progress on stderr, results on stdout, all of it by the main process.

    @property
    def is_silent(self) -> bool:
        """Whether progress is hidden."""
        return self.options.quiet or not self.accelerator.is_main_process

    def progress(self, items: Iterable[T] | None, **shown: Any) -> "tqdm[T] | speech.ProgressLines[T]":
        """Show the progress of a loop; see `bitrans_hf.progress.progress`."""
        return speech.progress(items, quiet=self.is_silent, **shown)

    def working(self, what: str) -> AbstractContextManager[None]:
        """Report progress of a block that counts no items; see `bitrans_hf.progress.working`."""
        return speech.working(what, quiet=self.is_silent)

    def announce(self, message: str) -> None:
        """Print the plan of a stage."""
        if not self.is_silent:
            speech.say_progress(message)

    def say(self, message: str) -> None:
        """Print a result."""
        if self.accelerator.is_main_process:
            speech.say_result(message)

    def say_unreadable(self, image_ids: Iterable[str]) -> None:
        """Name the unusable images at the end of a stage."""
        names = sorted(set(image_ids))
        if names:
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            self.say(f"{len(names)} image(s) left out, unreadable or smaller than a patch: {shown}")

    def say_precision(self, section: TrainingSection) -> None:
        """Report the precision of a stage and its source, and the slowdown of bf16 on a device that emulates it."""
        settings: TrainingRecipe = getattr(self.recipe, section) or self.recipe.train
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        if settings.precision != "auto":
            reason = "as the recipe says"
        elif (precision == "bf16") == has_native_bf16(device):
            reason = why(device)
        else:
            reason = "as the network was trained so far"
        self.say(f"precision: {SHOWN[precision]} ({reason})")
        if precision == "bf16" and not has_native_bf16(device) and self.accelerator.is_main_process:
            advice = "" if settings.precision == "auto" else f"; --{section}.precision auto chooses float32 here"
            slowdown = bf16_slowdown(device)
            self.say(
                f"warning: {why(device)}; a linear layer takes {slowdown:.1f} times as long in bf16 as in "
                f"float32{advice}"
            )


# ---- Precision.


def auto_precision(network: Path, state: PartialState) -> str:
    """Return the precision of a network's training so far, else the best one for the device: "no" or "bf16".

    The first process decides if it finds the network; otherwise bf16 is chosen only if all devices support it.
    """
    found = gather_object([(trained_precision(network), has_native_bf16(state.device))])
    trained, _ = found[0]
    return trained or ("bf16" if all(native for _, native in found) else "no")


def trained_precision(stage: Path) -> str | None:
    """Return the precision of the newest checkpoint or of the finished network; None if neither is recorded."""
    checkpoint = newest_checkpoint(stage / "checkpoints")
    if checkpoint is not None:
        precision = read_json(checkpoint / "progress.json").get("precision")
        return None if precision is None else str(precision)
    path = stage / "metrics.json"
    shown = read_json(path).get("made_with", {}).get("precision") if path.is_file() else None
    return next((name for name, title in SHOWN.items() if title == shown), None)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder; None when there is none."""
    return max(folder.glob("step_*"), default=None)


# ---- The folder of a stage.


class Stage:
    """The folder `<output_dir>/<name>/<stage>/` with `recipe.json`, `log.jsonl`, `metrics.json` and `done.json`.

    Args:
        run: The main process of its accelerator writes.
        name: Name of the stage, and of its folder.
        depends_on: Parts of the recipe that the stage's result depends on: field names of `Recipe`.

    Raises:
        StageError: the folder holds results of another recipe.
    """

    def __init__(self, run: Run, name: str, depends_on: Sequence[str]):
        self.run, self.name, self.is_main = run, name, run.accelerator.is_main_process
        self.folder = run.stage_folder(name)
        self.recipe = recipe_parts(run.recipe, depends_on)
        self._started = time.perf_counter()
        self._made_with = provenance(run.accelerator)  # now: the checkout may be edited while a long stage runs
        if_stopped(lambda: f"in stage {name}; its finished files are kept")
        path = self.folder / "recipe.json"
        if self.is_main:
            mark_output(self.folder.parent)  # data.root may be the folder that the runs are in
        if path.is_file():
            different = recipe_differences(read_json(path), self.recipe)
            if different:
                raise StageError(
                    f"{self.folder} was made with another recipe (it differs in {', '.join(different)}); "
                    "use a new --name, go back to that recipe, or delete the folder to start over."
                )
        elif self.is_main:
            write_json(path, self.recipe)

    def was_done_before(self) -> bool:
        """Return whether the stage is finished, and report it if so."""
        is_done = self.run.is_done(self.name)
        if is_done:
            self.run.say(f"{self.name}: already done, {self.folder}")
        return is_done

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one JSON line to `log.jsonl`."""
        if self.is_main:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def forget_log_after(self, step: int) -> None:
        """Drop log lines of steps that a resumed run repeats, and a line that was cut off by a kill."""
        path = self.folder / "log.jsonl"
        if self.is_main and path.is_file():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    break
            with atomic_write(path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def finish(self, metrics: Mapping[str, Any], seconds: float | None = None) -> None:
        """Write `metrics.json`, including where and how it was measured, and `done.json`."""
        if not self.is_main:
            return
        elapsed = time.perf_counter() - self._started if seconds is None else seconds
        record = {**metrics, "seconds": round(elapsed, 1), "made_with": self._made_with}
        write_json(self.folder / "metrics.json", record)
        write_json(self.folder / "done.json", {"stage": self.name, "finished": time.strftime("%Y-%m-%d %H:%M:%S")})


def holds(recipe: Recipe, stage: str, depends_on: Sequence[str]) -> bool | None:
    """Return whether a stage's folder belongs to this recipe; None if it holds no recipe yet."""
    path = Path(recipe.output_dir) / recipe.name / stage / "recipe.json"
    return not recipe_differences(read_json(path), recipe_parts(recipe, depends_on)) if path.is_file() else None
