"""The loop that every stage that trains shares: rates, steps, log lines, checkpoints, resume, and saving the result.

A stage provides a model that returns its loss, a data set, an optimizer and a learning rate for each step:

    loop = TrainingLoop(recipe.affinity, stage, model, optimizer, dataset, rate)
    metrics = loop.run(validate)
    loop.finish(metrics, processor)
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import PreTrainedModel

from ..commands import children_without_signals, if_stopped
from ..data.training_set import Item
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..metrics import parameter_count
from ..progress import Counter
from .checkpoints import Checkpoints, step_of
from .recipe import TrainingRecipe
from .run import Stage, StageError, newest_checkpoint

NOT_FOR_THE_MODEL = ("index", "unreadable")
"""Keys of a batch that the loop consumes; all others are arguments of the model's forward pass."""


class TrainingSet(Protocol):
    """The interface of a data set for the loop, as `bitrans_hf.data.transforms.TrainingImages` implements it.

    Item `index` of an epoch depends on (seed, epoch, index) alone, so that a resumed run sees the same items. It holds
    the arguments of the model's forward pass, "index" (of the image used) and "unreadable" (the id of an image that
    was replaced, or "").
    """

    image_ids: list[str]

    def set_epoch(self, epoch: int) -> None: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate of each optimizer step.

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
        """Return the rate of optimizer step `step` (from 0)."""
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


