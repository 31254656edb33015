"""Recipes: every choice that a result depends on, in one frozen dataclass, and the options of a call, in another.

The resolved recipe is written beside every result; options are not, since no result depends on them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from ..data import MaskValues
from ..hub.configuration_bitrans import BiTransConfig
from ..hub.errors import InputError
from ..hub.image_processing_bitrans import MAX_SIDE
from ..hub.maps import THRESHOLD
from ..hub.seeds import seed_variants
from ..refine.crf import find_preset

ALL_IMAGES = "all_images"
"""Name of the split `null`, all images of a folder, in results."""

PlainRecipe: TypeAlias = dict[str, Any]
"""A recipe, or a part of one, as YAML and JSON hold it: text, numbers, lists, and more of the same."""

Options: TypeAlias = dict[str, Any]
"""Arguments of a network's configuration or of an augmentation, by name; these have more than a recipe lists."""

SeedVariant: TypeAlias = Literal["sc_cam", "coarse_cam", "fused", "refined"]
Refiner: TypeAlias = Literal["crf", "par", "none"]
Precision: TypeAlias = Literal["auto", "no", "bf16"]

TRANSFORMER_KEYS = {
    "train": ("consistency_warmup_epochs",),
    "seeds": (
        "fusion",
        "num_seed_layers",
        "num_affinity_layers",
        "affinity_source",
        "refine_steps",
        "normalize_affinity",
    ),
}
"""Keys of other sections that a CNN does not have."""


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
        allow_empty: folder: an empty cell of labels means that the image shows no class; otherwise it is refused.
        num_train: shapes: number of scenes to train on.
        num_val: shapes: number of scenes in each other split.
        image_size: shapes: side of a scene in pixels.
        seed: shapes: seed of the scenes; every split draws from its own stream.
        sbd_root: voc: SBD's folder, for train_aug where `prepare_voc.py` has not written its list.
        mask_folder: coco: folder with a folder of masks for each split, `val2014` and so on, which `prepare_coco.py`
            wrote once; splits without one, and all with null, have theirs painted when they are needed.
        mask_overlap: coco: who gets pixels of several objects, "later", "smaller" or "ignore"; null: as the masks
            in `mask_folder` were painted, else "later".
        mask_crowd: coco: what crowd regions become in masks, "background", "ignore" or "object"; null: as
            the masks in `mask_folder` were painted, else "background".
        drop_empty: voc, coco: leave out images that show none of the classes.
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
    drop_empty: bool = False
    separator: str | None = None
    allow_empty: bool = False
    mask_values: str | None = None


def null_weights_are_scratch(settings: Any) -> None:
    """Let `weights: null` mean "scratch"; from the command line it comes as text."""
    if settings.weights in (None, "null"):
        object.__setattr__(settings, "weights", "scratch")


