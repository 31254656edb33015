"""The content of the stages' `metrics.json`. Scores are in percent with two decimals.

A record omits what was not measured when written, and ignores unknown keys when read, so files of older and newer
versions can be read.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self, get_args, get_origin, get_type_hints

ByName = dict[str, float]
"""One number per name of a seed variant, a step or a class."""


def percent(share: float) -> float:
    """Convert a fraction to percent with two decimals; nan, the score of an absent class, stays nan."""
    return round(100 * float(share), 2)


class Record:
    """A dataclass stored as a JSON object, without fields that equal their default."""

    def to_json(self) -> Mapping[str, Any]:
        """Return the fields for `write_json`, which writes records within them too."""
        values = {each: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]  # a dataclass
        return {each.name: value for each, value in values.items() if value != _default(each)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read a JSON object, with the records within."""
        hints = get_type_hints(cls)
        return cls(**{name: _read(hints[name], value) for name, value in content.items() if name in hints})


def _default(of: "Field[Any]") -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _read(hint: Any, value: Any) -> Any:
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return {name: _read(get_args(hint)[1], each) for name, each in value.items()}
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Record) and value is not None:
            return kind.from_json(value)
    return value


# ---- One split.


@dataclass(frozen=True, kw_only=True)
class SplitScores(Record):
    """Common fields of a split's scores.

    Attributes:
        images: Number of images with a result.
        scored: Number of these with a known mask.
        mask_rule: How the masks were made; None if the data does not say, "" if there are no masks.
    """

    images: int | None = None
    scored: int | None = None
    mask_rule: str | None = ""

    def shown_images(self) -> str:
        """Describe the number of images, and the number of scored ones if that is smaller."""
        images, scored = self.images or 0, self.scored or 0
        return f"{images} images" + (f" ({scored} of them scored)" if 0 < scored < images else "")


@dataclass(frozen=True, kw_only=True)
class SeedScores(SplitScores):
    """Scores of seeds, each by the name of the seed variant; mIoU is over all classes and background.

    Attributes:
        miou: mIoU at the variant's best threshold.
        threshold: That threshold, in [0, 1].
        per_class: Class -> IoU there.
        miou_at_recipe_threshold: mIoU at the recipe's threshold, the one that "auto" found among them.
        miou_at_given_threshold: mIoU at the best threshold of the first split; empty for that one.
        confidence: How well the confidence of masks fits their IoU: "spearman", rank correlation, and "lift", how many
            times as many of the least sure tenth have an IoU below 30 % as of all. Empty for a CNN.
        several_classes: The scores over images with two or more classes alone.
        reduced: Images that were larger than `seeds.max_side`.
    """

    miou: ByName = field(default_factory=dict)
    threshold: ByName = field(default_factory=dict)
    per_class: dict[str, ByName] = field(default_factory=dict)
    miou_at_recipe_threshold: ByName = field(default_factory=dict)
    miou_at_given_threshold: ByName = field(default_factory=dict)
    confidence: ByName = field(default_factory=dict)
    several_classes: "SeedScores | None" = None
    reduced: int = 0

    def shown(self) -> str:
        """Say the mIoU of every variant."""
        if not self.miou:
            return "no masks to score against"
        return "mIoU " + ", ".join(
            f"{variant} {value:.1f} (at {self.threshold[variant]:.2f})" for variant, value in self.miou.items()
        )


@dataclass(frozen=True, kw_only=True)
class StepScores(SplitScores):
    """Scores of label maps after each step of a stage, by the name of the step.

    Attributes:
        steps: mIoU over all classes and background.
        per_class: Class -> IoU.
        sure: Share of labeled pixels, for steps that leave some pixels unlabeled.
        several_classes: The scores over images with two or more classes alone.
        without_classes: Number of images that show no class.
        archive: Packed label maps of a split without public masks.
    """

    steps: ByName = field(default_factory=dict)
    per_class: dict[str, ByName] = field(default_factory=dict)
    sure: ByName = field(default_factory=dict)
    several_classes: "StepScores | None" = None
    without_classes: int | None = None
    archive: str | None = None

    def shown(self) -> str:
        """Say the mIoU after each step."""
        if not self.steps:
            return "no masks to score against"
        return "mIoU " + ", ".join(f"{step} {value:.1f}" for step, value in self.steps.items())


