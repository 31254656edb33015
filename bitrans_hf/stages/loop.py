"""The loop that every stage that trains shares: rates, steps, log lines, checkpoints, resume, and saving the result.

A stage gives a model that returns its loss, a data set, an optimiser and a learning rate for each step:

    loop = TrainingLoop(recipe.affinity, stage, accelerator, options, model, optimizer, dataset, rate, recipe.seed)
    metrics = loop.run(validate)
    loop.finish(metrics, processor)
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import PreTrainedModel

from ..commands import children_without_signals, if_stopped
from ..metrics import parameter_count
from ..progress import Counter
from .recipe import LoopSettings, RunOptions
from .run import Checkpoints, ShardedBatches, Stage, announce, progress, say, say_unreadable, stop_if_not_finite

NOT_FOR_THE_MODEL = ("index", "unreadable")
"""Keys of a batch that the loop reads itself; all others are arguments of the model's forward."""


class TrainingSet(Protocol):
    """A data set as the loop needs it; `bitrans_hf.data.transforms.TrainingImages` is one.

    Item `index` of an epoch is a function of (seed, epoch, index) alone, so that a resumed run sees the same. It holds
    the arguments of the model's forward, "index" (of the image that is shown) and "unreadable" (the id of an image
    that another one stands in for, or "").
    """

    image_ids: list[str]

    def set_epoch(self, epoch: int) -> None: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate of each optimiser step.

    Attributes:
        kind: "epoch_cosine" is timm's cosine schedule as MCTformer drives it: stepped after each epoch with that
            epoch's index, warm-up not prefixed, so that epochs 0 and 1 both run at the warm-up rate and the cosine
            starts late. "step_cosine" changes at every step. "poly" is (1 - step / steps) ** power, without warm-up,
            as PSA and DeepLab have it.
        peak: Highest rate.
        epochs: Length of the run.
        last: Last rate of the cosines.
        first: First rate of the warm-up.
        warmup_epochs: Length of the linear warm-up.
        power: Of "poly".
    """

    kind: Literal["epoch_cosine", "step_cosine", "poly"]
    peak: float
    epochs: int
    last: float = 0.0
    first: float = 0.0
    warmup_epochs: float = 0.0
    power: float = 0.9

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        """Return the rate of optimiser step `step` (from 0)."""
        if self.kind == "poly":
            return float(self.peak * (1 - step / (self.epochs * steps_per_epoch)) ** self.power)
        now: float
        length: float
        if self.kind == "epoch_cosine":
            now, length, warmup = max(0, step // steps_per_epoch - 1), self.epochs, self.warmup_epochs
        else:
            warmup = self.warmup_epochs * steps_per_epoch
            now, length = step, self.epochs * steps_per_epoch
        if now < warmup:
            return self.first + now * (self.peak - self.first) / warmup
        if self.kind == "step_cosine":  # the cosine takes what the warm-up leaves
            now, length = now - warmup, length - warmup
        return self.last + 0.5 * (self.peak - self.last) * (1 + math.cos(math.pi * now / length))


class TrainingLoop:
    """The epochs of a run: steps, log lines, validation and checkpoints.

    Making one compiles and distributes the model, and restores the newest checkpoint of a run that was killed; `run`
    then goes on from there and ends with the weights of a run that was not.

    Args:
        settings: The recipe's section of the stage.
        stage: Where the log, the checkpoints and the result go; it is called as the section.
        accelerator: From `make_accelerator` with the same settings.
        options: Of the run.
        model: Its forward takes the items of the data set and returns `loss`, and `losses` (name -> term) or None.
        optimizer: A parameter group may hold "rate_multiplier", by which its learning rate differs (1 without).
        dataset: What to train on.
        rate: Optimiser step and steps of an epoch -> learning rate.
        seed: Of the order of the images and of what the model draws.
        more_inputs: Optimiser step and steps of an epoch -> arguments of the model's forward beside the batch.

    Raises:
        StageError: too few images for one step, or a checkpoint of another number of processes.
    """

    def __init__(
        self,
        settings: LoopSettings,
        stage: Stage,
        accelerator: Accelerator,
        options: RunOptions,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        dataset: TrainingSet,
        rate: Callable[[int, int], float],
        seed: int,
        more_inputs: Callable[[int, int], Mapping[str, Any]] | None = None,
    ):
        self.settings, self.stage, self.accelerator, self.options = settings, stage, accelerator, options
        self.dataset, self.rate, self.more_inputs = dataset, rate, more_inputs
        self.batches = ShardedBatches(
            len(dataset),
            settings.batch_size,
            accelerator.num_processes,
            accelerator.process_index,
            settings.gradient_accumulation,
            seed,
            stage.name,
        )
        self.images_per_step = images_per_step(settings, accelerator)
        self.steps_per_epoch = self.batches.batches_per_epoch // settings.gradient_accumulation
        self.loader: torch.utils.data.DataLoader[dict[str, Any]] = torch.utils.data.DataLoader(
            cast("torch.utils.data.Dataset[dict[str, Any]]", dataset),
            batch_sampler=self.batches,
            num_workers=settings.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            # Its own generator: a loader draws a number whenever it is iterated, and stochastic depth draws from
            # torch's, which has to be the same whether or not the run was resumed.
            generator=torch.Generator(),
        )
        if settings.compile:
            model.compile(fullgraph=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # Each process drops other branches; after `prepare`, which must see equal weights everywhere.
        set_seed(seed, device_specific=True)

        self.checkpoints = Checkpoints(stage.folder / "checkpoints", accelerator)
        start: dict[str, Any] = {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0, "unreadable": []}
        self.state = self.checkpoints.load_newest() or start
        if self.state["step"]:
            say(
                accelerator,
                f"{stage.name}: going on after step {self.state['step']} (epoch {self.state['epoch']})",
            )
        self.saved_step = self.state["step"]
        stage.forget_log_after(self.saved_step)
        if settings.trackers:
            accelerator.init_trackers("bitrans_hf", config=flat(stage.recipe))

    def run(self, validate: Callable[[], dict[str, float]] | None = None) -> dict[str, Any]:
        """Train to the last epoch; return the last losses and scores, "steps", "seconds" and "unreadable" image ids.

        Args:
            validate: Called after each epoch; returns scores of the model as it is, equal in all processes.
        """
        state, epochs = self.state, self.settings.epochs
        self.started = time.perf_counter() - state["seconds"]
        total = epochs * self.steps_per_epoch
        if_stopped(self._kept)
        announce(self._plan(total), self.accelerator, self.options)
        result: dict[str, Any] = {}
        bar: Counter
        with progress(
            None, self.accelerator, self.options, desc=self.stage.name, unit="step", total=total, initial=state["step"]
        ) as bar:
            for epoch in range(state["epoch"], epochs):
                averages = self._epoch(epoch, state["batch"] if epoch == state["epoch"] else 0, bar)
                scores = validate() if validate else {}
                entry = {"step": state["step"], "epoch": epoch + 1, **scores}
                self.stage.log(entry)
                self.accelerator.log(scores, step=state["step"])
                result = {**averages, **scores}
                self._checkpoint(epoch + 1, 0, result)
                shown = ", ".join(f"{name} {value:.3f}" for name, value in result.items())
                say(self.accelerator, f"epoch {epoch + 1}/{epochs}: {shown}")
        if not result:  # resumed after the last epoch
            result = dict(state["result"])
        unreadable = sorted(set(gather_object(state["unreadable"])))
        return {**result, "steps": state["step"], "seconds": self._seconds(), "unreadable": unreadable}

    def finish(self, metrics: Mapping[str, Any], *more: Any) -> None:
        """Save the model as `<stage>/model/`, write what was measured, and delete the checkpoints.

        Args:
            metrics: What `run` returned and what the stage adds; "parameters_million" is filled in.
            more: What else goes into the folder by its `save_pretrained`: an image processor.
        """
        record = dict(metrics)
        if_stopped(lambda: f"in stage {self.stage.name} while the model is saved; the last checkpoint is kept")
        if self.accelerator.is_main_process:
            unfinished, finished = self.stage.folder / "model.unfinished", self.stage.folder / "model"
            unwrapped = self.accelerator.unwrap_model(self.model)
            for part in (unwrapped, *more):
                part.save_pretrained(unfinished)
            shutil.rmtree(finished, ignore_errors=True)
            unfinished.replace(finished)
            record["parameters_million"] = parameter_count(unwrapped)
        self.stage.finish(record, seconds=metrics["seconds"])
        self.checkpoints.clear()
        if self.settings.trackers:
            # Not `end_training`: it also ends the process group, which the next stage needs.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        say_unreadable(self.accelerator, metrics["unreadable"])

    def _epoch(self, epoch: int, first_batch: int, bar: Any) -> dict[str, float]:
        """Run one epoch from `first_batch`; return the means of its last log window."""
        accelerator, settings, state = self.accelerator, self.settings, self.state
        self.dataset.set_epoch(epoch)
        self.batches.start_at(epoch, first_batch)
        self.model.train()
        window: list[dict[str, float]] = []
        averages: dict[str, float] = {}
        window_started, steps_in_window = time.perf_counter(), 0
        with children_without_signals():
            batches = iter(self.loader)
        for number, batch in enumerate(batches, start=first_batch + 1):
            rate = self.rate(state["step"], self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("rate_multiplier", 1.0)
            state["unreadable"] += [name for name in batch["unreadable"] if name and name not in state["unreadable"]]
            inputs = {
                name: value.to(accelerator.device, non_blocking=True)
                for name, value in batch.items()
                if name not in NOT_FOR_THE_MODEL
            }
            if self.more_inputs is not None:
                inputs |= self.more_inputs(state["step"], self.steps_per_epoch)
            with accelerator.accumulate(self.model):
                output = self.model(**inputs)
                terms = getattr(output, "losses", None) or {}
                losses = {"loss": output.loss.item(), **{name: term.item() for name, term in terms.items()}}
                shown = [self.dataset.image_ids[i] for i in batch["index"]]
                stop_if_not_finite(losses, state["step"], shown, self.stage.name)
                window.append(losses)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients and settings.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            steps_in_window += 1
            bar.update()
            if state["step"] % settings.log_every == 0 or number == self.batches.batches_per_epoch:
                averages = {
                    name: float(np.mean([entry[name] for part in gather_object([window]) for entry in part]))
                    for name in losses
                }
                speed = steps_in_window * self.images_per_step / (time.perf_counter() - window_started)
                entry = {"lr": rate, "images_per_second": round(speed, 2), **averages}
                done = round(number / self.batches.batches_per_epoch + epoch, 4)
                self.stage.log({"step": state["step"], "epoch": done, **entry})
                accelerator.log(entry, step=state["step"])
                bar.set_postfix(loss=f"{averages['loss']:.3f}", images_per_second=f"{speed:.1f}")
                window, window_started, steps_in_window = [], time.perf_counter(), 0
            every = settings.checkpoint_every
            if every and state["step"] % every == 0 and number < self.batches.batches_per_epoch:
                self._checkpoint(epoch, number, {})
        return averages

    def _checkpoint(self, epoch: int, batch: int, result: dict[str, float]) -> None:
        # Every process goes on from the main one's state, which has to hold what the others could not read.
        unreadable = sorted(set(gather_object(self.state["unreadable"])))
        self.state |= {"epoch": epoch, "batch": batch, "seconds": self._seconds(), "result": result}
        self.state["unreadable"] = unreadable
        self.checkpoints.save(self.state["step"], self.state)
        self.saved_step = self.state["step"]

    def _plan(self, total: int) -> str:
        """Say what the run will do."""
        settings, accelerator, per_step = self.settings, self.accelerator, self.images_per_step
        left = f", {total - self.state['step']:,} of them left" if self.state["step"] else ""
        return (
            f"{self.stage.name}: {len(self.dataset):,} images, {settings.epochs} epochs, {total:,} steps of "
            f"{per_step} images{left}; batch size {settings.batch_size}, {accelerator.num_processes} process(es), "
            f"device {accelerator.device.type}"
        )

    def _kept(self) -> str:
        """Say what a stop leaves."""
        where = f"in stage {self.stage.name} after step {self.state['step']}"
        if self.saved_step:
            return f"{where}; the checkpoint of step {self.saved_step} is kept"
        return f"{where}, before its first checkpoint; earlier stages are kept"

    def _seconds(self) -> float:
        return float(round(time.perf_counter() - self.started, 1))


def images_per_step(settings: LoopSettings, accelerator: Accelerator) -> int:
    """Return how many images one optimiser step sees, over all processes."""
    return int(settings.batch_size * settings.gradient_accumulation * accelerator.num_processes)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a recipe for trackers, which take numbers and strings only."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result
