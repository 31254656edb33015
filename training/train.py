"""Train Bi-Trans on image-level labels.

accelerate launch training/train.py --config training/recipes/voc_deit_small.yaml [--train.epochs 3 ...]

A run that was killed goes on from its newest checkpoint when the same command is given again, and ends with the same
weights. Pixel labels are never loaded here.
"""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import Dataset

from bitrans_hf.data import UnreadableImageError, class_names, open_image
from bitrans_hf.data.transforms import TrainingImages, training_transform
from bitrans_hf.image_processing_bitrans import BiTransImageProcessor
from bitrans_hf.labels import class_ids_to_multi_hot
from bitrans_hf.metrics import image_average_precision, mean_average_precision, parameter_count
from bitrans_hf.modeling_bitrans import BiTransModel
from recipe import Recipe, RunOptions, TrainRecipe, build_model, load_images, parse_recipe
from runtime import (
    Checkpoints,
    ShardedBatches,
    Stage,
    make_accelerator,
    progress,
    run_script,
    say,
    say_unreadable,
    stop_if_not_finite,
)

DEPENDS_ON = ("seed", "data", "model", "train")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    train(*parse_recipe(__doc__, arguments))


def train(recipe: Recipe, options: RunOptions) -> Path:
    """Train the recipe's model; return the folder of the stage, whose `model/` holds model and image processor."""
    accelerator = make_accelerator(recipe, options, Path(recipe.output_dir) / recipe.name / "train")
    stage = Stage(recipe, "train", DEPENDS_ON, accelerator.is_main_process)
    if stage.done:
        say(accelerator, f"train: already done, {stage.folder}")
        return stage.folder

    # ---- Images
    images = load_images(recipe.data, recipe.data.train_split, masks=False)
    validation = load_images(recipe.data, recipe.data.val_split, masks=False) if recipe.data.val_split else None
    id2label = dict(enumerate(class_names(images)))

    # ---- Model and optimiser
    model = build_model(recipe.model, id2label, recipe.seed)
    if recipe.train.activation_checkpointing:
        model.activation_checkpointing_enable()
    if recipe.train.compile:
        model.compile(fullgraph=True)
    image_size = model.config.image_size
    processor = BiTransImageProcessor(size={"height": image_size, "width": image_size})
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.train.weight_decay))
    dataset = TrainingImages(
        images,
        training_transform(image_size, recipe.train.augmentation, **recipe.train.augmentation_options),
        seed=recipe.seed,
        strict=options.strict,
    )
    batches = ShardedBatches(
        len(dataset),
        recipe.train.batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        recipe.train.gradient_accumulation,
        recipe.seed,
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=recipe.train.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # Its own generator: a loader draws a number whenever it is iterated, and stochastic depth draws from torch's,
        # which has to be the same whether or not the run was resumed.
        generator=torch.Generator(),
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    # Each process drops other branches; after `prepare`, which must see equal weights everywhere.
    set_seed(recipe.seed, device_specific=True)

    # ---- Resume
    checkpoints = Checkpoints(stage.folder / "checkpoints", accelerator)
    state = checkpoints.load_newest() or {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0, "unreadable": []}
    if state["step"]:
        say(accelerator, f"train: going on after step {state['step']} (epoch {state['epoch']})")
    stage.forget_log_after(state["step"])
    if recipe.train.trackers:
        accelerator.init_trackers("bitrans_hf", config=flat(stage.recipe))

    # ---- Loop
    loop = TrainingLoop(recipe.train, accelerator, model, optimizer, dataset, batches, loader, stage, checkpoints)
    metrics = loop.run(state, options, lambda: validate(accelerator, model, processor, validation))

    # ---- Result
    if accelerator.is_main_process:
        unfinished, finished = stage.folder / "model.unfinished", stage.folder / "model"
        unwrapped = accelerator.unwrap_model(model)
        unwrapped.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.replace(finished)
        metrics["parameters_million"] = parameter_count(unwrapped)
    stage.finish(metrics, seconds=metrics["seconds"])
    checkpoints.clear()
    if recipe.train.trackers:
        accelerator.end_training()
    say_unreadable(accelerator, metrics["unreadable"])
    tags = f", mAP {metrics['map_class']:.1f} class tokens, {metrics['map_patch']:.1f} patches" if validation else ""
    say(accelerator, f"train: loss {metrics['loss']:.3f}{tags} -> {stage.folder}")
    accelerator.wait_for_everyone()
    return stage.folder


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters as the reference does: no decay on biases, norms, tokens and positions."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim <= 1 or name in ("class_tokens", "class_position", "patch_position")
        (plain if is_plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(train: TrainRecipe, step: int, steps_per_epoch: int, images_per_step: int) -> float:
    """Return the rate of optimiser step `step` (from 0).

    "epoch_cosine" is timm's cosine schedule as the reference drives it: stepped after each epoch with that epoch's
    index, warm-up not prefixed, so that epochs 0 and 1 both run at the warm-up rate and the cosine starts late.
    """
    peak = train.learning_rate * images_per_step / 512
    now: float
    length: float
    if train.schedule == "epoch_cosine":
        now, length, warmup = max(0, step // steps_per_epoch - 1), train.epochs, train.warmup_epochs
    else:
        warmup = train.warmup_epochs * steps_per_epoch
        now, length = step, train.epochs * steps_per_epoch
    if now < warmup:
        return train.warmup_learning_rate + now * (peak - train.warmup_learning_rate) / warmup
    if train.schedule == "step_cosine":  # the cosine takes what the warm-up leaves
        now, length = now - warmup, length - warmup
    return train.min_learning_rate + 0.5 * (peak - train.min_learning_rate) * (1 + math.cos(math.pi * now / length))


class TrainingLoop:
    """The epochs of a run: steps, log lines, validation and checkpoints."""

    def __init__(
        self,
        train: TrainRecipe,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: TrainingImages,
        batches: ShardedBatches,
        loader: "torch.utils.data.DataLoader[dict[str, Any]]",
        stage: Stage,
        checkpoints: Checkpoints,
    ):
        self.train, self.accelerator, self.stage, self.checkpoints = train, accelerator, stage, checkpoints
        self.model, self.optimizer = model, optimizer
        self.dataset, self.batches, self.loader = dataset, batches, loader
        self.images_per_step = train.batch_size * train.gradient_accumulation * accelerator.num_processes
        self.steps_per_epoch = batches.batches_per_epoch // train.gradient_accumulation

    def run(self, state: dict[str, Any], options: RunOptions, validate: Any) -> dict[str, Any]:
        """Train from `state` to the last epoch; return the last losses and scores.

        Args:
            state: Progress of the newest checkpoint: "step", "epoch", "batch" (already used in that epoch), "seconds"
                and "unreadable" image ids.
            options: Of the run.
            validate: Returns scores of the model as it is.
        """
        self.state, self.started = state, time.perf_counter() - state["seconds"]
        total = self.train.epochs * self.steps_per_epoch
        bar = progress(range(total), self.accelerator, options, initial=state["step"], desc="train", unit="step")
        result: dict[str, Any] = {}
        for epoch in range(state["epoch"], self.train.epochs):
            averages = self._epoch(epoch, state["batch"] if epoch == state["epoch"] else 0, bar)
            scores = validate()
            entry = {"step": state["step"], "epoch": epoch + 1, **scores}
            self.stage.log(entry)
            self.accelerator.log(scores, step=state["step"])
            result = {**averages, **scores}
            self._checkpoint(epoch + 1, 0, result)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in result.items())
            say(self.accelerator, f"epoch {epoch + 1}/{self.train.epochs}: {shown}")
        bar.close()
        if not result:  # resumed after the last epoch
            result = dict(state["result"])
        unreadable = sorted(set(gather_object(state["unreadable"])))
        return {**result, "steps": state["step"], "seconds": self._seconds(), "unreadable": unreadable}

    def _epoch(self, epoch: int, first_batch: int, bar: Any) -> dict[str, float]:
        """Run one epoch from `first_batch`; return the means of its last log window."""
        accelerator, state = self.accelerator, self.state
        self.dataset.set_epoch(epoch)
        self.batches.start_at(epoch, first_batch)
        self.model.train()
        window: list[dict[str, float]] = []
        averages: dict[str, float] = {}
        window_started, steps_in_window = time.perf_counter(), 0
        for number, batch in enumerate(self.loader, start=first_batch + 1):
            rate = learning_rate(self.train, state["step"], self.steps_per_epoch, self.images_per_step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            state["unreadable"] += [name for name in batch["unreadable"] if name and name not in state["unreadable"]]
            with accelerator.accumulate(self.model):
                output = self.model(
                    pixel_values=batch["pixel_values"].to(accelerator.device, non_blocking=True),
                    labels=batch["labels"].to(accelerator.device, non_blocking=True),
                )
                losses = {"loss": output.loss.item(), **{name: term.item() for name, term in output.losses.items()}}
                stop_if_not_finite(losses, state["step"], [self.dataset.image_ids[i] for i in batch["index"]])
                window.append(losses)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients and self.train.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            steps_in_window += 1
            bar.update()
            if state["step"] % self.train.log_every == 0 or number == self.batches.batches_per_epoch:
                averages = {
                    name: float(np.mean([entry[name] for part in gather_object([window]) for entry in part]))
                    for name in losses
                }
                speed = steps_in_window * self.images_per_step / (time.perf_counter() - window_started)
                entry = {"lr": rate, "images_per_second": round(speed, 2), **averages}
                self.stage.log(
                    {
                        "step": state["step"],
                        "epoch": round(number / self.batches.batches_per_epoch + epoch, 4),
                        **entry,
                    }
                )
                accelerator.log(entry, step=state["step"])
                bar.set_postfix(loss=f"{averages['loss']:.3f}")
                window, window_started, steps_in_window = [], time.perf_counter(), 0
            every = self.train.checkpoint_every
            if every and state["step"] % every == 0 and number < self.batches.batches_per_epoch:
                self._checkpoint(epoch, number, {})
        return averages

    def _checkpoint(self, epoch: int, batch: int, result: dict[str, float]) -> None:
        self.state |= {"epoch": epoch, "batch": batch, "seconds": self._seconds(), "result": result}
        self.checkpoints.save(self.state["step"], self.state)

    def _seconds(self) -> float:
        return float(round(time.perf_counter() - self.started, 1))


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: BiTransImageProcessor,
    images: Dataset | None,
    batch_size: int = 16,
) -> dict[str, float]:
    """Score both branches' image-level tags on whole images resized to the training square.

    Returns:
        In percent: "map_class" and "map_patch", mean average precision over classes of the class tokens' and the
        patch branch's logits; "image_ap_class", the reference's measure: per-image average precision, averaged.
        Empty without images.
    """
    if images is None:
        return {}
    unwrapped: BiTransModel = accelerator.unwrap_model(model)
    unwrapped.eval()
    num_classes = len(unwrapped.config.id2label or {})
    own = list(range(accelerator.process_index, len(images), accelerator.num_processes))
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(own), batch_size):
        pictures, labels = [], []
        for index in own[start : start + batch_size]:
            row = images[index]
            try:
                pictures.append(open_image(row["image"]))
            except UnreadableImageError:
                continue
            labels.append(class_ids_to_multi_hot(row["labels"], num_classes))
        if not pictures:
            continue
        pixel_values = processor(pictures, return_tensors="pt")["pixel_values"].to(accelerator.device)
        with accelerator.autocast():
            output = unwrapped(pixel_values)
        scores = (output.class_logits.float().cpu().numpy(), output.patch_logits.float().cpu().numpy())
        rows += list(zip(*scores, labels, strict=True))
    class_scores, patch_scores, truth = (np.stack(part) for part in zip(*gather_object(rows), strict=True))
    return {
        "map_class": 100 * mean_average_precision(class_scores, truth)[0],
        "map_patch": 100 * mean_average_precision(patch_scores, truth)[0],
        "image_ap_class": 100 * image_average_precision(class_scores, truth),
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a recipe for trackers, which take numbers and strings only."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result


if __name__ == "__main__":
    run_script(main)
