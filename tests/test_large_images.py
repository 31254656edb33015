"""Images larger than the networks are meant for: bounded in every stage, with label maps of their own size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLASSES, picture, tiny_model

from bitrans_hf import BiTransImageProcessor
from bitrans_hf.hub.image_processing_bitrans import bounded_image, patch_problem
from bitrans_hf.hub.maps import resized
from bitrans_hf.hub.par import pixel_adaptive_refinement
from bitrans_hf.hub.seeds import extract_seeds
from bitrans_hf.stages.pseudo_labels import main as make_pseudo_labels_main
from bitrans_hf.stages.recipe import SeedsRecipe
from bitrans_hf.stages.report import main as make_report_main
from bitrans_hf.stages.seeds import images_at_once, memory_of_views
from bitrans_hf.stages.seeds import main as make_seeds_main
from bitrans_hf.store import SeedStore

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

MAX_SIDE = 96
SIZES = {"small": (80, 96), "photo": (180, 240), "other": (240, 180), "panorama": (60, 1400)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images and masks, one of them within the bound."""
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        picture(*size, seed=number).save(root / "images" / f"{name}.png")
        mask = np.random.default_rng(number).integers(0, 3, size, dtype=np.uint8)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "labels.csv").write_text("file_name,labels\n" + "".join(f'{name}.png,"cat,dog"\n' for name in SIZES))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES.values()))
    return root


def arguments(tmp_path: Path, photos: Path, name: str, max_side: int = MAX_SIDE) -> list[str]:
    """The arguments of a run whose model nobody trained."""
    folder = tmp_path / "runs" / name / "train"
    tiny_model().save_pretrained(folder / "model")
    BiTransImageProcessor().save_pretrained(folder / "model")
    for file in ("metrics.json", "done.json", "log.jsonl"):
        (folder / file).write_text('{"seconds": 1.0}')
    return [
        "--cpu", "true", "--quiet", "true", "--workers", "1", "--output_dir", str(tmp_path / "runs"),
        "--name", name, "--data.source", "folder", "--data.root", str(photos), "--data.train_split", "null",
        "--data.val_split", "null", "--seeds.splits", "[null]", "--report.split", "null",
        "--seeds.max_side", str(max_side), "--seeds.batch_size", "2", "--train.precision", "no",
        "--model.num_seed_layers", "2",
    ]  # fmt: skip


def test_large_images_are_worked_on_at_the_bound_and_labelled_at_their_own_size(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    command = arguments(tmp_path, photos, "large")
    make_seeds_main(command)
    command += ["--pseudo_labels.splits", "[null]", "--pseudo_labels.method", "refiner"]
    command += ["--pseudo_labels.refiner", "par"]
    make_pseudo_labels_main(command)
    make_report_main(command)
    folder = tmp_path / "runs" / "large"
    said = capsys.readouterr().out
    assert "seeds: 3 of 4 images are larger than 96 pixels and are reduced to that (seeds.max_side)" in said
    metrics = json.loads((folder / "seeds" / "metrics.json").read_text())
    assert metrics["max_side"] == MAX_SIDE
    assert metrics["splits"]["all_images"]["reduced"] == 3
    assert metrics["splits"]["all_images"]["scored"] == 4

    store = SeedStore(folder / "seeds" / "all_images" / "seeds")
    for number, (name, size) in enumerate(SIZES.items()):
        whole = picture(*size, seed=number)
        image = bounded_image(whole, MAX_SIDE)
        assert store.size(name) == size
        seeds = store.read(name, "refined", max_side=MAX_SIDE)
        assert seeds.maps.shape[1:] == (image.height, image.width)
        expected = extract_seeds(tiny_model(), image, ["cat", "dog"], processor=BiTransImageProcessor(), refine=True)
        np.testing.assert_allclose(seeds.maps, expected.maps, atol=2e-3)  # stored as float16

        background = torch.full((1, *seeds.maps.shape[1:]), 0.4)
        scores = torch.cat([background, torch.from_numpy(seeds.maps)])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        refined = pixel_adaptive_refinement(pixels, scores[None])[0]
        for made, values in (("seeds/all_images/masks", scores), ("pseudo_labels/all_images/labels", refined)):
            label_map = np.asarray(Image.open(folder / made / f"{name}.png"))
            assert label_map.shape == size
            enlarged = resized(values, size).argmax(dim=0).numpy()
            assert (label_map != enlarged).mean() < 1e-3, "where two scores are equal to the last digit"


def test_an_image_within_the_bound_has_the_seeds_that_it_has_without_one(tmp_path: Path, photos: Path):
    stores = []
    for name, max_side in (("bounded", MAX_SIDE), ("unbounded", 10_000)):
        make_seeds_main(arguments(tmp_path, photos, name, max_side))
        stores.append(SeedStore(tmp_path / "runs" / name / "seeds" / "all_images" / "seeds"))
    bounded, unbounded = (store.path("small").read_bytes() for store in stores)
    assert bounded == unbounded
    assert stores[0].path("photo").stat().st_size < stores[1].path("photo").stat().st_size


@pytest.mark.parametrize(
    ("size", "number"),
    [((500, 500), 8), ((640, 640), 8), ((64, 853), 8), ((960, 1280), 0), ((1500, 2000), 0), ((800, 800), 3)],
)
def test_fewer_images_go_together_where_each_is_larger_than_usual(size: tuple[int, int], number: int):
    assert images_at_once(size, 8) == max(1, number)


@pytest.mark.parametrize(
    ("size", "working", "scales", "words"),
    [
        ((1, 3000), (1, 3000), [1.0], "1 x 3000 pixels.*enlarge it or leave it out"),
        ((20, 3000), (20, 3000), [1.0, 0.5], r"at scale 0\.5.*leave out the small factors of seeds\.scales"),
        ((20, 50000), (15, 37500), [1.0], r"worked on at 15 x 37500.*raise seeds\.max_side, or cut"),
    ],
)
def test_what_helps_an_image_without_a_whole_patch_is_said(
    size: tuple[int, int], working: tuple[int, int], scales: list[float], words: str
):
    assert re.search(words, patch_problem(size, working, scales, 16, "seeds."))
    assert patch_problem((64, 3000), (64, 3000), scales, 16) == ""


def test_the_estimate_of_memory_is_the_formula_of_its_documentation():
    recipe: Any = SeedsRecipe(scales=[1.0, 2.0], flip=True)
    tokens, width = 3 + 6 * 8, 24 * (4 + 2 * 2.0)  # 24 x 32 pixels, twice as large, patches of 8; three classes
    assert memory_of_views(tiny_model(), (24, 32), recipe, 5) == 4 * 10 * tokens * (5 * tokens + width)
