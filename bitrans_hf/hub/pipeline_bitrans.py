"""The pipeline `pseudo-mask-generation`: images and their image-level labels in, one mask per class out."""

import base64
import binascii
import difflib
import io
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedConfig

from .confidence import mask_confidence, other_maps
from .errors import InputError, MissingFileError
from .image_decoding import DECODING_ERRORS, TOO_LARGE, opened, to_rgb
from .image_processing_bitrans import BiTransImageProcessor, patch_problem
from .maps import CAM_FUSIONS, fused_maps, min_max_normalized, resized, strongest_row, sum_over_scales
from .modeling_bitrans import BiTransModel
from .refiners import REFINERS, Refiner, refined_scores
from .seeds import presence, present_class_ids, reading_of
from .weight_files import check_model_folder, load_trained

if TYPE_CHECKING:
    # What the imports above import: transformers before 5.23 copies only the files that this text names.
    from .configuration_bitrans import BiTransConfig as BiTransConfig
    from .encoder import ClassTokenEncoder as ClassTokenEncoder
    from .labels import class_ids_to_multi_hot as class_ids_to_multi_hot
    from .losses import classification_loss as classification_loss
    from .par import pixel_adaptive_refinement as pixel_adaptive_refinement
    from .views import VIEWS as VIEWS

TASK = "pseudo-mask-generation"


class PipelineItem(TypedDict, total=False):
    """One image for the pipeline, and the names or ids of its classes; the model predicts them where they are None."""

    image: Any
    candidate_labels: Any


class PseudoMask(TypedDict):
    """One class of an image: see `PseudoMaskPipeline`; the mask has mode "L", 0 or 255, and the image's size."""

    label: str
    score: float
    confidence: float
    mask: Image.Image


# ---- Images from anywhere.


def open_picture(source: Any, *, upright: bool = True, timeout: float | None = None) -> Image.Image:
    """Open an image as RGB.

    Args:
        source: A PIL image of any mode, a path, an http(s) URL, a base64 text (also "data:image/...;base64,..."), the
            bytes of a file, or `{"bytes", "path"}` as `datasets` holds undecoded images.
        upright: Turn the image as its EXIF orientation says, which is how viewers show it. False keeps the pixels as
            they are stored, on which masks of VOC, COCO and of training folders are drawn.
        timeout: Seconds to wait for a URL; None waits indefinitely.

    Raises:
        ValueError: the image is missing, damaged, no image, or larger than PIL agrees to open (179 million pixels);
            the message names it.
        TypeError: `source` is none of the above.
    """
    name = name_of(source)
    if isinstance(source, Mapping):
        content = source.get("bytes")
        source = content if content is not None else source.get("path")
    if not isinstance(source, str | PathLike | bytes | Image.Image):
        raise TypeError(
            f"got {type(source).__name__} as an image, expected a PIL image, a path, a URL, base64 text or bytes; "
            "turn arrays into images with PIL.Image.fromarray."
        )
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(source, upright)
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=timeout) as answer:  # http and https, nothing else
                source = answer.read()
        elif isinstance(source, str) and not Path(source[:4096]).exists() and _looks_like_base64(source):
            source = base64.b64decode(source.partition("base64,")[2] or source, validate=True)
        if not isinstance(source, bytes) and Path(source).is_dir():
            raise IsADirectoryError("it is a folder; give its images one by one or use `bitrans masks`")
        with opened(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _as_rgb(image, upright)
    except FileNotFoundError as error:
        raise InputError(f"image {name} is not there; was it moved or deleted?") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"image {name} cannot be read: it is no image file, or a damaged one; give a PNG, JPEG or the like."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"image {name} {TOO_LARGE}.") from error
    except (*DECODING_ERRORS, urllib.error.URLError, binascii.Error) as error:
        raise InputError(f"image {name} cannot be read ({type(error).__name__}: {error}).") from error


def name_of(source: Any) -> str:
    """Return what an image is called in messages."""
    if isinstance(source, Mapping):
        return str(source.get("path") or "held in memory")
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "held in memory")
    text = str(source) if isinstance(source, str | PathLike) else "held in memory"
    return text if len(text) <= 200 else f"{text[:60]}..."


def _as_rgb(image: Image.Image, upright: bool) -> Image.Image:
    image.load()  # damage shows here
    if upright:
        image = ImageOps.exif_transpose(image)
    rgb = to_rgb(image)
    # An image that needed no change must not die with the file that it was opened from.
    return rgb.copy() if rgb is image and not upright else rgb


