"""Configuration of AffinityNet."""

from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig, strict

from .errors import InputError


@dataclass(frozen=True)
class Relation:
    """What a published system does with one way of relating neighboring cells.

    Attributes:
        radius: Pairs closer than this, in cells, are trained on.
        walk_radius: Pairs closer than this make the matrix of the random walk.
        num_maps: Feature maps of the backbone that are read.
        beta: Element-wise power of the affinities before the walk.
        num_doublings: log2 of the steps of the walk.
        label_thresholds: Constant background scores of the two label maps that have to agree: what is an object at
            the first is sure, what is background at the second too. None where powers of (1 - max) take their place.
        label_alphas: Those powers, low and high; None where thresholds take their place.
    """

    radius: int
    walk_radius: int
    num_maps: int
    beta: float
    num_doublings: int
    label_thresholds: tuple[float, float] | None = None
    label_alphas: tuple[float, float] | None = None


RELATIONS: dict[str, Relation] = {
    # Ahn & Kwak, CVPR 2018 (arXiv:1803.10464), with the walk and the alphas of MCTformer.
    "psa": Relation(radius=5, walk_radius=5, num_maps=3, beta=8.0, num_doublings=6, label_alphas=(1.0, 12.0)),
    # Ahn, Cho & Kwak, CVPR 2019 (arXiv:1904.05044).
    "irn": Relation(radius=10, walk_radius=5, num_maps=5, beta=10.0, num_doublings=8, label_thresholds=(0.3, 0.05)),
}


@strict
class AffinityNetConfig(PreTrainedConfig):
    r"""Backbone and relation of a network that tells which neighboring cells of an image belong together.

    The defaults are PSA's network on ResNet38.

    Args:
        backbone (`str`, defaults to `"resnet38"`): "resnet38", "bitrans" for the encoder of a `BiTransModel`, or the
            name of a timm network with feature maps.
        backbone_config (`dict`, *optional*): Options of the backbone: `width_multiplier` of resnet38, the
            `BiTransConfig` of bitrans, arguments of `timm.create_model`.
        relation (`str`, defaults to `"psa"`): "psa" compares the features of two cells; "irn" asks whether a class
            boundary lies between them.
        radius (`int`, *optional*): Pairs of cells closer than this are trained on; 5 for psa, 10 for irn.
        walk_radius (`int`, *optional*): Pairs closer than this make the matrix of the random walk; 5.
        out_indices (`list`, *optional*): Which feature maps of the backbone are read. By default psa reads three
            and irn five: the last ones of a network with several strides, evenly spread layers of a transformer.
        output_stride (`int`, *optional*): Pixels per cell of the deepest map, where the backbone leaves a choice.
        num_frozen_stages (`int`, *optional*): Stages of the backbone, from the pixels on, that are not trained; -1
            for all. By default psa freezes 2 of resnet38 (up to b2_2) and none of others, and irn all.
        freeze_batch_norm (`bool`, defaults to `True`): Keep the backbone's BatchNorm as it was loaded.
        stride (`int`, *optional*): Pixels per cell of the grid of the affinities; the model fills it in.

    Raises:
        StrictDataclassClassValidationError, StrictDataclassFieldValidationError: a value is of the wrong type or out
            of range; the message says which and what is allowed.

    Example:
        >>> config = AffinityNetConfig(relation="irn", backbone="resnet50")
        >>> config.radius, config.walk_radius, config.num_frozen_stages
        (10, 5, -1)
    """

    model_type = "affinitynet"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers reads a plain class attribute
        "losses", "features", "boundary",
    ]  # fmt: skip

    backbone: str = "resnet38"
    backbone_config: dict[str, Any] | None = None
    relation: str = "psa"
    radius: int | None = None
    walk_radius: int | None = None
    out_indices: list[int] | tuple[int, ...] | None = None
    output_stride: int | None = None
    num_frozen_stages: int | None = None
    freeze_batch_norm: bool = True
    stride: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        relation = RELATIONS.get(self.relation)
        if relation is not None:  # else `validate_relation` says what is allowed
            self.radius = relation.radius if self.radius is None else self.radius
            self.walk_radius = relation.walk_radius if self.walk_radius is None else self.walk_radius
        if self.num_frozen_stages is None:
            self.num_frozen_stages = -1 if self.relation == "irn" else 2 if self.backbone == "resnet38" else 0
        id2label = kwargs.get("id2label", getattr(self, "id2label", None))
        if id2label and not kwargs.get("label2id", getattr(self, "label2id", None)):
            # transformers leaves label2id None when only id2label is given.
            self.label2id = {name: int(index) for index, name in id2label.items()}
        super().__post_init__(**kwargs)

    def validate_relation(self) -> None:
        """Check the relation and its radii (called by transformers when the config is built and saved)."""
        if self.relation not in RELATIONS:
            raise InputError(f"relation must be one of {', '.join(RELATIONS)}, got {self.relation!r}.")
        for name in ("radius", "walk_radius"):
            value = getattr(self, name)
            if value is None or value < 2:
                raise InputError(f"{name} must be at least 2 cells, got {value}; 1 relates a cell to itself alone.")

    def validate_backbone(self) -> None:
        """Check what can be checked without building the backbone."""
        if not self.backbone:
            raise InputError("backbone must be resnet38, bitrans or a timm network, got an empty name.")
        if self.num_frozen_stages is not None and self.num_frozen_stages < -1:
            raise InputError(f"num_frozen_stages must be -1 (all) or at least 0, got {self.num_frozen_stages}.")


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
AffinityNetConfig.register_for_auto_class()
