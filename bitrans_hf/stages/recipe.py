"""Recipes: every choice of a run in one frozen dataclass, read from a YAML file and the command line.

`--config voc_deit_small --train.epochs 3` overrides one value of a shipped recipe, or of a file. Unknown keys and
values of the wrong type are errors. The resolved recipe is written beside every result.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args, get_type_hints

from datasets import Dataset
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # not in its __all__
from transformers import set_seed

from ..data import MaskValues, check_folder, check_masks, class_names, load_coco, load_folder, load_voc, make_shapes
from ..data.folder import note_on_contrast
from ..hub.configuration_bitrans import BiTransConfig
from ..hub.configuration_cam import CamConfig
from ..hub.errors import InputError
from ..hub.image_processing_bitrans import MAX_SIDE
from ..hub.modeling_bitrans import BiTransModel
from ..hub.modeling_cam import CamModel
from ..hub.seeds import seed_variants
from ..recipes import recipe_file, weights_file
from ..refine.crf import find_preset
from ..weights import from_timm, from_timm_state_dict, load_backbone

SHAPE_SPLITS = ("train", "val", "test")
ALL_IMAGES = "all_images"
"""Name of the split `null`, all images of a folder, in results."""

SeedVariant: TypeAlias = Literal["sc_cam", "coarse_cam", "fused", "refined"]
Refiner: TypeAlias = Literal["crf", "par", "none"]
Precision: TypeAlias = Literal["auto", "no", "bf16"]

SHARED_KEYS = ("weights", "image_size", "architecture")
"""Keys of the section model that a CNN has too."""
CNN_KEYS = ("backbone", "options")
"""Keys of the section model that it alone has."""
TRANSFORMER_KEYS = {
    "train": ("consistency_warmup_epochs",),
    "seeds": ("fusion", "num_seed_layers", "num_affinity_layers", "refine_steps", "normalize_affinity"),
}
"""Keys of other sections that it does not have."""


class LoopSettings(Protocol):
    """What a recipe's section of a stage that trains has to say to the loop; `TrainRecipe` documents each."""

    @property
    def epochs(self) -> int: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def gradient_accumulation(self) -> int: ...  # noqa: D102
    @property
    def max_grad_norm(self) -> float | None: ...  # noqa: D102
    @property
    def precision(self) -> Precision: ...  # noqa: D102
    @property
    def compile(self) -> bool: ...  # noqa: D102
    @property
    def num_workers(self) -> int: ...  # noqa: D102
    @property
    def log_every(self) -> int: ...  # noqa: D102
    @property
    def checkpoint_every(self) -> int | None: ...  # noqa: D102
    @property
    def trackers(self) -> list[str]: ...  # noqa: D102


@dataclass(frozen=True)
class DataRecipe:
    """Which images.

    Attributes:
        source: "shapes" (drawn here), "voc" (a devkit folder), "coco" or "folder" (your own images and a label table).
        root: Folder of the data; not for shapes.
        train_split: Split that the model is trained on, with image-level labels alone.
        val_split: Split for the image-level mAP while training; null to leave it out.
        classes: Object classes in the order of their ids; null for all that the source has.
        label_file: voc: image-level labels when there is no Annotations folder (`cls_labels.npy`, `.npz`).
        table: folder: the label table, when it does not have one of the usual names.
        separator: folder: what separates class names in the table, when it cannot be found out.
        allow_empty: folder: an empty cell of labels means that the image shows no class; null refuses empty cells.
        num_train: shapes: number of scenes to train on.
        num_val: shapes: number of scenes in each other split.
        image_size: shapes: side of a scene in pixels.
        seed: shapes: seed of the scenes; every split draws from its own stream.
        sbd_root: voc: SBD's folder, for train_aug where `prepare_voc.py` has not written its list.
        mask_folder: coco: folder with a folder of masks for each split, `val2014` and so on, which `prepare_coco.py`
            wrote once; splits without one, and all with null, have theirs painted when they are needed.
        mask_overlap: coco: who gets pixels of several objects, "later" (null), "smaller" or "ignore".
        mask_crowd: coco: what crowd regions become in masks, "background" (null), "ignore" or "object".
        drop_empty: voc, coco: leave out images that show none of the classes; null keeps them.
        mask_values: folder: what the pixel values of masks mean, where they are not label ids (null): "binary",
            "voc_colors" or a list such as "0=0,128=255,255=1" or "128/0/0=1"; "ids" accepts masks without objects.
    """

    source: Literal["shapes", "voc", "coco", "folder"] = "shapes"
    root: str | None = None
    train_split: str | None = "train"
    val_split: str | None = "val"
    classes: list[str] | None = None
    label_file: str | None = None
    table: str | None = None
    num_train: int = 4000
    num_val: int = 200
    image_size: int = 64
    seed: int = 0
    sbd_root: str | None = None
    mask_folder: str | None = None
    mask_overlap: Literal["later", "smaller", "ignore"] | None = None
    mask_crowd: Literal["background", "ignore", "object"] | None = None
    drop_empty: bool | None = None
    separator: str | None = None
    allow_empty: bool | None = None
    mask_values: str | None = None