# ---- One stage.


@dataclass(frozen=True, kw_only=True)
class SeedsRecord(Record):
    """`metrics.json` of the stage seeds; `miou` and `threshold` are those of its first split.

    Attributes:
        cut_at: Background score of the label maps: seeds.threshold, or what "auto" found.
    """

    miou: ByName = field(default_factory=dict)
    threshold: ByName = field(default_factory=dict)
    cut_at: float | None = None
    max_side: int | None = None
    splits: dict[str, SeedScores] = field(default_factory=dict)

    @classmethod
    def of(cls, splits: dict[str, SeedScores], max_side: int, cut_at: float) -> "SeedsRecord":
        """Return the record of a stage's splits."""
        head = next(iter(splits.values()))
        return cls(miou=head.miou, threshold=head.threshold, cut_at=cut_at, max_side=max_side, splits=splits)


@dataclass(frozen=True, kw_only=True)
class StepsRecord(Record):
    """`metrics.json` of the stages pseudo_labels and predictions; `miou` is the first split's after the last step."""

    miou: float | None = None
    splits: dict[str, StepScores] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NetworkScores(Record):
    """Scores of the segmentation network on its validation split, over `scored` images.

    Attributes:
        miou: mIoU over all classes and background.
        per_class: Class -> IoU.
        scored: Images with a mask.
    """

    miou: float | None = None
    per_class: ByName = field(default_factory=dict)
    scored: int | None = None


@dataclass(frozen=True, kw_only=True)
class LabelScores(Record):
    """Scores of one label: `iou` and `accuracy` in percent, nan if absent, and its number of pixels."""

    iou: float
    accuracy: float
    target_pixels: int
    predicted_pixels: int


@dataclass(frozen=True, kw_only=True)
class MaskScores(Record):
    """Scores of a folder of masks.

    Attributes:
        miou: Mean IoU over the labels.
        mean_accuracy: Mean over the labels of the share of their pixels that were found.
        pixel_accuracy: Share of correct pixels.
        frequency_weighted_iou: Mean IoU weighted by the labels' pixels.
        images: Images that were scored.
        labels_in_mean: Labels that the means are over, background included.
        unsure_pixels: Share of the pixels that were predicted as 255.
        per_class: Label -> its scores.
        confusion: Pixel counts: one row per true label, and one more column than labels, for a predicted 255.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    frequency_weighted_iou: float
    images: int
    labels_in_mean: int
    unsure_pixels: float
    per_class: dict[str, LabelScores]
    confusion: list[list[int]]


# ---- A table of runs.


@dataclass(frozen=True, kw_only=True)
class RunScores(Record):
    """One run of an ablation.

    Attributes:
        splits: Split -> its seeds' scores.
        made_with: Code, versions and hardware of the seeds.
        trained_in: The run whose training it used, `<variant>/seed<number>`.
        seconds: Stage -> wall time.
        device: Stage -> hardware.
    """

    splits: dict[str, SeedScores]
    made_with: dict[str, str]
    trained_in: str
    seconds: dict[str, float | None]
    device: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class RowScores(Record):
    """mIoU of one row of an ablation over its seeds.

    Attributes:
        mean: Mean over the seeds.
        std: Standard deviation of the sample (n - 1); None for one seed.
        values: One for each seed, in the order of the seeds.
        difference_mean: Mean difference to the baseline of the same seeds; None where it has no such score.
        difference_std: Its standard deviation.
    """

    mean: float
    std: float | None
    values: list[float]
    difference_mean: float | None
    difference_std: float | None