def _looks_like_base64(text: str) -> bool:
    return text.startswith("data:image/") or (len(text) > 64 and "." not in text)


# ---- What travels between the pipeline's steps. transformers collates tensors, and hands on what it does not know.


@dataclass(frozen=True)
class PreparedImage:
    """An image on its way into the network.

    Attributes:
        size: (H, W) of the image as it was given, and of its masks.
        pixels: (H', W', 3) uint8, the RGB image that is worked on: `size`, or less where `max_side` bounds it.
        views: One normalized (1, 3, H_s, W_s) float32 for each scale.
        class_ids: (K,) ids of the classes it is known to show; None where nothing is known.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    views: list[torch.Tensor]
    class_ids: np.ndarray | None


@dataclass(frozen=True)
class LocalizedImage:
    """What the network made of an image.

    Attributes:
        image: Without its views.
        maps: (C, h_s, w_s) for each scale, fused, refined, summed over the flip; on the CPU, any range.
        others: (V, C, h, w) of the first scale, made in other ways: see `confidence.other_maps`.
        probabilities: (C,) probability of each class' presence in [0, 1], averaged over scales and flips.
    """

    image: PreparedImage
    maps: list[torch.Tensor]
    others: torch.Tensor
    probabilities: torch.Tensor


class PseudoMaskPipeline(Pipeline):
    """Segment images by their image-level labels with a `BiTransModel` (task `pseudo-mask-generation`).

    ```python
    pipe = pipeline(model=folder_or_repo, trust_remote_code=True)
    pipe("photo.jpg", candidate_labels=["dog"])            # -> [{"label": "dog", "score": 0.98, ...}]
    pipe({"image": "photo.jpg", "candidate_labels": ["dog", "person"]}, threshold=0.5)
    pipe(["a.jpg", "b.jpg"], batch_size=8, num_workers=2)  # without labels: the classes that the model predicts
    pipe(load_folder("photos"))                            # a data set with `image` and `labels`; answers one by one
    ```

    An image is a PIL image, path, URL, base64 text or the bytes of a file, of any mode and size from one patch up to
    PIL's limit of 179 million pixels. It is turned upright by its EXIF tag, as all pipelines do, and its masks have
    the size and the orientation of the upright image. An image whose longer side exceeds `max_side` is reduced for
    the network and the refiner, so that memory is bounded, and the scores are enlarged before they are cut: masks
    always have the image's own size.

    A single image gives a list with one dictionary for each class, ascending by class id:

    - `label`: name of the class;
    - `score`: the model's probability, in [0, 1], that the image shows the class (the sigmoid of `logits`, averaged
      over scales and flips). It judges the label, not the outline;
    - `confidence`: how sure the mask is, in [0, 1]: whether maps made in other ways give the same one (see
      `hub/confidence.py`). Low values are worth a look. It judges the mask before the refiner;
    - `mask`: PIL image of mode "L", 255 where the class is and 0 elsewhere. Masks of an image do not overlap; a
      candidate label that no pixel prefers has an empty mask.

    Several images give a list of such lists; generators and data sets give an iterator. Every image passes through
    the network by itself, together with its flip, so that its masks do not depend on the batch size or on its
    neighbors.

    Options, at construction or at a call:

    - `candidate_labels`: names of the classes that are present, or a multi-hot vector (C,); of all images of the
      call that do not bring their own. None: the classes whose probability exceeds `label_threshold`.
    - `threshold`: background score in [0, 1]; higher values give smaller masks.
    - `label_threshold` (0.5): in [0, 1], used where no labels are given.
    - `scales` ((1.0,)): sizes to average over, relative to the image, for example (1.0, 0.75, 1.25).
    - `flip` (True): average over the horizontal flip too.
    - `mode`: "fused", its root "fused_sqrt", "competing"
      (the classes of the image share its patches), "sc_cam" or "coarse_cam".
    - `refine` (True): spread the maps along the patch affinity (Eq. 10).
    - `refine_steps`: how often; `normalize_affinity`: give every row of the affinity the sum 1 first.
    - `refiner` (None): what sharpens the scores on the image's colors before they are cut: None, "par"
      (pixel-adaptive refinement), "crf" (dense CRF; needs bitrans-hf[crf]) or a function (image (H, W, 3) uint8,
      scores (1 + K, H, W) in [0, 1], background first) -> scores of the same shape.
    - `max_side`: instead of the image processor's (640, which lets VOC and COCO images pass as they are).
    - `upright` (True): False answers in the orientation of the stored pixels, on which training masks are drawn.
    - `timeout` (None): seconds to wait for a URL.

    `threshold`, `mode`, `refine_steps` and `normalize_affinity` are None unless they are given: as the model's
    configuration says (there `mode` is called `fusion`), which is how its own recipe read it.

    Example:
        >>> from bitrans_hf import BiTransConfig
        >>> config = BiTransConfig(id2label={0: "cat", 1: "dog"}, image_size=32, patch_size=8, hidden_size=12,
        ...                        num_hidden_layers=3, num_attention_heads=3)
        >>> model, processor = BiTransModel(config), BiTransImageProcessor()
        >>> pipe = PseudoMaskPipeline(model=model, image_processor=processor, device="cpu")
        >>> answer = pipe(Image.new("RGB", (40, 32)), candidate_labels=["dog"])
        >>> [(entry["label"], entry["mask"].mode, entry["mask"].size) for entry in answer]
        [('dog', 'L', (40, 32))]
    """

    # transformers types these flags as None.
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]  # looking for one would ask for trust

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], device: int | str | torch.device | None = None) -> Self:
        """Load model and image processor with the classes of this package: no code of the repository runs.

        Args:
            source: A folder that training or `save_pretrained` wrote, or a repository on the Hub.
            device: Where the model goes; None: a GPU if there is one.

        Raises:
            InputError: there is no such folder or repository, it cannot be reached, it holds another kind of model,
                or a file of it is missing or damaged.
        """
        check_model_folder(source)
        try:
            model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise MissingFileError(
                f"no model at {source}: it is no folder of a trained model, nor on the Hub ({reason})"
            ) from error
        if model_type != "bitrans":
            raise InputError(
                f"{source} holds a model of the kind {model_type!r}, expected 'bitrans'; segmentation networks run in "
                'pipeline("image-segmentation").'
            )
        model = load_trained(BiTransModel, source).eval()
        try:
            processor = BiTransImageProcessor.from_pretrained(source)
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{source} lacks its image processor ({reason}); copy preprocessor_config.json from where the model "
                "was trained."
            ) from error
        return cls(
            model=model,
            image_processor=processor,
            task=TASK,
            device=device,  # type: ignore[arg-type]  # also takes text
        )

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Segment one image, a list of them, a generator or a data set; see the class for options and answers.

        Raises:
            ValueError: an image that cannot be read or is smaller than a patch (the message names it), an unknown
                class name, an option out of its range.
            TypeError: an unknown option, or something that is no image.
        """
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        # By name: this file also runs from the Hub, where datasets need not be installed.
        if type(inputs).__module__.partition(".")[0] == "datasets":
            if isinstance(inputs, Mapping):
                first = next(iter(inputs))
                raise InputError(
                    f"got the splits {', '.join(inputs)} of a data set, expected one of them, such as data[{first!r}]."
                )
            # transformers would take a datasets.Dataset for one image, and hand on its rows as they are if streamed.
            inputs = DatasetRows(inputs) if hasattr(inputs, "__len__") else _items_of_rows(inputs)
        elif isinstance(inputs, Iterator):
            inputs = (item for item in inputs)  # transformers knows generators alone, not map() and the like
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = (*PREPROCESS_OPTIONS, *FORWARD_OPTIONS, *POSTPROCESS_OPTIONS)
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}."
                raise TypeError(f"{TASK} has no option {name!r}; {hint}")
        check_options(options)
        if options.get("candidate_labels") is not None:
            self.class_ids_of(options["candidate_labels"])  # a misspelt label shows before the first image
        return (
            {name: options[name] for name in PREPROCESS_OPTIONS if name in options},
            {name: options[name] for name in FORWARD_OPTIONS if name in options},
            {name: options[name] for name in POSTPROCESS_OPTIONS if name in options},
        )

    def preprocess(  # type: ignore[override]  # the options by name, here and in the next two steps
        self,
        item: Any,
        candidate_labels: Any = None,
        scales: Sequence[float] = (1.0,),
        max_side: int | None = None,
        upright: bool = True,
        timeout: float | None = None,
    ) -> dict[str, list[PreparedImage]]:
        """Open an image, look up its labels and make its scaled views."""
        source = item
        if isinstance(item, Mapping) and "image" in item:
            source, candidate_labels = item["image"], item.get("candidate_labels", candidate_labels)
            if unknown := sorted(set(item) - {"image", "candidate_labels"}):
                raise InputError(
                    f"got an image with {', '.join(map(repr, unknown))}, expected 'image' and 'candidate_labels' "
                    "(names of classes); rows of a data set are read as such when the whole data set is given."
                )
        class_ids = None if candidate_labels is None else self.class_ids_of(candidate_labels)
        image = open_picture(source, upright=upright, timeout=timeout)
        size = (image.height, image.width)
        processor = cast("BiTransImageProcessor", self.image_processor)
        image = processor.bounded(image, max_side=max_side)
        problem = patch_problem(size, (image.height, image.width), scales, self.model.config.patch_size)
        if problem:
            raise InputError(f"image {name_of(source)} is {problem}")
        views = processor.scaled_views(image, scales)
        # In a list, or the loader would look for tensors to pad.
        return {"images": [PreparedImage(size, np.asarray(image), views, class_ids)]}

    def _forward(  # type: ignore[override]
        self,
        inputs: Mapping[str, Any],
        flip: bool = True,
        mode: str | None = None,
        refine: bool = True,
        refine_steps: int | None = None,
        normalize_affinity: bool | None = None,
    ) -> dict[str, list[LocalizedImage]]:
        config = cast("BiTransConfig", self.model.config)
        mode, reading = reading_of(config, mode, refine_steps, normalize_affinity)
        localized = []
        for entry in inputs["images"]:  # a batch of several comes as a list of lists of one
            picture = entry[0] if isinstance(entry, list) else entry
            present = None if picture.class_ids is None else presence(picture.class_ids, config)
            options: dict[str, Any] = {"mode": mode, "flip": flip, "present": present, **reading}
            maps, probabilities = [], []
            others: torch.Tensor | None = None
            for view in picture.views:
                pixel_values = view.to(device=self.model.device, dtype=self.model.dtype)
                output = self.model(torch.cat([pixel_values, pixel_values.flip(-1)]) if flip else pixel_values)
                maps.append(fused_maps(output, refine=refine, **options)[0].float().cpu())
                if others is None:
                    others = other_maps(output, **options)[:, 0].float().cpu()
                probabilities.append(output.logits.float().sigmoid().mean(dim=0).cpu())
            kept = PreparedImage(picture.size, picture.pixels, [], picture.class_ids)
            assert others is not None  # there is at least one scale
            localized.append(LocalizedImage(kept, maps, others, torch.stack(probabilities).mean(dim=0)))
        return {"images": localized}

    def postprocess(  # type: ignore[override]
        self,
        outputs: Mapping[str, Any],
        threshold: float | None = None,
        label_threshold: float = 0.5,
        refiner: str | Refiner | None = None,
    ) -> list[PseudoMask]:
        """Cut one image's maps into masks."""
        entry = outputs["images"]
        localized: LocalizedImage = entry[0] if isinstance(entry, list) else entry
        picture, probabilities = localized.image, localized.probabilities
        class_ids = picture.class_ids
        if class_ids is None:
            class_ids = (probabilities > label_threshold).nonzero().flatten().numpy()
        if len(class_ids) == 0:
            return []
        working_size = picture.pixels.shape[:2]
        present = torch.from_numpy(class_ids)
        total = sum_over_scales(({"": maps[present]} for maps in localized.maps), working_size)[""]
        if threshold is None:
            threshold = cast("BiTransConfig", self.model.config).threshold
        background = torch.full((1, *working_size), threshold, dtype=torch.float32)
        seeds = min_max_normalized(total)
        confidence = mask_confidence(seeds, localized.others[:, present], threshold)
        scores = torch.cat([background, seeds])
        if refiner is not None:
            scores = refined_scores(refiner, picture.pixels, scores)
        label_ids = [0, *(int(class_id) + 1 for class_id in class_ids)]
        label_map = strongest_row(label_ids, (resized(row, picture.size) for row in scores)).numpy()
        id2label = cast("Mapping[int, str]", self.model.config.id2label)
        return [
            {
                "label": id2label[int(class_id)],
                "score": float(probabilities[class_id]),
                "confidence": float(sure),
                "mask": Image.fromarray(np.where(label_map == class_id + 1, 255, 0).astype(np.uint8)),
            }
            for class_id, sure in zip(class_ids, confidence, strict=True)
        ]

    def class_ids_of(self, candidate_labels: Any) -> np.ndarray:
        """Turn an image's labels (names or a multi-hot vector) into ascending class ids (K,) int64.

        Raises:
            ValueError: an unknown class name, a wrong number of values, or labels of several images.
        """
        if isinstance(candidate_labels, str):
            candidate_labels = [candidate_labels]
        labels = list(candidate_labels)
        if any(isinstance(label, list | tuple | set) for label in labels):
            raise InputError(
                f"candidate_labels must be the class names of one image, got {candidate_labels!r}; give images "
                'with different labels as [{"image": ..., "candidate_labels": [...]}, ...].'
            )
        return present_class_ids(labels, cast("Mapping[int, str]", self.model.config.id2label))


