"""Build the data sets and networks of a recipe."""

import dataclasses
import functools
from collections import Counter
from pathlib import Path

from datasets import Dataset
from transformers import set_seed

from ..data import check_folder, check_masks, class_names, load_coco, load_folder, load_voc, make_shapes
from ..data.folder import note_on_contrast
from ..hub.configuration_bitrans import BiTransConfig
from ..hub.configuration_cam import CamConfig
from ..hub.errors import InputError
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_cam import CamModel
from ..recipes import weights_file
from ..weights import from_timm, from_timm_state_dict, load_backbone
from .recipe import BiTransRecipe, CamRecipe, DataRecipe, ModelRecipe, Options, Recipe

SHAPE_SPLITS = ("train", "val", "test")


def load_images(data: DataRecipe, split: str | None, *, masks: bool) -> Dataset:
    """Load one split of the recipe's data.

    Args:
        data: Where the images are.
        split: Name of the split; null for all images of a folder.
        masks: False hides ground truth, so that training cannot see it.
    """
    if data.source == "voc":
        assert data.root is not None  # checked by Recipe
        if split is None:
            raise InputError("VOC has no images without a split; name a list such as train, val or train_aug.")
        return load_voc(
            data.root,
            split,
            classes=data.classes,
            label_file=data.label_file,
            sbd=data.sbd_root,
            masks=masks,
            drop_empty=data.drop_empty,
        )
    if data.source == "coco":
        assert data.root is not None
        if split is None:
            raise InputError("COCO has no images without a split; name one such as train2014 or val2014.")
        written = None if data.mask_folder is None else Path(data.mask_folder) / split
        return load_coco(
            data.root,
            split,
            classes=data.classes,
            masks=masks and (written if written is not None and written.is_dir() else True),
            overlap=data.mask_overlap,
            crowd=data.mask_crowd,
            drop_empty=data.drop_empty,
        )
    if data.source == "folder":
        assert data.root is not None
        return load_folder(
            data.root,
            data.table,
            split=split,
            classes=data.classes,
            masks=None if masks else False,
            separator=data.separator,
            allow_empty=data.allow_empty,
            caller="recipe",
            mask_values=data.mask_values,
        )
    if split not in SHAPE_SPLITS:
        raise InputError(f"shapes have the splits {', '.join(SHAPE_SPLITS)}, got {split!r}.")
    size = data.num_train if split == "train" else data.num_val
    seed = len(SHAPE_SPLITS) * data.seed + SHAPE_SPLITS.index(split)
    scenes = _drawn(size, seed, data.image_size)
    return scenes if masks else scenes.remove_columns("mask")


@functools.lru_cache(maxsize=len(SHAPE_SPLITS))
def _drawn(size: int, seed: int, image_size: int) -> Dataset:
    """Draw the scenes of a split once per process: every stage loads them."""
    return make_shapes(size, seed, image_size=image_size)


def evenly_chosen(images: Dataset, count: int | None) -> Dataset:
    """Return `count` evenly spaced images; all of them if `count` is None or larger."""
    if count is None or count >= len(images):
        return images
    return images.select([number * len(images) // count for number in range(count)])


def check_later_splits(recipe: Recipe) -> None:
    """Load the splits of the stages after training, so that problems show before hours of training.

    Raises:
        DataError: one cannot be loaded.
    """
    if recipe.data.source == "shapes":
        return
    splits = [*recipe.seeds.splits]
    if recipe.segmentation is not None and recipe.segmentation.val_split is not None:
        splits.append(recipe.segmentation.val_split)
    if recipe.prediction is not None:
        splits += recipe.prediction.splits
    for split in dict.fromkeys(splits):
        load_images(recipe.data, split, masks=True)


def describe_folder(data: DataRecipe, split: str | None) -> str | None:
    """Describe a folder of the user's own images and its problems; None for other sources.

    It runs before training: only the headers of images are read, and up to a hundred masks of all splits, which later
    stages score against. Training gets no mask.

    Raises:
        DataError: a mask cannot be used for scores.
    """
    if data.source != "folder":
        return None
    assert data.root is not None  # checked by Recipe
    report = check_folder(
        data.root,
        data.table,
        split=split,
        classes=data.classes,
        masks=False,
        separator=data.separator,
        allow_empty=data.allow_empty,
        caller="recipe",
        decode=False,
    )
    num_masks, notes = check_masks(
        data.root,
        data.table,
        classes=data.classes,
        separator=data.separator,
        mask_values=data.mask_values,
        caller="recipe",
    )
    lines = [report.summary()]
    if num_masks:
        lines.append(f"  masks: {num_masks:,} looked at, evenly spread over all splits; they serve scores alone")
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])


def describe_contrast(images: Dataset) -> str | None:
    """Name the classes that all images show, which cannot be told from their surroundings; None if there are none."""
    classes = class_names(images)
    counts = Counter(classes[class_id] for ids in images["labels"] for class_id in set(ids))
    return note_on_contrast(classes, counts, len(images))


def build_model(model: BiTransRecipe, id2label: dict[int, str], seed: int) -> BiTransModel:
    """Build the network of a recipe, with its starting weights.

    Args:
        model: What to build.
        id2label: Names of the C object classes.
        seed: For all random draws: new weights and the class tokens' noise.
    """
    fields = {key: value for key, value in dataclasses.asdict(model).items() if value is not None}
    del fields["architecture"]
    weights, noise = fields.pop("weights"), fields.pop("class_token_noise")
    if weights == "scratch":
        set_seed(seed)
        return BiTransModel(BiTransConfig(id2label=id2label, **fields))
    if weights.startswith("timm:"):
        return from_timm(
            weights.removeprefix("timm:"), id2label=id2label, class_token_noise=noise, seed=seed, **fields
        )
    return from_timm_state_dict(weights_file(weights), id2label=id2label, class_token_noise=noise, seed=seed, **fields)


def build_cam(model: CamRecipe, id2label: dict[int, str], seed: int) -> CamModel:
    """Build the CNN of a recipe, with its starting weights; arguments as in `build_model`.

    Raises:
        ValueError, OSError: the weights are not there or do not fit, see `load_backbone`; or stages are to stay as
            they were drawn.
    """
    given = {"backbone": model.backbone, "image_size": model.image_size}
    fields: Options = {key: value for key, value in given.items() if value is not None} | model.options
    config = CamConfig(id2label=id2label, **fields)
    if model.weights == "scratch" and (config.num_frozen_stages or config.freeze_batch_statistics):
        raise InputError(
            "model.weights scratch leaves nothing to freeze, got num_frozen_stages "
            f"{config.num_frozen_stages} and freeze_batch_statistics {config.freeze_batch_statistics}; take them out "
            "of model.options, or give weights."
        )
    set_seed(seed)
    network = CamModel(config)
    if model.weights != "scratch":
        load_backbone(network, None if model.weights == "timm" else model.weights)
    return network


def build_network(model: ModelRecipe, id2label: dict[int, str], seed: int) -> BiTransModel | CamModel:
    """Build the network of either architecture; see `build_model` and `build_cam`."""
    return build_cam(model, id2label, seed) if isinstance(model, CamRecipe) else build_model(model, id2label, seed)
