"""What every stage shares: its folder, its records, devices and processes, checkpoints, and a stop on bad losses."""

import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import InitProcessGroupKwargs, gather_object, parse_flag_from_env
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from .. import __version__
from .. import progress as speech
from ..commands import if_stopped
from ..files import atomic_write, mark_output
from ..hub.errors import InputError
from .precision import SHOWN, bf16_slowdown, has_native_bf16, why
from .recipe import LoopSettings, Recipe, RunOptions

T = TypeVar("T")

TrainingSection: TypeAlias = Literal["train", "affinity", "segmentation"]
"""Sections of a recipe that train a network, each in the stage of the same name."""


class StageError(InputError):
    """A stage cannot run, or has to stop; the message says why and what to do."""


LONGEST_WAIT = datetime.timedelta(hours=12)
"""How long processes wait for each other: one may list many files or refine label maps while the others are done."""


def make_accelerator(
    recipe: Recipe,
    options: RunOptions,
    section: TrainingSection = "train",
    *,
    trains: bool = False,
    network: Path | None = None,
) -> Accelerator:
    """Return the process group, device and precision of a stage.

    The precision "auto" is chosen for the device when a network starts to train. From then on it stays: a run that
    goes on from a checkpoint, and the stages that use the trained network, have the precision it was trained in,
    whatever machine they run on.

    Args:
        recipe: Of the run.
        options: Of the run.
        section: The recipe's section of the stage that trains the network; without it in the recipe, `train`.
        trains: Whether this is that stage, which has trackers.
        network: Folder of the stage that trained the network; None for the run's own.
    """
    settings: LoopSettings = getattr(recipe, section) or recipe.train
    folder = Path(recipe.output_dir) / recipe.name / section
    if options.quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()
    precision: str = settings.precision
    if precision == "auto":
        on_cpu = options.cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # as Accelerator does
        precision = auto_precision(network or folder, PartialState(cpu=on_cpu, timeout=LONGEST_WAIT))
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        # Stages follow each other in one process, and Accelerate has no public way to change the precision of one; the
        # process group, which is kept apart, stays.
        AcceleratorState._reset_state()
    return Accelerator(
        cpu=options.cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=settings.gradient_accumulation,
        log_with=(settings.trackers or None) if trains else None,
        project_dir=folder if trains else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


def auto_precision(network: Path, state: PartialState) -> str:
    """Return the precision that a stage's network was trained in so far, else the one for the device: "no" or "bf16".

    The answer is that of the first process where it knows the network, and bf16 only where all devices have it.
    """
    found = gather_object([(trained_precision(network), has_native_bf16(state.device))])
    trained, _ = found[0]
    return trained or ("bf16" if all(native for _, native in found) else "no")


def trained_precision(stage: Path) -> str | None:
    """Return the precision of the newest checkpoint, or of the finished network; None where nothing says so."""
    checkpoint = newest_checkpoint(stage / "checkpoints")
    if checkpoint is not None:
        precision = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")).get("precision")
        return None if precision is None else str(precision)
    path = stage / "metrics.json"
    shown = (
        json.loads(path.read_text(encoding="utf-8")).get("made_with", {}).get("precision") if path.is_file() else None
    )
    return next((name for name, title in SHOWN.items() if title == shown), None)


def say_precision(accelerator: Accelerator, recipe: Recipe, section: TrainingSection) -> None:
    """Say the precision of a stage and where it comes from, and what bf16 costs on a device that emulates it."""
    settings: LoopSettings = getattr(recipe, section) or recipe.train
    device, precision = accelerator.device, accelerator.mixed_precision
    if settings.precision != "auto":
        reason = "as the recipe says"
    elif (precision == "bf16") == has_native_bf16(device):
        reason = why(device)
    else:
        reason = "as the network was trained so far"
    say(accelerator, f"precision: {SHOWN[precision]} ({reason})")
    if precision == "bf16" and not has_native_bf16(device) and accelerator.is_main_process:
        advice = "" if settings.precision == "auto" else f"; --{section}.precision auto chooses float32 here"
        slowdown = bf16_slowdown(device)
        say(
            accelerator,
            f"warning: {why(device)}; a linear layer takes {slowdown:.1f} times as long in bf16 as in float32{advice}",
        )


# ---- The folder of a stage.


class Stage:
    """The folder `<output_dir>/<name>/<stage>/` with `recipe.json`, `log.jsonl`, `metrics.json` and `done.json`.

    Args:
        recipe: Of the run.
        name: Of the stage.
        depends_on: Parts of the recipe that the stage's result depends on: field names of `Recipe`.
        accelerator: Of the stage; its main process writes.

    Raises:
        StageError: the folder holds results of another recipe.
    """

    def __init__(self, recipe: Recipe, name: str, depends_on: Sequence[str], accelerator: Accelerator):
        self.name, self.is_main = name, accelerator.is_main_process
        self.folder = Path(recipe.output_dir) / recipe.name / name
        self.recipe = recipe_parts(recipe, depends_on)
        self._started = time.perf_counter()
        self._made_with = provenance(accelerator)  # now: the checkout may be edited while a long stage runs
        if_stopped(lambda: f"in stage {name}; its finished files are kept")
        path = self.folder / "recipe.json"
        if self.is_main:
            mark_output(self.folder.parent)  # data.root may be the folder that the runs are in
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(recipe_differences(stored, self.recipe))
            if different:
                raise StageError(
                    f"{self.folder} was made with another recipe (it differs in {', '.join(different)}); "
                    "choose another --name, go back to that recipe, or delete the folder to start again."
                )
        elif self.is_main:
            write_json(path, self.recipe)

    @property
    def done(self) -> bool:
        """Whether the stage is finished."""
        return (self.folder / "done.json").is_file()

    def metrics(self) -> dict[str, Any]:
        """Return what the finished stage measured."""
        return dict(json.loads((self.folder / "metrics.json").read_text(encoding="utf-8")))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one JSON line to `log.jsonl`."""
        if self.is_main:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def forget_log_after(self, step: int) -> None:
        """Drop the log lines of steps that will be run again after a resume, and a line that a kill cut off."""
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
        """Write `metrics.json`, with where and how they were measured, and `done.json`."""
        if not self.is_main:
            return
        elapsed = time.perf_counter() - self._started if seconds is None else seconds
        record = {**metrics, "seconds": round(elapsed, 1), "made_with": self._made_with}
        write_json(self.folder / "metrics.json", record)
        write_json(self.folder / "done.json", {"stage": self.name, "finished": time.strftime("%Y-%m-%d %H:%M:%S")})


def remove_unfinished(folder: Path, accelerator: Accelerator) -> None:
    """Delete the files that a killed run was writing: `atomic_write` gives them hidden names until they are whole."""
    if accelerator.is_main_process:
        for path in folder.rglob(".*.tmp.*"):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def holds(recipe: Recipe, stage: str, depends_on: Sequence[str]) -> bool | None:
    """Say whether a stage's folder is of this recipe; None where it holds no recipe, as before the first start."""
    path = Path(recipe.output_dir) / recipe.name / stage / "recipe.json"
    if not path.is_file():
        return None
    return not any(recipe_differences(json.loads(path.read_text(encoding="utf-8")), recipe_parts(recipe, depends_on)))


def recipe_parts(recipe: Recipe, depends_on: Sequence[str]) -> dict[str, Any]:
    """Return the named fields of a recipe as plain values."""
    resolved = dataclasses.asdict(recipe)
    return {key: resolved[key] for key in depends_on}


def recipe_differences(stored: Any, wanted: Any, prefix: str = "") -> Iterator[str]:
    """Give the dotted names of the keys that differ; a key that is not there equals null."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in stored.keys() | wanted.keys():
            yield from recipe_differences(stored.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
    elif stored != wanted:
        yield prefix


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file by atomic rename; nan, the score of an absent class, becomes null: JSON knows no nan."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_nan_to_none(content), indent=2) + "\n", encoding="utf-8")


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def provenance(accelerator: Accelerator | None = None) -> dict[str, str]:
    """Return the code's commit, the versions and the hardware that a number was measured with.

    Args:
        accelerator: Its device and precision are recorded; None for work that only CPUs do.
    """
    device = f"{os.cpu_count()} CPU cores"
    if accelerator is not None and accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
    elif accelerator is not None and accelerator.device.type != "cpu":
        device = str(accelerator.device)
    record = {
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "bitrans_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }
    return record if accelerator is None else {**record, "precision": SHOWN[accelerator.mixed_precision]}


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, with "-modified" where files differ from it; "unknown" where there is none.

    An installed package has none of its own, although it may lie inside a checkout of something else.
    """
    if not (checkout / ".git").exists():
        return "unknown"
    try:
        commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
        return commit + ("-modified" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def model_folder(recipe: Recipe) -> Path:
    """Return the folder of the run's trained model.

    Raises:
        StageError: there is none.
    """
    folder = Path(recipe.output_dir) / recipe.name / "train" / "model"
    if not folder.is_dir():
        raise StageError(f"no trained model at {folder}; run training/train.py with the same recipe first.")
    return folder


def refuse_cnn(recipe: Recipe, section: str) -> None:
    """Raise StageError if a section of the recipe wants the run's own Bi-Trans encoder, and the run trains a CNN."""
    if recipe.model.architecture == "cam":
        raise StageError(
            f"{section}.backbone bitrans is the run's own encoder, and model.architecture cam has none; choose "
            f"{section}.backbone resnet38 or a timm network, with its {section}.weights."
        )


# ---- Progress and processes.


def progress(
    items: Iterable[T] | None, accelerator: Accelerator, options: RunOptions, **shown: Any
) -> "tqdm[T] | speech.ProgressLines[T]":
    """Show the progress of a loop, in the main process; see `bitrans_hf.progress.progress`."""
    return speech.progress(items, quiet=options.quiet or not accelerator.is_main_process, **shown)


def working(what: str, accelerator: Accelerator, options: RunOptions) -> AbstractContextManager[None]:
    """Say what is done while a block runs that counts no items; see `bitrans_hf.progress.working`."""
    return speech.working(what, quiet=options.quiet or not accelerator.is_main_process)


def announce(message: str, accelerator: Accelerator, options: RunOptions) -> None:
    """Print what will be done on stderr, from the main process."""
    if accelerator.is_main_process and not options.quiet:
        speech.say_progress(message)


def wait_for_everyone(accelerator: Accelerator, options: RunOptions) -> None:
    """Wait until all processes have done their share."""
    if accelerator.num_processes > 1:
        with working("waiting for the other processes", accelerator, options):
            accelerator.wait_for_everyone()


def say(accelerator: Accelerator, message: str) -> None:
    """Print a result on stdout, from the main process."""
    if accelerator.is_main_process:
        speech.say_result(message)


def say_unreadable(accelerator: Accelerator, image_ids: Iterable[str]) -> None:
    """Name the images that could not be used, at the end of a stage."""
    names = sorted(set(image_ids))
    if names:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        say(accelerator, f"{len(names)} image(s) left out, unreadable or smaller than a patch: {shown}")


# ---- The order of the images.


class ShardedBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of one process in one epoch: a shuffled order that is a function of (seed, epoch) alone.

    Every process computes the same order and takes its own part of each global batch, so that a run can go on in the
    middle of an epoch by skipping batches. Images that do not fill a last optimiser step are left out of the epoch,
    as the reference's drop_last does.

    Args:
        num_images: Size of the data set.
        batch_size: Images for this process and forward pass.
        num_processes: Processes that train together.
        process_index: This one's number.
        accumulation: Forward passes for each optimiser step.
        seed: Of the order.
        section: Of the recipe that says how to train, for messages.

    Raises:
        StageError: there are too few images for one step.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        num_processes: int,
        process_index: int,
        accumulation: int,
        seed: int,
        section: str = "train",
    ):
        per_step = batch_size * num_processes * accumulation
        if num_images < per_step:
            raise StageError(
                f"{num_images} training images do not fill one optimiser step of {per_step} (batch_size {batch_size} "
                f"x {num_processes} process(es) x gradient_accumulation {accumulation}); lower {section}.batch_size."
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.batches_per_epoch = num_images // per_step * accumulation
        self.epoch, self.first_batch = 0, 0

    def start_at(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and how many of its batches were already used."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for batch in range(self.first_batch, self.batches_per_epoch):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            yield order[start : start + self.batch_size]


# ---- Checkpoints.


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder; None when there is none."""
    return max(folder.glob("step_*"), default=None)


class Checkpoints:
    """The newest state of a training run, `<folder>/step_<number>/`, written aside and renamed when complete.

    Args:
        folder: Of the checkpoints.
        accelerator: Saves and restores model, optimiser and random states of all processes.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def save(self, step: int, progress_state: Mapping[str, Any]) -> None:
        """Save after optimiser step `step`, then delete older ones."""
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

    def load_newest(self) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint and return its progress; None when there is none.

        Raises:
            StageError: it was made with another number of processes, which changes every batch.
        """
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return None
        state = dict(json.loads((newest / "progress.json").read_text(encoding="utf-8")))
        if state["num_processes"] != self.accelerator.num_processes:
            raise StageError(
                f"{newest} was made by {state['num_processes']} process(es), this run has "
                f"{self.accelerator.num_processes}; start as many, or delete the folder to start again."
            )
        self.accelerator.load_state(str(newest))
        return state

    def clear(self) -> None:
        """Delete all checkpoints, once the finished model is saved."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


def stop_if_not_finite(
    losses: Mapping[str, float], step: int, image_ids: Sequence[str], section: str = "train"
) -> None:
    """Stop a run whose loss is NaN or infinite; `section` is the recipe's that sets the learning rate.

    Raises:
        StageError: with the step, the term and the images of the batch.
    """
    broken = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    if broken:
        raise StageError(
            f"the loss is not finite at optimiser step {step} ({', '.join(broken)}); the batch held the images "
            f"{', '.join(image_ids)}. Lower {section}.learning_rate or look at these images; the last checkpoint is "
            "kept."
        )