@dataclass(frozen=True)
class BiTransRecipe:
    """The Bi-Trans network; null leaves a value to the weights or to `BiTransConfig`'s default.

    Attributes:
        weights: "scratch" or null; "timm:<name>" for ImageNet weights from the Hub; a `.safetensors` or `.pth` file of
            a timm vision transformer.
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
        class_head: How a class token becomes its logit, "mean" or "patch_head".
        num_seed_layers: K, how many of the last layers give the SC-CAM.
        num_affinity_layers: How many of the last layers give the affinity.
        view: Second view: hflip, vflip, rot90, rot180 or none.
        scc_weight: Weight of the class-specific consistency loss.
        pac_weight: Weight of the pair-wise affinity consistency loss.
        patch_weight: Weight of the patch branch's classification loss; 0 is MCTformer V1.
        class_contrast_weight: Weight of MCTformer+'s contrastive class-token loss.
        architecture: "bitrans"; "cam" has other keys, see `CamRecipe`.
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
    class_head: str | None = None
    num_seed_layers: int | None = None
    num_affinity_layers: int | None = None
    view: str | None = None
    scc_weight: float | None = None
    pac_weight: float | None = None
    patch_weight: float | None = None
    class_contrast_weight: float | None = None
    architecture: Literal["bitrans"] = "bitrans"

    def __post_init__(self) -> None:
        """Read null weights as "scratch"."""
        null_weights_are_scratch(self)


@dataclass(frozen=True)
class CamRecipe:
    """A plain CNN whose class activation maps are its only seeds: the baseline without a transformer.

    Attributes:
        weights: "scratch" or null; "timm" for the backbone's weights from the Hub; a file of them, as
            `bitrans_hf.weights.load_backbone` reads it.
        image_size: Side of the training crops in pixels; null for `CamConfig`'s.
        backbone: Name of a convolutional network of timm, or "resnet38"; null for ResNet50.
        options: Further fields of `CamConfig`, such as output_stride, the pixels of a cell.
        architecture: "cam"; in a preset it replaces the whole section of the recipe before it.
    """

    weights: str = "scratch"
    image_size: int | None = None
    backbone: str | None = None
    options: Options = field(default_factory=dict)
    architecture: Literal["cam"] = "cam"

    def __post_init__(self) -> None:
        """Read null weights as "scratch"."""
        null_weights_are_scratch(self)


ModelRecipe: TypeAlias = BiTransRecipe | CamRecipe
MODEL_RECIPES: dict[str, type[ModelRecipe]] = {"bitrans": BiTransRecipe, "cam": CamRecipe}
"""Section `model` by its architecture."""


@dataclass(frozen=True)
class TrainingRecipe:
    """What every stage that trains a network says about its training.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images for each process and forward pass.
        gradient_accumulation: Forward passes for each optimizer step.
        max_grad_norm: Clip the gradient to this norm; null does not clip.
        precision: "auto": bf16 where the device multiplies bf16 natively, else float32; "no" for float32; "bf16".
        compile: Compile the network with torch.compile.
    """

    epochs: int = 1
    batch_size: int = 1
    gradient_accumulation: int = 1
    max_grad_norm: float | None = None
    precision: Precision = "auto"
    compile: bool = False


@dataclass(frozen=True)
class TrainRecipe(TrainingRecipe):
    """How to train; the defaults are the reference's (DeiT-Small on VOC, one GPU).

    Attributes:
        learning_rate: Peak rate for 512 images in a step; it is scaled linearly with their number.
        min_learning_rate: Last rate, not scaled.
        warmup_learning_rate: First rate, not scaled.
        warmup_epochs: Length of the linear warm-up.
        consistency_warmup_epochs: Length of a linear rise of both consistency losses' weights from 0; 0 for none.
        schedule: "epoch_cosine": the reference's, constant within an epoch, its first two epochs at the warm-up rate.
            "step_cosine": changes at every step, for short runs. "poly": (1 - step / steps)^0.9, without warm-up.
        weight_decay: Not applied to biases, norms, tokens and positions.
        augmentation: Preset of `bitrans_hf.data.transforms`: "reference", "crop_flip" or "flip".
        augmentation_options: Options of the preset.
        activation_checkpointing: Keep only the layers' inputs and recompute the rest in the backward pass.
        optimizer: "adamw" or "sgd".
        momentum: Of sgd.
    """

    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-5
    warmup_learning_rate: float = 1e-6
    warmup_epochs: float = 5
    consistency_warmup_epochs: float = 0
    schedule: Literal["epoch_cosine", "step_cosine", "poly"] = "epoch_cosine"
    weight_decay: float = 0.05
    augmentation: str = "reference"
    augmentation_options: Options = field(default_factory=dict)
    activation_checkpointing: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0


@dataclass(frozen=True)
class SeedsRecipe:
    """How seeds are made and cut.

    Attributes:
        splits: Splits to make seeds for; the first one's scores head the metrics.
        scales: Sizes to average over; the first must be 1.0.
        flip: Average over the horizontal flip too.
        variant: The maps that become label maps: "sc_cam", "coarse_cam", "fused" or "refined".
        threshold: Background score for the label maps: a number, or "auto", found in the seeds of the first split
            without any mask. The trained model carries it.
        batch_size: Images of one size in a forward pass.
        fusion: Rule behind the variants "fused" and "refined": "fused", the paper's product; "fused_sqrt", its
            root; "competing", in which the classes of an image share its patches; "sc_cam" or "coarse_cam" alone.
        num_seed_layers: K, how many of the last layers give the SC-CAM; null as the model was trained.
        num_affinity_layers: How many of the last layers give the affinity; null as the model was trained (all).
        affinity_source: "attention" (Eq. 9), "similarity" of queries and of keys, or "joint", the mean of both; null
            as the model was trained (attention).
        refine_steps: How often the variant "refined" is spread along the affinity; once in the paper.
        normalize_affinity: Give every row of the affinity the sum 1 first.
        max_side: Longest side in pixels that images are worked on at, in this and all later stages: larger ones are
            reduced first, and what is found is enlarged, so that label maps have the image's own size. Memory grows
            with its fourth power. Null for the image processor's, 640.
    """

    splits: list[str | None] = field(default_factory=lambda: ["train", "val"])
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = True
    variant: SeedVariant = "refined"
    threshold: float | Literal["auto"] = THRESHOLD
    batch_size: int = 8
    fusion: Literal["fused", "fused_sqrt", "competing", "sc_cam", "coarse_cam"] = "fused"
    num_seed_layers: int | None = None
    num_affinity_layers: int | None = None
    affinity_source: Literal["attention", "similarity", "joint"] | None = None
    refine_steps: int = 1
    normalize_affinity: bool = False
    max_side: int | None = None


@dataclass(frozen=True)
class AffinityRecipe(TrainingRecipe):
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
        optimizer: "literal": SGD as PSA runs it, where the weight decay also lands in the place of momentum: 0.0005.
            "momentum": what was meant, momentum 0.9.
        learning_rate: First rate of the backbone; it falls by (1 - step / steps)^0.9. New layers have 10 times it,
            biases twice.
        weight_decay: Not applied to biases.
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
    options: Options = field(default_factory=dict)
    crop_size: int = 448
    color_jitter: float = 0.3
    epochs: int = 5
    batch_size: int = 8
    optimizer: Literal["literal", "momentum"] = "literal"
    learning_rate: float = 0.01
    weight_decay: float = 5e-4

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
    network: str | None = None


@dataclass(frozen=True)
class SegmentationRecipe(TrainingRecipe):
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
        preset: "mctformer" or "deeplab-v1" (SEAM's retraining): head, frozen parts, optimizer and augmentation.
        backbone: "resnet38", "bitrans" (the run's own encoder) or the name of a timm network.
        weights: What the backbone starts from. "trained": bitrans, the run's own model; "scratch" or null; "timm": a
            timm network's weights from the Hub; a file: the public ResNet38 `.pth`, MXNet's `.params`, a timm
            network's `.safetensors`; the folder of a finished segmentation network of the same classes.
        options: Further fields of `DeepLabConfig`, such as output_stride, the pixels of a cell.
        batch_norm: "frozen" or "trained" in the backbone; "sync": trained, with the statistics of all GPUs; null for
            the preset's.
        crop_size: Side of the training crops in pixels; null for the preset's.
        augmentation_options: Options of `bitrans_hf.data.segmentation.PairAugmentation` in place of the preset's.
        optimizer: "sgd": "mctformer" has next to no momentum (1e-5: the weight decay that lands in its place),
            "deeplab-v1" 0.9. "adamw": for vision transformers.
        learning_rate: First rate of the backbone; it falls by (1 - step / steps)^0.9. The head has 10 times it. Null
            for the preset's.
        weight_decay: Not applied to biases and norms; null for the preset's.
        channels_last: Keep feature maps with the channels innermost, as tensor cores want them.
    """

    labels: str = "pseudo_labels"
    split: str | None = "train"
    num_images: int | None = None
    val_split: str | None = None
    val_every: int = 1
    preset: Literal["mctformer", "deeplab-v1"] = "mctformer"
    backbone: str = "resnet38"
    weights: str = "scratch"
    options: Options = field(default_factory=dict)
    batch_norm: Literal["frozen", "trained", "sync"] | None = None
    crop_size: int | None = None
    augmentation_options: Options = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float | None = None
    weight_decay: float | None = None
    channels_last: bool = False

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
    pack: bool = False
    network: str | None = None


