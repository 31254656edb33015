"""Train Bi-Trans, or the plain CNN that it is compared with, on image-level labels.

accelerate launch training/train.py --config voc_deit_small [--train.epochs 3 ...]

To resume an interrupted run, rerun the same command: it continues from its newest checkpoint and ends with the same
weights. Pixel labels are never loaded here.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel

from ..data import UnreadableImageError, class_names, open_image
from ..data.transforms import TrainingImages, training_transform
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.labels import class_ids_to_multi_hot
from ..hub.modeling_bitrans import BiTransOutput
from ..hub.modeling_cam import CamModel, CamOutput
from ..metrics import image_average_precision, mean_average_precision
from .build import build_network, describe_contrast, describe_folder
from .loop import RateSchedule, TrainingLoop, images_per_step
from .parse import parse_recipe
from .recipe import BiTransRecipe, Recipe, RunOptions, TrainRecipe, reading_of
from .run import Run, Stage, StageError

DEPENDS_ON = ("seed", "data", "model", "train")

TAG_TITLES = {"map_class": "class tokens", "map_patch": "patches", "map": "tags"}
"""Names of the scores of `validate`, for the last line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage from command-line arguments."""
    train(*parse_recipe(__doc__, arguments))


def train(recipe: Recipe, options: RunOptions) -> Path:
    """Train the recipe's model; return the folder of the stage, whose `model/` holds model and image processor."""
    run = Run.start(recipe, options, trains=True)
    stage = Stage(run, "train", DEPENDS_ON)
    if stage.was_done_before():
        return stage.folder
    run.say_precision("train")

    # ---- Images
    with run.working("train: reading the list of images"):
        if run.accelerator.is_main_process and (summary := describe_folder(recipe.data, recipe.data.train_split)):
            run.say(summary)  # before loading, which stops at the first thing that is wrong
        images = run.images(recipe.data.train_split, masks=False)
        validation = run.images(recipe.data.val_split, masks=False) if recipe.data.val_split else None
    id2label = dict(enumerate(class_names(images)))
    # A folder's own description says it already.
    if recipe.data.source != "folder" and (note := describe_contrast(images)):
        run.say(f"note: {note}")

    # ---- Model and optimizer
    with run.working("train: building the network"):
        model: PreTrainedModel = build_network(recipe.model, id2label, recipe.seed)
    reading = reading_of(recipe) if isinstance(recipe.model, BiTransRecipe) else {}
    type(model.config).from_dict(model.config.to_dict() | reading)  # refused now, not after hours of training
    if recipe.train.activation_checkpointing:
        keep_only_layer_inputs(model)
    image_size = model.config.image_size
    processor = BiTransImageProcessor(size={"height": image_size, "width": image_size}, max_side=run.max_side)
    optimizer = make_optimizer(model, recipe.train)
    dataset = TrainingImages(
        images,
        training_transform(image_size, recipe.train.augmentation, **recipe.train.augmentation_options),
        seed=recipe.seed,
        strict=run.options.strict,
    )

    # ---- Loop and result
    rate = functools.partial(
        learning_rate, recipe.train, images_per_step=images_per_step(recipe.train, run.accelerator)
    )
    warmup = recipe.train.consistency_warmup_epochs
    more = {"more_inputs": functools.partial(consistency_warmup, warmup, run.accelerator.device)} if warmup else {}
    loop = TrainingLoop(recipe.train, stage, model, optimizer, dataset, rate, **more)
    trained = loop.run(lambda: validate(run, loop.model, processor, validation))
    model.config.update(reading)  # whoever opens the model gets the recipe's seeds
    loop.finish(trained, processor)
    scores = trained.scores
    tags = ", ".join(f"{scores[key]:.1f} {title}" for key, title in TAG_TITLES.items() if key in scores)
    run.say(f"train: loss {scores['loss']:.3f}{', mAP ' + tags if tags else ''} -> {stage.folder}")
    run.accelerator.wait_for_everyone()
    return stage.folder