@dataclass
class Means:
    """Mean losses over several batches, of this process or of all.

    Attributes:
        sums: Name of the loss -> sum over the batches.
        count: Number of batches.
    """

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, losses: Mapping[str, float]) -> None:
        """Add the losses of a batch."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
        self.count += 1

    def of_all(self) -> "Means":
        """Return the sums and the count over all processes."""
        parts: list[Means] = gather_object([self])
        sums = {name: math.fsum(part.sums.get(name, 0.0) for part in parts) for name in self.sums}
        return Means(sums, sum(part.count for part in parts))

    def values(self) -> dict[str, float]:
        """Return the means, rounded to six decimals: further digits depend on the order of summation."""
        return {name: round(total / self.count, 6) for name, total in self.sums.items()}


@dataclass
class Position:
    """Progress of a training: what a checkpoint holds besides weights and random states.

    Attributes:
        step: Finished optimizer steps.
        epoch: Finished epochs.
        batch: Finished batches of the current epoch.
        seconds: Wall time so far.
        unreadable: Ids of images that could not be read.
        losses: Losses of the current epoch, of all processes.
        result: Losses and scores of the last epoch.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)
    losses: Means = field(default_factory=Means)
    result: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None) -> "Position":
        """Return the position in a checkpoint; the start if there is none."""
        known = {key: value for key, value in (stored or {}).items() if key in cls.__dataclass_fields__}
        return cls(**{**known, "losses": Means(**known.get("losses", {}))})


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes:
        scores: Mean losses of the last epoch, and its validation scores.
        steps: Optimizer steps of the whole run.
        seconds: Wall time of the whole run.
        unreadable: Ids of the images that could not be read.
    """

    scores: Mapping[str, float]
    steps: int
    seconds: float
    unreadable: Sequence[str]


class TrainingLoop:
    """The epochs of a run: steps, log lines, validation and checkpoints.

    The constructor compiles and distributes the model, and restores the newest checkpoint of a killed run; `run`
    continues from there and ends with the same weights as an uninterrupted run.

    Args:
        settings: The recipe's section of the stage.
        stage: Receives the log, the checkpoints and the result; named like its recipe section.
        model: Its forward pass takes the items of the data set and returns `loss`, and `losses` (name -> term) or
            None.
        optimizer: A parameter group may hold "rate_multiplier", by which its learning rate differs (1 without).
        dataset: What to train on.
        rate: Optimizer step and steps of an epoch -> learning rate.
        more_inputs: Optimizer step and steps of an epoch -> further arguments of the model's forward pass.

    Raises:
        StageError: too few images for one step, or a checkpoint from another number of processes.
    """

    def __init__(
        self,
        settings: TrainingRecipe,
        stage: Stage,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        dataset: TrainingSet,
        rate: Callable[[int, int], float],
        more_inputs: Callable[[int, int], Mapping[str, Any]] = lambda step, steps_per_epoch: {},
    ):
        self.settings, self.stage, self.dataset = settings, stage, dataset
        self.rate, self.more_inputs, self.trackers = rate, more_inputs, stage.run.options.trackers
        self.accelerator, self.started = stage.run.accelerator, time.perf_counter()
        self.images_per_step = images_per_step(settings, self.accelerator)
        self.batches = ShardedBatches(len(dataset), settings, self.accelerator, stage.run.recipe.seed, stage.name)
        self.steps_per_epoch = self.batches.batches_per_epoch // settings.gradient_accumulation
        self.loader: torch.utils.data.DataLoader[Item] = torch.utils.data.DataLoader(
            cast("torch.utils.data.Dataset[Item]", dataset),
            batch_sampler=self.batches,
            num_workers=stage.run.options.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # Its own generator: a loader draws a number whenever it is iterated, and stochastic depth draws from
            # torch's, which has to be the same whether or not the run was resumed.
            generator=torch.Generator(),
        )
        if settings.compile:
            model.compile(fullgraph=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Each process drops other branches; after `prepare`, which must see equal weights everywhere.
        set_seed(stage.run.recipe.seed, device_specific=True)
        self._resume()
        if self.trackers:
            self.accelerator.init_trackers("bitrans_hf", config=flat(stage.recipe))

    def _resume(self) -> None:
        """Restore the newest checkpoint, if there is one."""
        self.checkpoints = Checkpoints(self.stage.folder / "checkpoints", self.accelerator)
        self.at = Position.of(self.checkpoints.load_newest())
        if not self.accelerator.is_main_process:
            self.at.losses = Means()  # those of all processes go on in the first one
        if self.at.step:
            self.stage.run.say(f"{self.stage.name}: resuming after step {self.at.step} (epoch {self.at.epoch})")
        self.stage.forget_log_after(self.at.step)

    def run(self, validate: Callable[[], dict[str, float]] | None = None) -> "Trained":
        """Train to the last epoch.

        Args:
            validate: Called after each epoch; returns scores of the model as it is, equal in all processes.
        """
        run, epochs = self.stage.run, self.settings.epochs
        self.started = time.perf_counter() - self.at.seconds
        total = epochs * self.steps_per_epoch
        if_stopped(self._kept)
        run.announce(self._plan(total))
        bar: Counter
        with run.progress(None, desc=self.stage.name, unit="step", total=total, initial=self.at.step) as bar:
            for epoch in range(self.at.epoch, epochs):
                self._epoch(bar)
                scores = validate() if validate else {}
                self.stage.log({"step": self.at.step, "epoch": epoch + 1, **scores})
                self.accelerator.log(scores, step=self.at.step)
                self.at.result = {**self.at.losses.of_all().values(), **scores}
                self.at.epoch, self.at.batch, self.at.losses = epoch + 1, 0, Means()
                self._checkpoint()
                shown = ", ".join(f"{name} {value:.3f}" for name, value in self.at.result.items())
                run.say(f"epoch {epoch + 1}/{epochs}: {shown}")
        unreadable = sorted(run.union(self.at.unreadable))
        return Trained(self.at.result, self.at.step, self._seconds(), unreadable)

    def finish(self, trained: "Trained", processor: BiTransImageProcessor, **measured: Any) -> None:
        """Save the model as `<stage>/model/`, write what was measured, and delete the checkpoints.

        Args:
            trained: What `run` returned.
            processor: Image processor that goes into the folder with the model.
            measured: Further metrics of the stage, for `metrics.json`.
        """
        if_stopped(lambda: f"in stage {self.stage.name} while the model is saved; the last checkpoint is kept")
        if self.accelerator.is_main_process:
            unfinished, finished = self.stage.folder / "model.unfinished", self.stage.folder / "model"
            unwrapped = self.accelerator.unwrap_model(self.model)
            unwrapped.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            shutil.rmtree(finished, ignore_errors=True)
            unfinished.replace(finished)
            measured["parameters_million"] = parameter_count(unwrapped)
        record = {**trained.scores, "steps": trained.steps, "unreadable": trained.unreadable, **measured}
        self.stage.finish(record, seconds=trained.seconds)
        self.checkpoints.clear()
        if self.trackers:
            # Not `end_training`: it also ends the process group, which the next stage needs.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.stage.run.say_unreadable(trained.unreadable)

    def _epoch(self, bar: Counter) -> None:
        """Run the rest of an epoch."""
        options, at, last = self.stage.run.options, self.at, self.batches.batches_per_epoch
        self.dataset.set_epoch(at.epoch)
        self.batches.start_at(at.epoch, at.batch)
        self.model.train()
        window, window_started, first_step = Means(), time.perf_counter(), at.step
        with children_without_signals():
            batches = iter(self.loader)
        for batch in batches:
            rate = self._set_rate()
            losses = self._forward_backward(batch)
            window.add(losses)
            at.losses.add(losses)
            at.batch += 1
            if not self.accelerator.sync_gradients:
                continue
            at.step += 1
            bar.update()
            if at.step % options.log_every == 0 or at.batch == last:
                speed = (at.step - first_step) * self.images_per_step / (time.perf_counter() - window_started)
                self._log(rate, speed, window.of_all().values(), bar)
                window, window_started, first_step = Means(), time.perf_counter(), at.step
            if options.checkpoint_every and at.step % options.checkpoint_every == 0 and at.batch < last:
                self._checkpoint()

    def _set_rate(self) -> float:
        """Set the optimizer's learning rate for this step, and return it."""
        rate = self.rate(self.at.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_multiplier", 1.0)
        return rate

    def _forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Run the forward and backward pass of a batch; return its losses. A step's last batch updates the weights."""
        accelerator, unreadable = self.accelerator, self.at.unreadable
        unreadable += [name for name in batch["unreadable"] if name and name not in unreadable]
        inputs = {
            name: value.to(accelerator.device, non_blocking=True)
            for name, value in batch.items()
            if name not in NOT_FOR_THE_MODEL
        }
        with accelerator.accumulate(self.model):
            output = self.model(**inputs, **self.more_inputs(self.at.step, self.steps_per_epoch))
            terms = {"loss": output.loss, **(getattr(output, "losses", None) or {})}
            # One copy from the device for all of them.
            values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
            losses = dict(zip(terms, values, strict=True))
            shown = [self.dataset.image_ids[index] for index in batch["index"]]
            stop_if_not_finite(losses, self.at.step, shown, self.stage.name)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients and self.settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses

    def _log(self, rate: float, speed: float, losses: Mapping[str, float], bar: Counter) -> None:
        """Write a log line, report to the trackers, and show the loss in the bar."""
        entry = {"lr": rate, "images_per_second": round(speed, 2), **losses}
        epochs = round(self.at.batch / self.batches.batches_per_epoch + self.at.epoch, 4)
        self.stage.log({"step": self.at.step, "epoch": epochs, **entry})
        self.accelerator.log(entry, step=self.at.step)
        bar.set_postfix(loss=f"{losses['loss']:.3f}", images_per_second=f"{speed:.1f}")

    def _checkpoint(self) -> None:
        # Every process goes on from the main one's position, which has to hold what the others saw.
        self.at.unreadable, self.at.seconds = sorted(self.stage.run.union(self.at.unreadable)), self._seconds()
        stored = asdict(self.at) | {"losses": asdict(self.at.losses.of_all())}
        self.checkpoints.save(self.at.step, stored)

    def _plan(self, total: int) -> str:
        """Print the plan of the run."""
        settings, accelerator, per_step = self.settings, self.accelerator, self.images_per_step
        left = f", {total - self.at.step:,} of them left" if self.at.step else ""
        return (
            f"{self.stage.name}: {len(self.dataset):,} images, {settings.epochs} epochs, {total:,} steps of "
            f"{per_step} images{left}; batch size {settings.batch_size}, {accelerator.num_processes} process(es), "
            f"device {accelerator.device.type}"
        )

    def _kept(self) -> str:
        """Describe what is kept after a stop."""
        where = f"in stage {self.stage.name} after step {self.at.step}"
        if newest := newest_checkpoint(self.checkpoints.folder):
            return f"{where}; the checkpoint of step {step_of(newest)} is kept"
        return f"{where}, before its first checkpoint; earlier stages are kept"

    def _seconds(self) -> float:
        return float(round(time.perf_counter() - self.started, 1))


def images_per_step(settings: TrainingRecipe, accelerator: Accelerator) -> int:
    """Return how many images one optimizer step sees, over all processes."""
    return int(settings.batch_size * settings.gradient_accumulation * accelerator.num_processes)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """Flatten a recipe for trackers, which take numbers and strings only."""
    result: dict[str, int | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result


# ---- The order of the images.


class ShardedBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of one process in one epoch: a shuffled order that is a function of (seed, epoch) alone.

    Every process computes the same order and takes its own part of each global batch, so a run can resume in the
    middle of an epoch by skipping batches. Images that do not fill the last optimizer step are dropped, like drop_last
    in the reference.

    Args:
        num_images: Size of the data set.
        settings: Batch size and accumulation.
        accelerator: The processes that train together, and the rank of this one.
        seed: Of the order.
        section: The training section of the recipe, for messages.

    Raises:
        StageError: there are too few images for one step.
    """

    def __init__(
        self, num_images: int, settings: TrainingRecipe, accelerator: Accelerator, seed: int, section: str = "train"
    ):
        per_step = images_per_step(settings, accelerator)
        if num_images < per_step:
            raise StageError(
                f"{num_images} training images do not fill one optimizer step of {per_step} (batch_size "
                f"{settings.batch_size} x {accelerator.num_processes} process(es) x gradient_accumulation "
                f"{settings.gradient_accumulation}); lower {section}.batch_size."
            )
        self.num_images, self.batch_size, self.seed = num_images, settings.batch_size, seed
        self.num_processes, self.process_index = accelerator.num_processes, accelerator.process_index
        self.batches_per_epoch = num_images // per_step * settings.gradient_accumulation
        self.epoch, self.first_batch = 0, 0

    def start_at(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch and the number of its batches to skip."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for batch in range(self.first_batch, self.batches_per_epoch):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            yield order[start : start + self.batch_size]


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
            f"the loss is not finite at optimizer step {step} ({', '.join(broken)}); the batch held the images "
            f"{', '.join(image_ids)}. Lower {section}.learning_rate or look at these images; the last checkpoint is "
            "kept."
        )
