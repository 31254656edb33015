"""Configuration of the Bi-Trans model."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig, strict

from .errors import InputError
from .maps import AFFINITIES, CAM_FUSIONS, THRESHOLD
from .views import VIEWS

PATCH_POOLINGS = ("mean", "ranked")
CLASS_HEADS = ("mean", "patch_head")


@strict
class BiTransConfig(PreTrainedConfig):
    r"""Architecture of a multi-class-token vision transformer and the weights of its training loss.

    The defaults are DeiT-Small at 224 px with the paper's losses; `id2label` names the C object classes, without
    background, in class-token order. `num_seed_layers` to `threshold` say how a trained model is read: they change no
    weight, and may be given when it is loaded.

    Args:
        image_size (`int`, defaults to 224): Side in pixels of the square training images; it sets how many patch
            position embeddings are learnt. Other sizes work at inference by interpolation.
        patch_size (`int`, defaults to 16): Side of a patch in pixels.
        num_channels (`int`, defaults to 3): Channels of an image.
        hidden_size (`int`, defaults to 384): Width D of a token.
        num_hidden_layers (`int`, defaults to 12): Number of transformer layers L.
        num_attention_heads (`int`, defaults to 6): Heads of each layer; must divide `hidden_size`.
        mlp_ratio (`float`, defaults to 4.0): Width of a layer's MLP as a multiple of `hidden_size`.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of LayerNorm; DeiT weights need 1e-6.
        drop_path_rate (`float`, defaults to 0.1): Stochastic depth of the last layer while training, rising
            linearly from 0 at the first.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal initialization.
        final_layer_norm (`bool`, defaults to `False`): Normalize the encoder's output tokens as DeiT does before both
            branches read them; MCTformer loads that layer and never applies it.
        share_drop_path (`bool`, defaults to `False`): Drop the same branches in both views of an image, so that the
            consistency losses do not compare two different sub-networks.
        patch_pooling (`str`, defaults to `"mean"`): How the patch branch's map becomes one logit for each class:
            "mean" over patches (Eq. 7), or "ranked", MCTformer+'s mean weighted by 0.996^rank, highest score first.
        class_head (`str`, defaults to `"mean"`): How a class token becomes its logit: "mean" of its entries (Eq. 4),
            or "patch_head": what the patch branch's head would answer on a grid filled with the token. The head itself
            learns from the patches alone.
        num_seed_layers (`int`, defaults to 3): K, how many of the last layers give the SC-CAM (Eq. 2).
        num_affinity_layers (`int`, *optional*): How many of the last layers give the affinity (Eq. 9). None is all of
            them, as in the paper and in MCTformer; the first layers attend to what lies near or looks alike.
        affinity_source (`str`, defaults to `"attention"`): What says that two patches belong together: "attention"
            (Eq. 9), "similarity" (softmax of queries with queries and keys with keys) or "joint", the mean of both,
            the attention's rows divided by their sums.
        fusion (`str`, defaults to `"fused"`): How the two branches' maps become one: "fused", the product (Eq. 8), its
            root "fused_sqrt", "competing" (the classes of an image share its patches), or "sc_cam" or "coarse_cam".
        refine_steps (`int`, defaults to 1): How often the maps are spread along the affinity (Eq. 10).
        normalize_affinity (`bool`, defaults to `False`): Divide each row of the affinity by its sum first.
        threshold (`float`, defaults to 0.4): Background score in [0, 1] that seeds are cut at.
        view (`str`, defaults to `"hflip"`): Second view f (Eq. 1): "hflip", "vflip", "rot90", "rot180", or "none"
            for a single-view baseline.
        scc_weight (`float`, defaults to 1.0): Weight of the class-specific consistency loss (Eq. 3).
        pac_weight (`float`, defaults to 1.0): Weight alpha of the pair-wise affinity consistency loss (Eq. 11).
        patch_weight (`float`, defaults to 1.0): Weight of the patch branch's classification loss. 0 is MCTformer V1,
            which has no patch branch: its map means nothing then, and `logits` are the class tokens' alone.
        class_contrast_weight (`float`, defaults to 0.0): Weight of MCTformer+'s contrastive class-token loss.

    Raises:
        StrictDataclassClassValidationError, StrictDataclassFieldValidationError: a value is of the wrong type or out
            of range; the message says which and what is allowed.

    Example:
        >>> config = BiTransConfig(id2label={0: "cat", 1: "dog"}, hidden_size=192, num_attention_heads=3)
        >>> config.num_labels, config.label2id
        (2, {'cat': 0, 'dog': 1})
    """

    model_type = "bitrans"
    # Trainer would gather every map of every image, affinity (B, N, N) included, in predict and evaluate. It adds a
    # list to this, so it must be one.
    keys_to_ignore_at_inference = [  # noqa: RUF012 - transformers reads a plain class attribute
        "losses", "class_logits", "patch_logits", "sc_cam", "coarse_cam", "pseudo_mask", "affinity",
        "last_hidden_state", "hidden_states", "attentions",
    ]  # fmt: skip

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: float | int = 4.0
    layer_norm_eps: float | int = 1e-6
    drop_path_rate: float | int = 0.1
    initializer_range: float | int = 0.02
    final_layer_norm: bool = False
    share_drop_path: bool = False
    patch_pooling: str = "mean"
    class_head: str = "mean"
    num_seed_layers: int = 3
    num_affinity_layers: int | None = None
    affinity_source: str = "attention"
    fusion: str = "fused"
    refine_steps: int = 1
    normalize_affinity: bool = False
    threshold: float | int = THRESHOLD
    view: str = "hflip"
    scc_weight: float | int = 1.0
    pac_weight: float | int = 1.0
    patch_weight: float | int = 1.0
    class_contrast_weight: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        id2label = kwargs.get("id2label", getattr(self, "id2label", None))
        if id2label and not kwargs.get("label2id", getattr(self, "label2id", None)):
            # transformers leaves label2id None when only id2label is given.
            self.label2id = {name: int(index) for index, name in id2label.items()}
        if self.problem_type is None:
            self.problem_type = "multi_label_classification"  # the stock image-classification pipeline: sigmoid
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the sizes fit each other (called by transformers when the config is built and saved)."""
        if not self.num_labels:
            raise InputError("id2label must name at least one object class, got none.")
        for name in ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise InputError(
                f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}; "
                f"use {max(1, round(self.image_size / self.patch_size)) * self.patch_size}."
            )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads, "
                f"got {self.num_attention_heads}."
            )
        for name in ("num_seed_layers", "num_affinity_layers"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= self.num_hidden_layers:
                raise InputError(f"{name} must be in [1, num_hidden_layers = {self.num_hidden_layers}], got {value}.")
        if self.affinity_source not in AFFINITIES:
            raise InputError(f"affinity_source must be one of {', '.join(AFFINITIES)}, got {self.affinity_source!r}.")
        if self.fusion not in CAM_FUSIONS:
            raise InputError(f"fusion must be one of {', '.join(CAM_FUSIONS)}, got {self.fusion!r}.")
        if self.refine_steps < 1:
            raise InputError(f"refine_steps must be at least 1, got {self.refine_steps}.")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must be in [0, 1], got {self.threshold}.")
        if not 0 <= self.drop_path_rate < 1:
            raise InputError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if self.mlp_ratio <= 0 or self.layer_norm_eps <= 0 or self.initializer_range < 0:
            raise InputError(
                "mlp_ratio and layer_norm_eps must be above 0 and initializer_range at least 0, got "
                f"{self.mlp_ratio}, {self.layer_norm_eps} and {self.initializer_range}."
            )

    def validate_losses(self) -> None:
        """Check the view and the loss options."""
        if self.view not in VIEWS:
            raise InputError(f"view must be one of {', '.join(VIEWS)}, got {self.view!r}.")
        for name in ("scc_weight", "pac_weight", "patch_weight", "class_contrast_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if self.class_head not in CLASS_HEADS:
            raise InputError(f"class_head must be one of {', '.join(CLASS_HEADS)}, got {self.class_head!r}.")
        if self.patch_pooling not in PATCH_POOLINGS:
            raise InputError(f"patch_pooling must be one of {', '.join(PATCH_POOLINGS)}, got {self.patch_pooling!r}.")


# A saved folder carries this code, so that it opens, with trust_remote_code, where the package is not installed.
BiTransConfig.register_for_auto_class()