PREPROCESS_OPTIONS = ("candidate_labels", "scales", "max_side", "upright", "timeout")
FORWARD_OPTIONS = ("flip", "mode", "refine", "refine_steps", "normalize_affinity")
POSTPROCESS_OPTIONS = ("threshold", "label_threshold", "refiner")
READING_OPTIONS = ("threshold", "mode", "refine_steps", "normalize_affinity")
"""Options that may be None: as the model's configuration says."""


def check_options(options: Mapping[str, Any]) -> None:
    """Check the pipeline's options before the first image is opened.

    Raises:
        ValueError: an option is out of its range; the message says which and what is allowed.
    """
    options = {name: value for name, value in options.items() if value is not None or name not in READING_OPTIONS}
    for name in ("threshold", "label_threshold"):
        if name in options and not 0 <= options[name] <= 1:
            raise InputError(f"{name} must be in [0, 1], got {options[name]}.")
    if "scales" in options and (len(options["scales"]) == 0 or min(options["scales"]) <= 0):
        raise InputError(f"scales must be one or more factors above 0, such as (1.0, 0.75), got {options['scales']}.")
    if options.get("refine_steps", 1) < 1:
        raise InputError(f"refine_steps must be at least 1, got {options['refine_steps']}.")
    if options.get("max_side") is not None and options["max_side"] < 1:
        raise InputError(f"max_side must be at least 1 pixel, got {options['max_side']}.")
    if "mode" in options and options["mode"] not in CAM_FUSIONS:
        raise InputError(f"mode must be one of {', '.join(CAM_FUSIONS)}, got {options['mode']!r}.")
    refiner = options.get("refiner")
    if refiner is not None and not callable(refiner) and refiner not in REFINERS:
        raise InputError(f"refiner must be None, {', '.join(map(repr, REFINERS))} or a function, got {refiner!r}.")