def keep_only_layer_inputs(model: PreTrainedModel) -> None:
    """Make a model recompute the activations inside its layers in the backward pass."""
    # Older versions of transformers know the method under its older name alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def make_optimizer(model: PreTrainedModel, train: TrainRecipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer; the loop sets the learning rate of each step."""
    if isinstance(model, CamModel):
        groups = model.parameter_groups(train.weight_decay)
    else:
        groups = parameter_groups(model, train.weight_decay)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=train.momentum)
    return torch.optim.AdamW(groups)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters as the reference does: no decay on biases, norms, tokens and positions."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim <= 1 or name in ("class_tokens", "class_position", "patch_position")
        (plain if is_plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(train: TrainRecipe, step: int, steps_per_epoch: int, images_per_step: int) -> float:
    """Return the rate of optimizer step `step` (from 0); the peak is scaled with the images of a step."""
    schedule = RateSchedule(
        kind=train.schedule,
        peak=train.learning_rate * images_per_step / 512,
        epochs=train.epochs,
        last=train.min_learning_rate,
        first=train.warmup_learning_rate,
        warmup_epochs=train.warmup_epochs,
    )
    return schedule(step, steps_per_epoch)


def consistency_warmup(
    epochs: float, device: torch.device, step: int, steps_per_epoch: int
) -> dict[str, torch.Tensor]:
    """Return the factor of the consistency losses' weights at a step: 0 at the first one, 1 after `epochs`."""
    # A tensor: a compiled model would be compiled again for every new number.
    return {"consistency_scale": torch.tensor(min(1.0, step / (epochs * steps_per_epoch)), device=device)}


@torch.no_grad()
def validate(
    run: Run,
    model: torch.nn.Module,
    processor: BiTransImageProcessor,
    images: Dataset | None,
    batch_size: int = 16,
) -> dict[str, float]:
    """Score the image-level predictions of every branch on whole images resized to the training square.

    Returns:
        In percent: "map_class" and "map_patch", mean average precision over classes of the class tokens' and the
        patch branch's logits; "image_ap_class", the reference's measure: per-image average precision, averaged. A
        CNN, which has one kind of logits, has "map" and "image_ap". Empty without images.
    """
    if images is None:
        return {}
    unwrapped: PreTrainedModel = run.accelerator.unwrap_model(model)
    unwrapped.eval()
    num_classes = len(unwrapped.config.id2label or {})
    own = list(run.own(len(images)))
    rows: list[dict[str, np.ndarray]] = []  # of each image (C,): the scores of every branch, and "labels"
    starts = range(0, len(own), batch_size)
    for start in run.progress(starts, desc="validate", unit="batch", leave=False):
        pictures, labels = [], []
        for index in own[start : start + batch_size]:
            row = images[index]
            try:
                pictures.append(processor.bounded(open_image(row["image"])))
            except UnreadableImageError:
                continue
            labels.append(class_ids_to_multi_hot(row["labels"], num_classes))
        if not pictures:
            continue
        pixel_values = processor(pictures, return_tensors="pt")["pixel_values"].to(run.accelerator.device)
        with run.accelerator.autocast():
            logits = logits_of_branches(unwrapped(pixel_values))
        columns = {branch: part.float().cpu().numpy() for branch, part in logits.items()} | {"labels": labels}
        rows += [{name: column[number] for name, column in columns.items()} for number in range(len(labels))]
    table = gather_object(rows)
    if not table:
        raise StageError(
            f"none of the {len(images)} images of data.val_split can be read, so the model cannot be scored; fix the "
            "files and rerun the command, or set data.val_split to null under a new name."
        )
    scores = {name: np.stack([row[name] for row in table]) for name in table[0]}
    truth = scores.pop("labels")
    precision = {f"map{branch}": 100 * mean_average_precision(part, truth)[0] for branch, part in scores.items()}
    first = next(iter(scores))
    return {**precision, f"image_ap{first}": 100 * image_average_precision(scores[first], truth)}


def logits_of_branches(output: BiTransOutput | CamOutput) -> dict[str, torch.Tensor]:
    """Return the logits (B, C) of every branch of a network, by the suffix of its scores' names."""
    if isinstance(output, CamOutput):
        return {"": output.logits}
    return {"_class": output.class_logits, "_patch": output.patch_logits}