def null_weights_are_scratch(settings: Any) -> None:
    """Let `weights: null` mean "scratch"; from the command line it comes as text."""
    if settings.weights in (None, "null"):
        object.__setattr__(settings, "weights", "scratch")


@dataclass(frozen=True)
class ModelRecipe:
    """Which network; null leaves a size to the weights or to `BiTransConfig`'s default.

    Attributes:
        weights: "scratch" or null; "timm:<name>" for ImageNet weights from the Hub; a `.safetensors` or `.pth` file of
            a timm vision transformer. cam: "scratch" or null; "timm" for the backbone's weights from the Hub; a file
            of them, as `bitrans_hf.weights.load_backbone` reads it.
        class_token_noise: Noise that tells the repeated class tokens apart at the start, as a multiple of their
            standard deviation; 0 is the reference.
        image_size: Side of the training crops in pixels.
        patch_size: Side of a patch in pixels.
        hidden_size: Width D of a token.
        num_hidden_layers: Number of layers L.
        num_attention_heads: Heads of each layer.
        mlp_ratio: Width of a layer's MLP as a multiple of hidden_size.
        drop_path_rate: Stochastic depth of the last layer while training.
        share_drop_path: Drop the same branches in both views.
        final_layer_norm: Apply DeiT's final LayerNorm, which MCTformer leaves out.
        patch_pooling: Pooling of the patch branch's map, mean or ranked.
        num_seed_layers: K, how many of the last layers give the SC-CAM.
        num_affinity_layers: How many of the last layers give the affinity.
        view: Second view: hflip, vflip, rot90, rot180 or none.
        scc_weight: Weight of the class-specific consistency loss.
        pac_weight: Weight of the pair-wise affinity consistency loss.
        scc_classes: Classes that the SCC loss counts, all or present.
        scc_maps: What the SCC loss compares, attention or max_normalized.
        patch_weight: Weight of the patch branch's classification loss; 0 is MCTformer V1.
        class_contrast_weight: Weight of MCTformer+'s contrastive class-token loss.
        detach_second_view: No gradient of the consistency losses through the second view.
        attention_map_mode: recompute or eager.
        architecture: "bitrans" (null), or "cam", a plain CNN whose class activation maps are its only seeds. A CNN has
            the keys weights, image_size and the following two; all others are left null.
        backbone: cam: name of a convolutional network of timm, or "resnet38"; null for ResNet50.
        options: cam: further fields of `CamConfig`, such as output_stride, the pixels of a cell.
    """

    weights: str = "scratch"
    class_token_noise: float = 0.0
    image_size: int | None = None
    patch_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    mlp_ratio: float | None = None
    drop_path_rate: float | None = None
    share_drop_path: bool | None = None
    final_layer_norm: bool | None = None
    patch_pooling: str | None = None
    num_seed_layers: int | None = None
    num_affinity_layers: int | None = None
    view: str | None = None
    scc_weight: float | None = None
    pac_weight: float | None = None
    scc_classes: str | None = None
    scc_maps: str | None = None
    patch_weight: float | None = None
    class_contrast_weight: float | None = None
    detach_second_view: bool | None = None
    attention_map_mode: str | None = None
    architecture: Literal["bitrans", "cam"] | None = None
    backbone: str | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Read null weights as "scratch"."""
        null_weights_are_scratch(self)


@dataclass(frozen=True)
class TrainRecipe:
    """How to train; the defaults are the reference's (DeiT-Small on VOC, one GPU).

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images for each process and forward pass.
        gradient_accumulation: Forward passes for each optimiser step.
        learning_rate: Peak rate for 512 images in a step; it is scaled linearly with their number.
        min_learning_rate: Last rate, not scaled.
        warmup_learning_rate: First rate, not scaled.
        warmup_epochs: Length of the linear warm-up.
        consistency_warmup_epochs: Length of a linear rise of both consistency losses' weights from 0; null for none.
        schedule: "epoch_cosine": the reference's, constant within an epoch, its first two epochs at the warm-up rate.
            "step_cosine": changes at every step, for short runs. "poly": (1 - step / steps)^0.9, without warm-up.
        weight_decay: Not applied to biases, norms, tokens and positions.
        max_grad_norm: Clip the gradient to this norm; null does not clip.
        augmentation: Preset of `bitrans_hf.data.transforms`: "reference", "crop_flip" or "flip".
        augmentation_options: Options of the preset.
        precision: "auto": bf16 where the device multiplies bf16 natively, else float32; "no" for float32; "bf16".
        compile: Compile the model with torch.compile.
        activation_checkpointing: Keep only the layers' inputs and recompute the rest in the backward pass.
        num_workers: Processes that load images, for each process that trains.
        log_every: Optimiser steps between log lines.
        checkpoint_every: Optimiser steps between checkpoints, beside the one after each epoch; null for none.
        trackers: Trackers of Accelerate, such as tensorboard, wandb, trackio.
        optimizer: "adamw" (null) or "sgd".
        momentum: Of sgd; null for none.
    """

    epochs: int = 60
    batch_size: int = 64
    gradient_accumulation: int = 1
    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-5
    warmup_learning_rate: float = 1e-6
    warmup_epochs: float = 5
    consistency_warmup_epochs: float | None = None
    schedule: Literal["epoch_cosine", "step_cosine", "poly"] = "epoch_cosine"
    weight_decay: float = 0.05
    max_grad_norm: float | None = None
    augmentation: str = "reference"
    augmentation_options: dict[str, Any] = field(default_factory=dict)
    precision: Precision = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    num_workers: int = 2
    log_every: int = 10
    checkpoint_every: int | None = None
    trackers: list[str] = field(default_factory=list)
    optimizer: Literal["adamw", "sgd"] | None = None
    momentum: float | None = None


@dataclass(frozen=True)
class SeedsRecipe:
    """How seeds are made and cut.

    Attributes:
        splits: Splits to make seeds for; the first one's scores head the metrics.
        scales: Sizes to average over; the first must be 1.0.
        flip: Average over the horizontal flip too.
        variant: The maps that become label maps: "sc_cam", "coarse_cam", "fused" or "refined".
        threshold: Background score for the label maps.
        batch_size: Images of one size in a forward pass.
        fusion: Rule behind the variants "fused" and "refined": "fused" (null), the paper's product; "fused_sqrt", its
            root; "sc_cam" or "coarse_cam", one of the two alone.
        num_seed_layers: K, how many of the last layers give the SC-CAM; null as the model was trained.
        num_affinity_layers: How many of the last layers give the affinity; null as the model was trained (all).
        refine_steps: How often the variant "refined" is spread along the affinity; null for the paper's once.
        normalize_affinity: Give every row of the affinity the sum 1 first.
        max_side: Longest side in pixels that images are worked on at, in this and all later stages: larger ones are
            reduced first, and what is found is enlarged, so that label maps have the image's own size. Memory grows
            with its fourth power. Null for the image processor's, 640.
    """

    splits: list[str | None] = field(default_factory=lambda: ["train", "val"])
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = True
    variant: SeedVariant = "refined"
    threshold: float = 0.4
    batch_size: int = 8
    fusion: Literal["fused", "fused_sqrt", "sc_cam", "coarse_cam"] | None = None
    num_seed_layers: int | None = None
    num_affinity_layers: int | None = None
    refine_steps: int | None = None
    normalize_affinity: bool | None = None
    max_side: int | None = None


@dataclass(frozen=True)
class AffinityRecipe:
    """How the affinity network is trained; the defaults are MCTformer's (PSA with a ResNet38, one GPU).

    Null leaves a value to `RELATIONS` of `bitrans_hf.hub.configuration_affinitynet`: what PSA or IRN does.

    Attributes:
        split: Split whose seeds become its training labels, one of seeds.splits; null for all images of a folder.
        num_images: Use this many images, at equal distances in the split; null for all.
        variant: Seed variant; null for seeds.variant.
        refiner: How seeds with a background score become label maps: "crf", "par" (plain torch) or "none".
        crf_preset: Preset of the CRF, a name of `bitrans_hf.refine.crf.CRF_PRESETS`.
        low_alpha: Power of the background score (1 - max)^alpha of the map that foreground is taken from: a low power
            leaves much background, so that what stays foreground is trusted (psa: 1).
        high_alpha: Power for the map that background is taken from (psa: 12).
        foreground_threshold: Constant background score in place of low_alpha (irn: 0.30).
        background_threshold: Constant background score in place of high_alpha (irn: 0.05).
        relation: "psa" (distance of features) or "irn" (the strongest boundary on the way).
        radius: Pairs of cells nearer than this are trained on (psa: 5, irn: 10).
        backbone: "bitrans" (the run's own encoder), "resnet38" or the name of a timm network.
        weights: What the backbone starts from. "trained": bitrans, the run's own model; "scratch" or null; "timm": a
            timm network's weights from the Hub; else a file: PSA's or MCTformer's `.pth`, MXNet's `.params`.
        options: Further fields of `AffinityNetConfig`, such as output_stride, the pixels of a cell.
        crop_size: Side of the training crops in pixels; smaller images are padded.
        color_jitter: Strength of the jitter of brightness, contrast and saturation (hue: a third of it); 0 for none.
        epochs: Passes over the images.
        batch_size: Images for each process and forward pass.
        gradient_accumulation: Forward passes for each optimiser step.
        optimizer: "literal": SGD as PSA runs it, where the weight decay also lands in the place of momentum: 0.0005.
            "momentum": what was meant, momentum 0.9.
        learning_rate: First rate of the backbone; it falls by (1 - step / steps)^0.9. New layers have 10 times it,
            biases twice.
        weight_decay: Not applied to biases.
        max_grad_norm: Clip the gradient to this norm; null does not clip.
        precision: "auto": bf16 where the device multiplies bf16 natively, else float32; "no" for float32; "bf16".
        compile: Compile the network with torch.compile.
        num_workers: Processes that load images, for each process that trains.
        log_every: Optimiser steps between log lines.
        checkpoint_every: Optimiser steps between checkpoints, beside the one after each epoch; null for none.
        trackers: Trackers of Accelerate.
    """

    split: str | None = "train"
    num_images: int | None = None
    variant: SeedVariant | None = None
    refiner: Refiner = "crf"
    crf_preset: str = "psa"
    low_alpha: float | None = None
    high_alpha: float | None = None
    foreground_threshold: float | None = None
    background_threshold: float | None = None
    relation: Literal["psa", "irn"] = "psa"
    radius: int | None = None
    backbone: str = "resnet38"
    weights: str = "trained"
    options: dict[str, Any] = field(default_factory=dict)
    crop_size: int = 448
    color_jitter: float = 0.3
    epochs: int = 5
    batch_size: int = 8
    gradient_accumulation: int = 1
    optimizer: Literal["literal", "momentum"] = "literal"
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    max_grad_norm: float | None = None
    precision: Precision = "auto"
    compile: bool = False
    num_workers: int = 2
    log_every: int = 10
    checkpoint_every: int | None = None
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read null weights as "scratch"."""
        null_weights_are_scratch(self)


@dataclass(frozen=True)
class PseudoLabelsRecipe:
    """How seeds become pseudo labels.

    Attributes:
        splits: Splits to make pseudo labels for, each one of seeds.splits; the first one's score heads the metrics.
        method: "random_walk": along the affinities of the trained network. "refiner": the refiner alone, no network.
        variant: Seed variant; null for seeds.variant.
        background: "threshold", one background score for all pixels (MCTformer), or "alpha", (1 - max)^alpha (PSA).
        threshold: Background score of "threshold": a number; "best" for the seeds' best on the first of seeds.splits,
            which needs masks there, as the field does it; null for seeds.threshold.
        alpha: Power of "alpha" (PSA 16, SEAM 6).
        output_stride: Pixels of a cell when the network is used; null as it was trained. A transformer's patches
            overlap on a finer grid, which costs time and brings the walk nearer to the edges.
        beta: Element-wise power of the affinities; larger values cut weak links. Null for the relation's (psa: 8,
            irn: 10).
        num_doublings: log2 of the number of steps of the walk; null for the relation's (psa: MCTformer's 6, irn: 8).
        rescale: Bring each class's walked map back to a maximum of 1, which a long walk lowers, before it meets the
            background score; IRN divides by the maximum over classes in the same place.
        refiner: Refiner of the seeds ("refiner"), or of the walked scores ("random_walk"): "crf", "par" or "none".
        crf_preset: Preset of the CRF, a name of `bitrans_hf.refine.crf.CRF_PRESETS`.
        batch_size: Images of one size in a forward pass of the network.
        keep_scores: Store the soft scores beside the label maps.
        network: Folder of another affinity network than the run's own; null for `affinity/model` of the run.
    """

    splits: list[str | None] = field(default_factory=lambda: ["train"])
    method: Literal["random_walk", "refiner"] = "random_walk"
    variant: SeedVariant | None = None
    background: Literal["threshold", "alpha"] = "threshold"
    threshold: float | Literal["best"] | None = None
    alpha: float = 16.0
    output_stride: int | None = None
    beta: float | None = None
    num_doublings: int | None = None
    rescale: bool = False
    refiner: Refiner = "none"
    crf_preset: str = "psa"
    batch_size: int = 4
    keep_scores: bool = False
    network: str | None = None


@dataclass(frozen=True)
class SegmentationRecipe:
    """How the segmentation network is trained; the defaults are MCTformer's (DeepLab-V1 on ResNet38, one GPU).

    Attributes:
        labels: What it is trained on. "pseudo_labels": those of the run. "seeds": the label maps of the run's seeds.
            "ground_truth": the data's own masks, which weak supervision does not have: for the ceiling only. Else a
            folder of index images called <image_id>.png.
        split: Split to train on.
        num_images: Use this many images, at equal distances in the split; null for all.
        val_split: Split with masks for the mIoU while training, at one scale; null to leave it out. Nothing is chosen
            by it: the last weights are kept.
        val_every: Epochs between these scores; the last epoch is always scored.
        preset: "mctformer" or "deeplab-v1" (SEAM's retraining): head, frozen parts, optimiser and augmentation.
        backbone: "resnet38", "bitrans" (the run's own encoder) or the name of a timm network.
        weights: What the backbone starts from. "trained": bitrans, the run's own model; "scratch" or null; "timm": a
            timm network's weights from the Hub; a file: the public ResNet38 `.pth`, MXNet's `.params`, a timm
            network's `.safetensors`; the folder of a finished segmentation network of the same classes.
        options: Further fields of `DeepLabConfig`, such as output_stride, the pixels of a cell.
        batch_norm: "frozen" or "trained" in the backbone; "sync": trained, with the statistics of all GPUs; null for
            the preset's.
        crop_size: Side of the training crops in pixels; null for the preset's.
        augmentation_options: Options of `bitrans_hf.data.segmentation.PairAugmentation` in place of the preset's.
        epochs: Passes over the images.
        batch_size: Images for each process and forward pass.
        gradient_accumulation: Forward passes for each optimiser step.
        optimizer: "sgd": "mctformer" has next to no momentum (1e-5: the weight decay that lands in its place),
            "deeplab-v1" 0.9. "adamw": for vision transformers.
        learning_rate: First rate of the backbone; it falls by (1 - step / steps)^0.9. The head has 10 times it. Null
            for the preset's.
        weight_decay: Not applied to biases and norms; null for the preset's.
        max_grad_norm: Clip the gradient to this norm; null does not clip.
        precision: "auto": bf16 where the device multiplies bf16 natively, else float32; "no" for float32; "bf16".
        channels_last: Keep feature maps with the channels innermost, as tensor cores want them.
        compile: Compile the network with torch.compile.
        num_workers: Processes that load images, for each process that trains.
        log_every: Optimiser steps between log lines.
        checkpoint_every: Optimiser steps between checkpoints, beside the one after each epoch; null for none.
        trackers: Trackers of Accelerate.
    """

    labels: str = "pseudo_labels"
    split: str | None = "train"
    num_images: int | None = None
    val_split: str | None = None
    val_every: int = 1
    preset: Literal["mctformer", "deeplab-v1"] = "mctformer"
    backbone: str = "resnet38"
    weights: str = "scratch"
    options: dict[str, Any] = field(default_factory=dict)
    batch_norm: Literal["frozen", "trained", "sync"] | None = None
    crop_size: int | None = None
    augmentation_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 4
    gradient_accumulation: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    precision: Precision = "auto"
    channels_last: bool = False
    compile: bool = False
    num_workers: int = 2
    log_every: int = 10
    checkpoint_every: int | None = None
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read null weights as "scratch"."""
        null_weights_are_scratch(self)


@dataclass(frozen=True)
class PredictionRecipe:
    """How the trained network is tested.

    Attributes:
        splits: Splits to predict; the first one's score heads the metrics.
        preset: Views and their fusion, see `bitrans_hf.stages.multi_scale.TEST_PRESETS`: "mctformer" or "deeplab-v1".
        scales: Factors of the image's sides; null for the preset's.
        flip: See flipped images too; null for the preset's.
        window: Side of sliding windows in pixels, for images that do not fit in memory; null for whole images.
        stride: Pixels from one window to the next; null for two thirds of the window.
        refiner: What the fused scores pass through at last: "crf", "par" or "none".
        crf_preset: Preset of the CRF, a name of `bitrans_hf.refine.crf.CRF_PRESETS`; null for the one that belongs to
            `preset`.
        crf_classes: "predicted": the refiner sees background and the classes that win some pixel, which is what makes
            80 classes affordable. "all": every class.
        pack: Pack the predictions of VOC splits without masks, that is test, as the VOC server wants them.
        network: Folder of another segmentation network than the run's own; null for `segmentation/model` of the run.
    """

    splits: list[str | None] = field(default_factory=lambda: ["val"])
    preset: Literal["mctformer", "deeplab-v1"] = "mctformer"
    scales: list[float] | None = None
    flip: bool | None = None
    window: int | None = None
    stride: int | None = None
    refiner: Refiner = "crf"
    crf_preset: str | None = None
    crf_classes: Literal["predicted", "all"] = "predicted"
    pack: bool = False
    network: str | None = None


@dataclass(frozen=True)
class ReportRecipe:
    """What the page shows.

    Attributes:
        split: Split that the pictures are from, one of seeds.splits.
        num_images: How many; images with several classes come first.
    """

    split: str | None = "val"
    num_images: int = 12


@dataclass(frozen=True)
class PublishRecipe:
    """What goes to the Hub, and where.

    Attributes:
        repo: Repository of the Bi-Trans model, owner/name. The affinity network goes to <repo>-affinity, the
            segmentation network to <repo>-segmentation, pseudo labels to the data set <repo>-pseudo-labels, the metric
            to the Space <owner>/mean_iou. Null writes the folders and uploads nothing.
        parts: Of "model", "affinity", "segmentation", "pseudo_labels" and "metric"; null for all that the run has
            finished, without the metric.
        version: Tag of the versions.
        private: Whether new repositories are private.
        create: Make repositories that are not there.
        branch: Where to commit.
        licence: Of the weights, as the Hub spells it.
        picture: Picture for the model's card; null for the report's gallery where the pictures are drawn by us, and
            none where they are photographs.
    """

    repo: str | None = None
    parts: list[Literal["model", "affinity", "segmentation", "pseudo_labels", "metric"]] | None = None
    version: str = "v1.0"
    private: bool = True
    create: bool = True
    branch: str = "main"
    licence: str = "apache-2.0"
    picture: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One run, from images to a page of pictures.

    Attributes:
        name: Results go to <output_dir>/<name>/<stage>/.
        output_dir: Folder of all runs.
        seed: Of the weights, the order of the images, their augmentation and stochastic depth.
        data: Which images.
        model: Which network.
        train: How to train.
        seeds: How seeds are made and cut.
        affinity: How the affinity network is trained; null leaves the stage out.
        pseudo_labels: How seeds become pseudo labels; null leaves the stage out.
        segmentation: How the segmentation network is trained; null leaves the stage out.
        prediction: How it is tested; null leaves the stage out.
        report: What the page shows.
        publish: What goes to the Hub; null leaves the stage out.
    """

    name: str = "shapes"
    output_dir: str = "runs"
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    seeds: SeedsRecipe = field(default_factory=SeedsRecipe)
    affinity: AffinityRecipe | None = None
    pseudo_labels: PseudoLabelsRecipe | None = None
    segmentation: SegmentationRecipe | None = None
    prediction: PredictionRecipe | None = None
    report: ReportRecipe = field(default_factory=ReportRecipe)
    publish: PublishRecipe | None = None

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: a value is out of range.
        """
        self._check_nulls()
        sections = {"train": self.train, "affinity": self.affinity, "segmentation": self.segmentation}
        for section, settings in sections.items():
            for name in ("epochs", "batch_size", "gradient_accumulation", "log_every"):
                if settings is not None and getattr(settings, name) < 1:
                    raise InputError(f"{section}.{name} must be at least 1, got {getattr(settings, name)}.")
        if not self.seeds.scales or self.seeds.scales[0] != 1.0:
            raise InputError(f"seeds.scales must begin with 1.0, got {self.seeds.scales}.")
        if self.seeds.refine_steps is not None and self.seeds.refine_steps < 1:
            raise InputError(f"seeds.refine_steps must be at least 1, got {self.seeds.refine_steps}.")
        if self.seeds.max_side is not None and self.seeds.max_side < 1:
            raise InputError(f"seeds.max_side must be at least 1 pixel, got {self.seeds.max_side}.")
        if not 0 <= self.seeds.threshold <= 1:
            raise InputError(f"seeds.threshold must be in [0, 1], got {self.seeds.threshold}.")
        if self.data.source != "shapes" and self.data.root is None:
            raise InputError(f"data.root must name the folder of the {self.data.source} data, got null.")
        MaskValues.parse(self.data.mask_values)
        if self.data.mask_values is not None and self.data.source != "folder":
            raise InputError(
                f"data.mask_values is for data.source folder, got {self.data.mask_values!r} for {self.data.source}; "
                "set it to null."
            )
        if self.report.split not in self.seeds.splits:
            raise InputError(
                f"report.split must be one of seeds.splits, {self.seeds.splits}, got {self.report.split!r}; the "
                "report shows seeds."
            )
        self._check_model()
        self._check_affinity()
        self._check_pseudo_labels()
        self._check_segmentation()
        self._check_prediction()

    def _check_nulls(self) -> None:
        """Refuse null where the type does not take it: in a YAML file, jsonargparse lets it pass."""
        sections = {f"{each.name}.": getattr(self, each.name) for each in dataclasses.fields(self)}
        for prefix, settings in {"": self, **sections}.items():
            types = get_type_hints(type(settings)) if dataclasses.is_dataclass(settings) else {}
            for name, kind in types.items():
                if getattr(settings, name) is None and type(None) not in get_args(kind):
                    raise InputError(
                        f"{prefix}{name} must not be null; give a value, or leave the key out for its default."
                    )

    def _check_model(self) -> None:
        is_cnn = self.model.architecture == "cam"
        for each in dataclasses.fields(self.model):
            value = getattr(self.model, each.name)
            if each.name not in SHARED_KEYS and is_cnn != (each.name in CNN_KEYS) and value != each.default:
                raise InputError(
                    f"model.{each.name} does not belong to model.architecture {self.model.architecture or 'bitrans'}, "
                    f"got {value!r}; set it to {'null' if each.default is None else each.default}."
                )
        for section, names in TRANSFORMER_KEYS.items():
            for name in names:
                if is_cnn and getattr(getattr(self, section), name) is not None:
                    raise InputError(f"{section}.{name} does not belong to model.architecture cam; set it to null.")
        made = variants_of(self)
        sections = {"seeds": self.seeds, "affinity": self.affinity, "pseudo_labels": self.pseudo_labels}
        for section, settings in sections.items():
            variant = settings.variant if settings is not None else None
            if variant is not None and variant not in made:
                raise InputError(
                    f"{section}.variant must be {' or '.join(made)} for model.architecture cam, got {variant!r}; a "
                    "CNN has no attention, so its class activation maps are its only seeds."
                )
        momentum = self.train.momentum
        if momentum is not None and (self.train.optimizer != "sgd" or not 0 <= momentum < 1):
            raise InputError(
                f"train.momentum must be in [0, 1) and is for train.optimizer sgd, got {momentum} for "
                f"{self.train.optimizer or 'adamw'}."
            )

    def _check_affinity(self) -> None:
        affinity = self.affinity
        if affinity is None:
            return
        self._check_seeds_are_made("affinity.split", affinity.split)
        find_preset(affinity.crf_preset)
        for name in ("num_images", "crop_size", "low_alpha", "high_alpha"):
            value = getattr(affinity, name)
            if value is not None and value <= 0:
                raise InputError(f"affinity.{name} must be above 0, got {value}.")
        for name in ("foreground_threshold", "background_threshold"):
            _check_threshold(f"affinity.{name}", getattr(affinity, name))
        for alpha, threshold in (("low_alpha", "foreground_threshold"), ("high_alpha", "background_threshold")):
            if getattr(affinity, alpha) is not None and getattr(affinity, threshold) is not None:
                raise InputError(f"affinity.{alpha} and affinity.{threshold} exclude each other; set one to null.")
        if affinity.weights == "trained" and affinity.backbone != "bitrans":
            raise InputError(
                'affinity.weights "trained" is for the backbone bitrans, got the backbone '
                f'{affinity.backbone!r}; give a file of weights, "timm" for weights from the Hub, or "scratch".'
            )

    def _check_pseudo_labels(self) -> None:
        labels = self.pseudo_labels
        if labels is None:
            return
        find_preset(labels.crf_preset)
        if not labels.splits:
            raise InputError("pseudo_labels.splits is empty; name the splits to make pseudo labels for.")
        for split in labels.splits:
            self._check_seeds_are_made("pseudo_labels.splits", split)
        if not isinstance(labels.threshold, str):
            _check_threshold("pseudo_labels.threshold", labels.threshold)
        for name in ("alpha", "output_stride", "beta", "batch_size"):
            value = getattr(labels, name)
            if value is not None and value <= 0:
                raise InputError(f"pseudo_labels.{name} must be above 0, got {value}.")
        if labels.num_doublings is not None and labels.num_doublings < 0:
            raise InputError(f"pseudo_labels.num_doublings must be 0 or more, got {labels.num_doublings}.")
        if labels.method == "refiner" and labels.refiner == "none":
            raise InputError('pseudo_labels.method "refiner" needs pseudo_labels.refiner crf or par, got none.')
        if labels.method == "random_walk" and self.affinity is None and labels.network is None:
            raise InputError(
                'pseudo_labels.method "random_walk" needs an affinity network: add the section affinity, name one '
                'with pseudo_labels.network, or choose the method "refiner".'
            )

    def _check_segmentation(self) -> None:
        segmentation = self.segmentation
        if segmentation is None:
            return
        for name in ("val_every", "num_images"):
            value = getattr(segmentation, name)
            if value is not None and value < 1:
                raise InputError(f"segmentation.{name} must be at least 1, got {value}.")
        if segmentation.labels == "pseudo_labels":
            made = self.pseudo_labels.splits if self.pseudo_labels else None
            if made is not None and segmentation.split not in made:
                raise InputError(
                    f"segmentation.split names {segmentation.split!r}, which gets no pseudo labels; add it to "
                    f"pseudo_labels.splits {made}."
                )
        if segmentation.labels == "seeds":
            self._check_seeds_are_made("segmentation.split", segmentation.split)
        if segmentation.weights == "trained" and segmentation.backbone != "bitrans":
            raise InputError(
                'segmentation.weights "trained" is for the backbone bitrans, got the backbone '
                f'{segmentation.backbone!r}; give a file of weights, "timm" for weights from the Hub, or "scratch".'
            )

    def _check_prediction(self) -> None:
        prediction = self.prediction
        if prediction is None:
            return
        if not prediction.splits:
            raise InputError("prediction.splits is empty; name the splits to predict.")
        if prediction.crf_preset is not None:
            find_preset(prediction.crf_preset)
        if prediction.scales is not None and not (prediction.scales and min(prediction.scales) > 0):
            raise InputError(f"prediction.scales must be factors above 0, got {prediction.scales}.")
        if self.segmentation is None and prediction.network is None:
            raise InputError(
                "prediction needs a network: add the section segmentation, or name one with prediction.network."
            )
        if prediction.pack and (self.data.source != "voc" or self.data.classes is not None):
            raise InputError(
                "prediction.pack is for the VOC server, which wants all 20 classes in VOC's order: it needs "
                f"data.source voc and no data.classes, got {self.data.source} and {self.data.classes}."
            )

    def _check_seeds_are_made(self, key: str, split: str | None) -> None:
        if split not in self.seeds.splits:
            raise InputError(f"{key} names {split!r}, which has no seeds; add it to seeds.splits {self.seeds.splits}.")


def _check_threshold(key: str, threshold: float | None) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"{key} must be in [0, 1], got {threshold}.")


@dataclass(frozen=True)
class RunOptions:
    """What does not change the result.

    Attributes:
        cpu: Run on the CPU even where there is a GPU.
        quiet: Print results alone: no plan, no progress.
        strict: Stop at the first image that cannot be read.
        workers: Processes that refine label maps, for each process that was launched; null for one for each CPU core.
        dry_run: publish: list what would be uploaded, and upload nothing.
    """

    cpu: bool = False
    quiet: bool = False
    strict: bool = False
    workers: int | None = None
    dry_run: bool = False


class RecipeFile(ActionConfigFile):
    """`--config`: a YAML file, or the name of a recipe that ships with the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file into the parsed values."""
        super().__call__(parser, cfg, str(recipe_file(values)), option_string)


CONFIG_HELP = "YAML file with the keys below, or the name of a shipped recipe; a later one overrides an earlier one"


def parse_recipe(description: str | None, arguments: Sequence[str] | None = None) -> tuple[Recipe, RunOptions]:
    """Read `--config FILE`, `--key value` overrides and the run options from the command line.

    Args:
        description: Of the script, for `--help`.
        arguments: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: unknown key, wrong type or value; the message says which.
    """
    recipe, options, _ = parse_recipe_with(NoOptions, description, arguments)
    return recipe, options


@dataclass(frozen=True)
class NoOptions:
    """A script that has no options of its own."""


Group = TypeVar("Group")
Made = TypeVar("Made")


def parse_recipe_with(
    own_options: type[Group], description: str | None, arguments: Sequence[str] | None = None
) -> tuple[Recipe, RunOptions, Group]:
    """Read the recipe as `parse_recipe`, and the fields of a dataclass of the script's own options beside it."""
    parser = ArgumentParser(description=(description or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action=RecipeFile, help=CONFIG_HELP)
    for group in (own_options, RunOptions, Recipe):
        parser.add_class_arguments(group)
    values = parser.instantiate(parser.parse_args(arguments))

    def made(group: type[Made]) -> Made:
        return group(**{key.name: values[key.name] for key in dataclasses.fields(group)})  # type: ignore[arg-type]

    try:
        return made(Recipe), made(RunOptions), made(own_options)
    except InputError as error:
        parser.error(str(error))


def load_images(data: DataRecipe, split: str | None, *, masks: bool) -> Dataset:
    """Load one split of the recipe's data.

    Args:
        data: Where the images are.
        split: Name of the split; null for all images of a folder.
        masks: False leaves ground truth out of reach: training never sees it.
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
            drop_empty=bool(data.drop_empty),
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
            drop_empty=bool(data.drop_empty),
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
            allow_empty=bool(data.allow_empty),
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
    """Draw the scenes of a split once for all stages of a process, each of which loads it."""
    return make_shapes(size, seed, image_size=image_size)


def check_later_splits(recipe: Recipe) -> None:
    """Load the splits that the stages after the training use: what is wrong with one shows before hours of training.

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
    """Say what a folder of somebody's own images holds and what is wrong with it; None for other sources.

    This comes before a training: of pictures the beginning is read, and of the masks in all splits, against which
    later stages score, up to a hundred. Training gets none of them.

    Raises:
        DataError: a mask cannot be scored against.
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
        allow_empty=bool(data.allow_empty),
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
    """Say which classes every image shows, so that nothing tells them from what surrounds them; None for no class."""
    classes = class_names(images)
    counts = Counter(classes[class_id] for ids in images["labels"] for class_id in set(ids))
    return note_on_contrast(classes, counts, len(images))


def max_side_of(recipe: Recipe) -> int:
    """Return the longest side in pixels that a run works on images at."""
    return MAX_SIDE if recipe.seeds.max_side is None else recipe.seeds.max_side


def variants_of(recipe: Recipe) -> dict[str, tuple[str, bool]]:
    """Return the (mode, refine) pairs of a run's seeds by their names; a CNN, which has no attention, has one."""
    variants = seed_variants(recipe.seeds.fusion or "fused")
    return {"coarse_cam": variants["coarse_cam"]} if recipe.model.architecture == "cam" else variants


def build_model(model: ModelRecipe, id2label: dict[int, str], seed: int) -> BiTransModel:
    """Build the network of a recipe, with its starting weights.

    Args:
        model: What to build.
        id2label: Names of the C object classes.
        seed: Of everything that is drawn: new weights and the class tokens' noise.
    """
    fields = {key: value for key, value in dataclasses.asdict(model).items() if value is not None}
    fields.pop("architecture", None)
    weights, noise = fields.pop("weights"), fields.pop("class_token_noise")
    if weights == "scratch":
        set_seed(seed)
        return BiTransModel(BiTransConfig(id2label=id2label, **fields))
    if weights.startswith("timm:"):
        return from_timm(
            weights.removeprefix("timm:"), id2label=id2label, class_token_noise=noise, seed=seed, **fields
        )
    return from_timm_state_dict(weights_file(weights), id2label=id2label, class_token_noise=noise, seed=seed, **fields)


def build_cam(model: ModelRecipe, id2label: dict[int, str], seed: int) -> CamModel:
    """Build the CNN of a recipe, with its starting weights; arguments as in `build_model`.

    Raises:
        ValueError, OSError: the weights are not there or do not fit, see `load_backbone`; or stages are to stay as
            they were drawn.
    """
    given = {"backbone": model.backbone, "image_size": model.image_size}
    fields = {key: value for key, value in given.items() if value is not None} | (model.options or {})
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
