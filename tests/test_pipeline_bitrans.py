from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_models import picture, tiny_model
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from bitrans_hf import BiTransImageProcessor, DeepLabForSemanticSegmentation, PseudoMaskPipeline, extract_seeds
from bitrans_hf.data import load_voc, make_shapes
from bitrans_hf.hub.image_decoding import to_rgb
from bitrans_hf.hub.par import pixel_adaptive_refinement
from bitrans_hf.hub.pipeline_bitrans import open_picture
from bitrans_hf.refine.crf import dense_crf
from bitrans_hf.refine.pseudo_labels import seeds_to_label_map

CLASSES = ["cat", "dog", "horse"]


@functools.cache
def pipe() -> PseudoMaskPipeline:
    return pipeline(
        "pseudo-mask-generation", model=tiny_model(), image_processor=BiTransImageProcessor(), device="cpu"
    )


def label_map(masks: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """(H, W) of one image's answer: 0 background, class id + 1."""
    combined = np.zeros(size, dtype=np.uint8)
    for entry in masks:
        combined[np.asarray(entry["mask"]) == 255] = CLASSES.index(entry["label"]) + 1
    return combined


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Labels, scores and every pixel of the masks are equal."""
    assert [(entry["label"], entry["score"]) for entry in ours] == [
        (entry["label"], entry["score"]) for entry in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))


# ---- What it answers.


@pytest.mark.parametrize("size", [(32, 44), (37, 29)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": False, "refine": False, "threshold": 0.2},
        {"scales": (1.0, 0.75, 1.25), "threshold": 0.6},
        {"mode": "sc_cam"},
        {"refine_steps": 2, "normalize_affinity": True, "threshold": 0.6},
        {"mode": "coarse_cam", "refine": False},
    ],
)
def test_masks_are_the_cut_seeds(size: tuple[int, int], options: dict[str, Any]):
    image = picture(*size)
    masks = pipe()(image, candidate_labels=["horse", "cat"], **options)
    threshold = options.pop("threshold", 0.4)
    seeds = extract_seeds(tiny_model(), image, ["cat", "horse"], processor=BiTransImageProcessor(), **options)
    differing = label_map(masks, size) != seeds_to_label_map(seeds, threshold)
    assert differing.mean() < 0.002  # the maps of image and flip are summed in another order
    assert 0.05 < (label_map(masks, size) > 0).mean() < 0.95


def test_what_is_not_given_is_as_the_models_configuration_says():
    reading = {"fusion": "competing", "refine_steps": 3, "normalize_affinity": True}
    image = picture(32, 44)
    given = {"mode": "competing", "refine_steps": 3, "normalize_affinity": True}
    told = pipe()(image, candidate_labels=["horse", "cat"], threshold=0.55, **given)
    model = tiny_model(**reading, threshold=0.55)
    its_own = PseudoMaskPipeline(model=model, image_processor=BiTransImageProcessor(), device="cpu")
    assert_same(its_own(image, candidate_labels=["horse", "cat"]), told)
    assert_same(its_own(image, candidate_labels=["horse", "cat"], threshold=None, mode=None), told)
    plain = pipe()(image, candidate_labels=["horse", "cat"])
    assert (label_map(plain, (32, 44)) != label_map(told, (32, 44))).mean() > 0.05
    seeds, by_model = (
        extract_seeds(each, image, ["cat", "horse"], processor=BiTransImageProcessor(), **options).maps
        for each, options in ((tiny_model(), given), (model, {}))
    )
    np.testing.assert_array_equal(seeds, by_model)


def test_an_answer_has_label_score_and_a_mask_of_0_and_255_at_the_pictures_size():
    masks = pipe()(picture(40, 56), candidate_labels=["dog", "cat"])
    assert [set(entry) for entry in masks] == [{"label", "score", "confidence", "mask"}] * 2
    assert [entry["label"] for entry in masks] == ["cat", "dog"]
    for entry in masks:
        assert (entry["mask"].mode, entry["mask"].size) == ("L", (56, 40))
        assert set(np.unique(np.asarray(entry["mask"]))) == {0, 255}
    assert not np.logical_and(*(np.asarray(entry["mask"]) for entry in masks)).any()


@pytest.mark.parametrize("flip", [True, False])
def test_the_confidence_is_the_agreement_with_masks_made_in_other_ways(flip: bool):
    image, names = picture(40, 48), ["cat", "dog"]
    options: dict[str, Any] = {"candidate_labels": names, "flip": flip}
    masks = pipe()(image, **options)
    ways = [
        pipe()(image, **options, mode="sc_cam"),
        pipe()(image, **options, refine_steps=2),
        pipe()(image, **options, threshold=0.3),
        pipe()(image, **options, threshold=0.5),
    ]
    if flip:
        ways.append(pipe()(image, candidate_labels=names, flip=False))
        mirrored = pipe()(ImageOps.mirror(image), candidate_labels=names, flip=False)
        ways.append([{**entry, "mask": ImageOps.mirror(entry["mask"])} for entry in mirrored])
    for position, entry in enumerate(masks):
        own, ious = np.asarray(entry["mask"]) > 0, []
        for way in ways:
            other = np.asarray(way[position]["mask"]) > 0
            ious.append((own & other).sum() / (own | other).sum())
        assert entry["confidence"] == pytest.approx(np.prod(ious) ** (1 / len(ious)), abs=0.01)
        assert 0.05 < entry["confidence"] < 0.99
    assert masks[0]["confidence"] != masks[1]["confidence"]


def test_an_empty_mask_has_no_confidence():
    masks = pipe()(picture(40, 48), candidate_labels=["dog", "cat"], threshold=1.0)
    assert [entry["confidence"] for entry in masks] == [0.0, 0.0]


def test_the_score_is_the_probability_of_the_class_over_scales_and_flips():
    image, model, probabilities = picture(40, 48), tiny_model(), []
    for view in BiTransImageProcessor().scaled_views(image, (1.0, 0.5)):
        for turned in (view, view.flip(-1)):
            with torch.no_grad():
                probabilities.append(model(turned).logits.sigmoid()[0, 1].item())
    (dog,) = pipe()(image, candidate_labels=["dog"], scales=(1.0, 0.5))
    assert dog["score"] == pytest.approx(np.mean(probabilities), abs=1e-6)
    assert min(probabilities) < dog["score"] < max(probabilities)


def test_without_labels_the_predicted_classes_are_used():
    image = picture(40, 48)
    scores = {entry["label"]: entry["score"] for entry in pipe()(image, candidate_labels=CLASSES)}
    middle = sorted(scores.values())[1]
    predicted = pipe()(image, label_threshold=middle - 1e-3)
    assert {entry["label"] for entry in predicted} == {name for name, score in scores.items() if score >= middle}
    assert_same(predicted, pipe()(image, candidate_labels=[entry["label"] for entry in predicted]))
    assert pipe()(image, label_threshold=1.0) == []


def test_a_picture_that_is_known_to_show_nothing_has_no_masks():
    assert pipe()(picture(40, 48), candidate_labels=[]) == []
    assert pipe()({"image": picture(40, 48), "candidate_labels": []}, label_threshold=0.0) == []


@pytest.mark.parametrize("labels", ["dog", ["dog"], ("dog", "dog"), [0, 1, 0], np.array([0.0, 1.0, 0.0])])
def test_labels_may_be_a_name_names_or_a_multi_hot_vector(labels: Any):
    assert_same(pipe()(picture(40, 48), candidate_labels=labels), pipe()(picture(40, 48), candidate_labels=["dog"]))


def test_a_class_that_no_pixel_prefers_has_an_empty_mask():
    masks = pipe()(picture(40, 48), candidate_labels=["dog", "cat"], threshold=1.0)
    assert [np.asarray(entry["mask"]).max() for entry in masks] == [0, 0]


def test_options_may_be_given_once_for_all():
    image = picture(40, 48)
    own = pipeline(
        "pseudo-mask-generation",
        model=tiny_model(),
        image_processor=BiTransImageProcessor(),
        device="cpu",
        threshold=0.7,
        scales=(1.0, 1.5),
    )
    assert_same(own(image), pipe()(image, threshold=0.7, scales=(1.0, 1.5)))
    assert_same(own(image, threshold=0.2), pipe()(image, threshold=0.2, scales=(1.0, 1.5)))


# ---- Many images.


def mixed_pictures() -> list[dict[str, Any]]:
    """Seven images of four sizes and different labels, one of which leaves them to the model."""
    sizes = [(32, 44), (40, 24), (32, 44), (24, 24), (32, 44), (40, 24), (33, 47)]
    labels = [["cat"], ["dog", "horse"], None, [], ["horse"], ["cat", "dog"], ["dog"]]
    return [
        {"image": picture(*size, seed=index), "candidate_labels": names}
        for index, (size, names) in enumerate(zip(sizes, labels, strict=True))
    ]


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 0), (3, 2), (8, 0)])
def test_batches_and_workers_do_not_change_the_answers(batch_size: int, num_workers: int):
    items = mixed_pictures()
    together = pipe()(items, batch_size=batch_size, num_workers=num_workers, scales=(1.0, 0.75))
    assert len(together) == len(items)
    for item, masks in zip(items, together, strict=True):
        assert_same(masks, pipe()(item, scales=(1.0, 0.75)))


def test_ten_real_pictures_have_the_same_masks_in_batches_of_1_3_8_and_with_workers(shared_data: Path):
    photos = load_voc(shared_data / "voc12_animals", "val").select(range(10))
    model = tiny_model(id2label=dict(enumerate(photos.features["labels"].feature.names)))
    pipe = PseudoMaskPipeline(
        model=model, image_processor=BiTransImageProcessor(), task="pseudo-mask-generation", device="cpu", max_side=160
    )
    alone = [pipe(item) for item in items_of(photos)]
    assert all(masks for masks in alone)
    for batch_size, num_workers in ((1, 0), (3, 0), (8, 0), (3, 2)):
        answers = list(pipe(photos, batch_size=batch_size, num_workers=num_workers))
        assert len(answers) == 10
        for ours, theirs in zip(answers, alone, strict=True):
            assert_same(ours, theirs)


def items_of(rows: datasets.Dataset) -> list[dict[str, Any]]:
    names = rows.features["labels"].feature.names
    return [{"image": row["image"], "candidate_labels": [names[c] for c in row["labels"]]} for row in rows]


def dataset_of(names: list[str]) -> datasets.Dataset:
    """Three images as files in memory, with labels of a ClassLabel whose order is not the model's."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "labels": datasets.Sequence(datasets.ClassLabel(names=names)),
            "image_id": datasets.Value("string"),
        }
    )
    rows = {
        "image": [picture(32, 40, seed=seed) for seed in range(3)],
        "labels": [[0], [1, 2], []],
        "image_id": ["a", "b", "c"],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_data_set_is_read_row_by_row_with_its_labels():
    rows = dataset_of(["horse", "cat", "dog"])
    expected = [["horse"], ["cat", "dog"], []]
    answers = pipe()(rows)
    assert not isinstance(answers, list)
    for seed, masks in enumerate(answers):
        assert_same(masks, pipe()(picture(32, 40, seed=seed), candidate_labels=expected[seed]))
    streamed = list(pipe()(rows.to_iterable_dataset(), batch_size=2))
    for ours, theirs in zip(streamed, pipe()(rows), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("feature", [datasets.ClassLabel(names=["horse", "cat"]), datasets.Value("string")])
def test_one_label_for_each_row_is_read_as_imagefolder_gives_it(feature: Any):
    labels = [1, 0, -1] if isinstance(feature, datasets.ClassLabel) else ["cat", "horse", None]
    rows = datasets.Dataset.from_dict(
        {"image": [picture(32, 40, seed=seed) for seed in range(3)], "label": labels},
        features=datasets.Features({"image": datasets.Image(), "label": feature}),
    )
    *labelled, unknown = pipe()(rows)
    assert [[entry["label"] for entry in masks] for masks in labelled] == [["cat"], ["horse"]]
    assert_same(unknown, pipe()(picture(32, 40, seed=2)))


def test_the_loaders_rows_and_a_key_dataset_work_too():
    shapes = make_shapes(3, seed=0)
    names = shapes.features["labels"].feature.names
    model = tiny_model(id2label=dict(enumerate(names)))
    own = PseudoMaskPipeline(model=model, image_processor=BiTransImageProcessor(), task="", device="cpu")
    for row, masks in zip(shapes, own(shapes), strict=True):
        assert [entry["label"] for entry in masks] == [names[class_id] for class_id in row["labels"]]
    rows = dataset_of(CLASSES)
    for seed, masks in enumerate(pipe()(KeyDataset(rows, "image"))):
        assert_same(masks, pipe()(picture(32, 40, seed=seed)))


def test_generators_iterators_and_tuples_are_read_one_after_the_other():
    items = mixed_pictures()[:3]
    expected = pipe()(items)
    for several in ((item for item in items), map(dict, items), tuple(items)):
        for ours, theirs in zip(pipe()(several, batch_size=2), expected, strict=True):
            assert_same(ours, theirs)
    assert pipe()([]) == []


# ---- Images of every kind.


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Address of a server on this machine that serves `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *args: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_paths_urls_bytes_and_base64_are_the_same_picture(tmp_path: Path, web: str):
    image = picture(40, 48)
    image.save(tmp_path / "photo.png")
    content = (tmp_path / "photo.png").read_bytes()
    text = base64.b64encode(content).decode()
    sources = [
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        f"{web}/photo.png",
        content,
        text,
        f"data:image/png;base64,{text}",
        {"bytes": content, "path": "photo.png"},
        {"bytes": None, "path": str(tmp_path / "photo.png")},
    ]
    expected = pipe()(image, candidate_labels=["cat"])
    for source in sources:
        assert_same(pipe()({"image": source, "candidate_labels": ["cat"]}), expected)
    assert_same(pipe()(tmp_path / "photo.png", candidate_labels=["cat"]), expected)


def sixteen_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("suffix", "convert"),
    [
        ("png", lambda image: image.convert("L")),
        ("png", lambda image: image.convert("RGBA")),
        ("png", lambda image: image.quantize(8)),
        ("jpg", lambda image: image.convert("CMYK")),
        ("tif", lambda image: image.convert("CMYK")),
        ("png", sixteen_bit),
        ("tif", sixteen_bit),
        ("png", lambda image: image.convert("1")),
        ("gif", lambda image: image.quantize(16)),
        ("webp", lambda image: image),
        ("bmp", lambda image: image),
    ],
)
def test_pictures_of_any_mode_and_format_are_segmented(
    tmp_path: Path, suffix: str, convert: Callable[[Image.Image], Image.Image]
):
    path = tmp_path / f"photo.{suffix}"
    convert(picture(40, 48)).save(path)
    with Image.open(path) as stored:
        rgb = to_rgb(stored).copy()
    assert_same(pipe()(str(path), candidate_labels=["dog"]), pipe()(rgb, candidate_labels=["dog"]))
    assert np.asarray(rgb).std() > 20


def turned_jpeg(path: Path, orientation: int = 6) -> Image.Image:
    """Save an image with an EXIF tag that says to turn it; return the image as a viewer shows it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 64).save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        return Image.fromarray(np.rot90(np.asarray(stored), -1))


def test_masks_stand_as_the_picture_is_shown(tmp_path: Path):
    upright = turned_jpeg(tmp_path / "turned.jpg")
    assert upright.size == (40, 64)
    expected = pipe()(upright, candidate_labels=["cat"])
    assert_same(pipe()(str(tmp_path / "turned.jpg"), candidate_labels=["cat"]), expected)
    with Image.open(tmp_path / "turned.jpg") as stored:
        assert_same(pipe()(stored, candidate_labels=["cat"]), expected)


def test_masks_stand_as_the_pixels_are_stored_if_asked_for(tmp_path: Path):
    upright = turned_jpeg(tmp_path / "turned.jpg")
    stored = Image.fromarray(np.rot90(np.asarray(upright), 1))
    masks = pipe()(str(tmp_path / "turned.jpg"), candidate_labels=["cat"], upright=False)
    assert masks[0]["mask"].size == (64, 40)
    assert_same(masks, pipe()(stored, candidate_labels=["cat"]))


def test_a_large_picture_is_worked_on_small_and_answered_at_its_own_size():
    image = picture(60, 90)
    small = image.resize((48, 32), Image.Resampling.BICUBIC)
    (ours,) = pipe()(image, candidate_labels=["dog"], max_side=48)
    assert ours["mask"].size == (90, 60)
    seeds = extract_seeds(tiny_model(), small, ["dog"], processor=BiTransImageProcessor())
    enlarged = torch.nn.functional.interpolate(torch.from_numpy(seeds.maps)[None], size=(60, 90), mode="bilinear")
    expected = (enlarged[0, 0] > 0.4).numpy()
    assert ((np.asarray(ours["mask"]) == 255) != expected).mean() < 0.002
    own = PseudoMaskPipeline(
        model=tiny_model(), image_processor=BiTransImageProcessor(max_side=48), task="", device="cpu"
    )
    assert_same(own(image, candidate_labels=["dog"]), [ours])


def test_a_picture_of_48_million_pixels_is_answered_at_its_size(tmp_path: Path):
    Image.new("L", (8000, 6000), 90).save(tmp_path / "large.png", compress_level=1)
    (mask,) = pipe()(str(tmp_path / "large.png"), candidate_labels=["cat"], max_side=160)
    assert mask["mask"].size == (8000, 6000)


# ---- Refiners.


def test_a_refiner_sees_the_picture_and_the_scores_and_its_answer_is_cut():
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def left_half_is_dog(image: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append((image, scores))
        refined = np.zeros_like(scores)
        refined[0] = 0.5
        refined[2, :, : scores.shape[2] // 2] = 0.9
        return refined

    cat, dog = pipe()(picture(40, 48), candidate_labels=["cat", "dog"], threshold=0.3, refiner=left_half_is_dog)
    ((image, scores),) = seen
    np.testing.assert_array_equal(image, np.asarray(picture(40, 48)))
    assert scores.shape == (3, 40, 48)
    np.testing.assert_array_equal(scores[0], np.float32(0.3))
    np.testing.assert_array_equal(scores[1:].min((1, 2)), 0.0)
    np.testing.assert_array_equal(scores[1:].max((1, 2)), 1.0)
    assert np.asarray(cat["mask"]).max() == 0
    np.testing.assert_array_equal(np.asarray(dog["mask"]) == 255, np.arange(48)[None] < np.full((40, 1), 24))


def test_a_refiner_works_on_the_reduced_picture():
    sizes = []

    def note(image: np.ndarray, scores: np.ndarray) -> np.ndarray:
        sizes.append((image.shape, scores.shape))
        return scores

    (mask,) = pipe()(picture(60, 90), candidate_labels=["dog"], max_side=45, refiner=note)
    assert sizes == [((30, 45, 3), (2, 30, 45))]
    assert mask["mask"].size == (90, 60)


def test_par_gives_what_the_function_of_that_name_gives():
    image, before, after = picture(40, 48), [], []

    def note(pixels: np.ndarray, scores: np.ndarray) -> np.ndarray:
        before.append(scores)
        tensors = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], torch.from_numpy(scores)[None]
        after.append(pixel_adaptive_refinement(*tensors)[0].numpy())
        return after[0]

    ours = pipe()(image, candidate_labels=["dog", "horse"], refiner="par")
    theirs = pipe()(image, candidate_labels=["dog", "horse"], refiner=note)
    assert np.abs(before[0] - after[0]).max() > 0.1
    differing = label_map(ours, (40, 48)) != label_map(theirs, (40, 48))
    assert differing.mean() < 0.002  # bytes or fractions of one: rounded differently


def test_crf_gives_what_the_function_of_that_name_gives():
    pytest.importorskip("pydensecrf", reason="the extra crf is not installed")
    image = picture(40, 48)
    ours = pipe()(image, candidate_labels=["dog", "horse"], refiner="crf")
    assert_same(ours, pipe()(image, candidate_labels=["dog", "horse"], refiner=dense_crf))
    plain = pipe()(image, candidate_labels=["dog", "horse"])
    assert (label_map(ours, (40, 48)) != label_map(plain, (40, 48))).mean() > 0.01


def test_a_refiner_must_keep_the_shape():
    with pytest.raises(ValueError, match=r"the refiner returned scores of shape \(40, 48\), expected \(2, 40, 48\)"):
        pipe()(picture(40, 48), candidate_labels=["dog"], refiner=lambda image, scores: scores[0])


def test_the_crf_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitrans_hf.refine.crf", None)
    with pytest.raises(ImportError, match=r'needs the installed package.*pip install "bitrans-hf\[crf\]"'):
        pipe()(picture(40, 48), candidate_labels=["dog"], refiner="crf")


# ---- What is refused.


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"inputs": Image.new("RGB", (1, 1))}, ValueError, r"smaller than a patch: 1 x 1 pixels.*at least 8 x 8"),
        (
            {"inputs": Image.new("RGB", (8000, 8)), "max_side": 90},
            ValueError,
            "8 x 8000 pixels .*worked on at 3 x 2846.*raise max_side",
        ),
        ({"inputs": Image.new("RGB", (20, 20)), "scales": (1.0, 0.3)}, ValueError, "at scale 0.3"),
        ({"inputs": "nowhere.jpg"}, ValueError, "image nowhere.jpg is not there"),
        ({"inputs": "/"}, ValueError, "it is a folder; give its images one by one or use `bitrans masks`"),
        (
            {"inputs": b"no image"},
            ValueError,
            "held in memory cannot be read: it is no image file, or a damaged one",
        ),
        ({"inputs": np.zeros((8, 8, 3))}, TypeError, "got ndarray as an image.*Image.fromarray"),
        ({"candidate_labels": ["dgo"]}, ValueError, "unknown class name 'dgo'; the model knows cat, dog, horse"),
        ({"candidate_labels": [["dog"], ["cat"]]}, ValueError, "labels of one image|class names of one image"),
        ({"candidate_labels": [1, 0]}, ValueError, "expected one 0/1 label for each of 3 classes"),
        ({"inputs": {"image": picture(20, 20), "labels": [1]}}, ValueError, "'labels', expected 'image' and 'cand"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        ({"label_threshold": -1}, ValueError, r"label_threshold must be in \[0, 1\], got -1"),
        ({"scales": ()}, ValueError, "scales must be one or more factors above 0"),
        ({"scales": (1.0, 0.0)}, ValueError, "scales must be one or more factors above 0"),
        (
            {"mode": "cam"},
            ValueError,
            "mode must be one of fused, fused_sqrt, competing, sc_cam, coarse_cam, got 'cam'",
        ),
        ({"refiner": "srf"}, ValueError, "refiner must be None, .*'crf' or a function, got 'srf'"),
        ({"refine_steps": 0}, ValueError, "refine_steps must be at least 1, got 0"),
        ({"max_side": 0}, ValueError, "max_side must be at least 1 pixel, got 0"),
        ({"treshold": 0.2}, TypeError, "no option 'treshold'; did you mean 'threshold'"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(call: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        pipe()(**{"inputs": picture(40, 48), **call})


@pytest.mark.parametrize("cut", [0, 20, 400])
def test_a_damaged_file_is_named(tmp_path: Path, cut: int):
    stream = io.BytesIO()
    picture(40, 48).save(stream, format="PNG")
    (tmp_path / "broken.png").write_bytes(stream.getvalue()[:cut])
    with pytest.raises(ValueError, match=r"image .*broken\.png cannot be read"):
        pipe()(str(tmp_path / "broken.png"))


def test_a_url_that_does_not_answer_is_named(web: str):
    with pytest.raises(ValueError, match=r"image http://127.0.0.1:\d+/gone.jpg cannot be read .HTTPError.*404"):
        pipe()(f"{web}/gone.jpg", timeout=5)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png has more than 178 million pixels.*save a smaller copy"):
        open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"picture": datasets.Image()}, "the columns picture, expected one called image"),
        (
            {"image": datasets.Image(), "labels": datasets.Sequence(datasets.Value("int64"))},
            "column 'labels' is .*expected",
        ),
        ({"image": datasets.Image(), "label": datasets.Value("int64")}, "column 'label' is .*expected class names"),
    ],
)
def test_a_data_set_whose_columns_say_too_little_is_refused(features: dict[str, Any], words: str):
    rows = datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))
    with pytest.raises(ValueError, match=words):
        pipe()(rows)


def test_a_data_set_of_several_splits_asks_for_one():
    with pytest.raises(ValueError, match=r"got the splits train, val of a data set, expected one .*data\['train'\]"):
        pipe()(datasets.DatasetDict({"train": dataset_of(CLASSES), "val": dataset_of(CLASSES)}))


# ---- Saved and published.


def test_a_saved_pipeline_brings_its_code_and_says_its_task(tmp_path: Path):
    pipe().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["custom_pipelines"]["pseudo-mask-generation"]["impl"] == "pipeline_bitrans.PseudoMaskPipeline"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_bitrans.BiTransConfig",
        "AutoModel": "modeling_bitrans.BiTransModel",
        "AutoModelForImageClassification": "modeling_bitrans.BiTransModel",
    }
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_bitrans.BiTransImageProcessor"}
    names = {path.name for path in tmp_path.glob("*.py")}
    assert {"pipeline_bitrans.py", "modeling_bitrans.py", "image_processing_bitrans.py", "seeds.py"} <= names
    again = pipeline(model=str(tmp_path), pipeline_class=PseudoMaskPipeline, trust_remote_code=True, device="cpu")
    assert again.task == "pseudo-mask-generation"
    assert_same(again(picture(40, 48)), pipe()(picture(40, 48)))


def test_the_stock_segmentation_pipeline_runs_the_segmentation_network(caplog: pytest.LogCaptureFixture):
    network = DeepLabForSemanticSegmentation.from_bitrans(tiny_model()).eval()
    processor = BiTransImageProcessor(do_resize=False)
    segmenter = pipeline("image-segmentation", model=network, image_processor=processor, device="cpu")
    answer = segmenter(picture(40, 56))
    with torch.no_grad():
        logits = network(processor(picture(40, 56), return_tensors="pt").pixel_values).logits
    larger = torch.nn.functional.interpolate(logits, size=(40, 56), mode="bilinear")[0].argmax(0).numpy()
    names = ["background", *CLASSES]
    assert {entry["label"] for entry in answer} == {names[label] for label in np.unique(larger)}
    for entry in answer:
        np.testing.assert_array_equal(np.asarray(entry["mask"]) == 255, larger == names.index(entry["label"]))
    assert len(answer) > 1


def test_the_stock_classification_pipeline_tags_pictures_by_sigmoid():
    tagger = pipeline(
        "image-classification", model=tiny_model(), image_processor=BiTransImageProcessor(), device="cpu", top_k=3
    )
    answer = {entry["label"]: entry["score"] for entry in tagger(picture(40, 48))}
    pixels = BiTransImageProcessor()(picture(40, 48), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tiny_model()(pixels).logits.sigmoid()[0]
    assert answer == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-6)