# ---- Data sets.


class DatasetRows(Dataset[PipelineItem]):
    """The rows of a `datasets.Dataset` as the pipeline reads them: images with the names of their classes.

    Args:
        rows: With a column `image`, and labels in a column `candidate_labels`, `labels` or `label`: class names or ids
            of a `ClassLabel`, in lists or one for each row, as imagefolder gives them. Without such a column the model
            predicts the classes.

    Raises:
        ValueError: there is no column `image`, or ids have no names.
    """

    def __init__(self, rows: Any):
        self.rows = rows
        self.label_column, self.names = _label_column(rows.features)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PipelineItem:
        return _item_of_row(self.rows[index], self.label_column, self.names)


def _items_of_rows(rows: Any) -> Iterator[PipelineItem]:
    """The same for a streamed data set, which has no length."""
    if rows.features is None:
        raise InputError("the streamed data set does not say its columns; cast it to features with an image column.")
    label_column, names = _label_column(rows.features)
    return (_item_of_row(row, label_column, names) for row in rows)


def _label_column(features: Mapping[str, Any]) -> tuple[str | None, Sequence[str] | None]:
    if "image" not in features:
        raise InputError(f"the data set has the columns {', '.join(features)}, expected one called image; rename it.")
    for column in ("candidate_labels", "labels", "label"):
        if column in features:
            inner = getattr(features[column], "feature", features[column])
            names = getattr(inner, "names", None)
            if names is None and getattr(inner, "dtype", None) not in ("string", "large_string"):
                raise InputError(
                    f"the column {column!r} is {features[column]!r}, expected class names or ids of a ClassLabel, in "
                    "lists or one for each row; cast it or take it out."
                )
            return column, names
    return None, None


def _item_of_row(row: Mapping[str, Any], label_column: str | None, names: Sequence[str] | None) -> PipelineItem:
    if label_column is None:
        return {"image": row["image"]}
    labels = row[label_column]
    if isinstance(labels, int | str):
        labels = None if labels == -1 else [labels]  # -1 is how datasets say that a label is not known
    if labels is not None and names is not None:
        labels = [names[class_id] for class_id in labels]
    return {"image": row["image"], "candidate_labels": labels}


__all__ = ["PseudoMaskPipeline"]