@dataclass(frozen=True)
class ReportRecipe:
    """What the page shows.

    Attributes:
        split: Split that the images are from, one of seeds.splits.
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
        picture: Image for the model's card; null for the report's gallery where the images are drawn by us, and
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
    """One run, from images to a page of images.

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
    model: ModelRecipe = field(default_factory=BiTransRecipe)
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
            for name in ("epochs", "batch_size", "gradient_accumulation"):
                if settings is not None and getattr(settings, name) < 1:
                    raise InputError(f"{section}.{name} must be at least 1, got {getattr(settings, name)}.")
        if not self.seeds.scales or self.seeds.scales[0] != 1.0:
            raise InputError(f"seeds.scales must begin with 1.0, got {self.seeds.scales}.")
        if self.seeds.refine_steps < 1:
            raise InputError(f"seeds.refine_steps must be at least 1, got {self.seeds.refine_steps}.")
        if self.seeds.max_side is not None and self.seeds.max_side < 1:
            raise InputError(f"seeds.max_side must be at least 1 pixel, got {self.seeds.max_side}.")
        if self.seeds.threshold != "auto":
            _check_threshold("seeds.threshold", self.seeds.threshold)
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
        is_cnn = isinstance(self.model, CamRecipe)
        for section, names in TRANSFORMER_KEYS.items():
            settings = getattr(self, section)
            for name in names:
                default = getattr(type(settings), name)
                if is_cnn and getattr(settings, name) != default:
                    raise InputError(
                        f"{section}.{name} does not belong to model.architecture cam; set it to "
                        f"{'null' if default is None else str(default).lower()}."
                    )
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
        if momentum and (self.train.optimizer != "sgd" or not 0 <= momentum < 1):
            raise InputError(
                f"train.momentum must be in [0, 1) and is for train.optimizer sgd, got {momentum} for "
                f"{self.train.optimizer}."
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
        num_workers: Processes that load images, for each process that trains.
        log_every: Optimizer steps between log lines.
        checkpoint_every: Optimizer steps between checkpoints, beside the one after each epoch; null for none.
        trackers: Trackers of Accelerate, such as tensorboard, wandb, trackio.
    """

    cpu: bool = False
    quiet: bool = False
    strict: bool = False
    workers: int | None = None
    dry_run: bool = False
    num_workers: int = 2
    log_every: int = 10
    checkpoint_every: int | None = None
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            InputError: a value is out of range.
        """
        for name, least in (("num_workers", 0), ("log_every", 1), ("checkpoint_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}.")


def max_side_of(recipe: Recipe) -> int:
    """Return the longest side in pixels that a run works on images at."""
    return MAX_SIDE if recipe.seeds.max_side is None else recipe.seeds.max_side


def reading_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of `BiTransConfig` that say how a trained network is read, as the recipe has them.

    The threshold "auto" is not among them: it is found when seeds are made.
    """
    threshold = recipe.seeds.threshold
    reading: dict[str, Any] = {} if threshold == "auto" else {"threshold": threshold}
    for name in TRANSFORMER_KEYS["seeds"]:
        from_model, default = getattr(recipe.model, name, None), getattr(BiTransConfig, name)
        values = (getattr(recipe.seeds, name), from_model, default)
        reading[name] = next((value for value in values if value is not None), None)
    return reading


def variants_of(recipe: Recipe) -> dict[str, tuple[str, bool]]:
    """Return the (mode, refine) pairs of a run's seeds by their names; a CNN, which has no attention, has one."""
    variants = seed_variants(recipe.seeds.fusion)
    return {"coarse_cam": variants["coarse_cam"]} if isinstance(recipe.model, CamRecipe) else variants
