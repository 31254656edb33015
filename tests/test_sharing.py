"""Data sets in loaders' workers, on several processes, on disk, in Parquet files and on a Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from hub_server import HubServer
from PIL import Image as PILImage

from bitrans_hf.data import (
    DataError,
    UnreadableImageError,
    class_names,
    load_coco,
    load_folder,
    load_voc,
    make_shapes,
    mask_rule,
    open_image,
    open_mask,
    write_parquet,
)
from bitrans_hf.data.transforms import TrainingImages, training_transform

NUM_ROWS = 7


def picture(number: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8))


def save_masks(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for number, name in enumerate(names[:-1]):  # the last image has no mask
        mask = PILImage.fromarray(np.random.default_rng(number).integers(0, 3, (12, 16), dtype=np.uint8))
        mask.putpalette([5, 6, 7] * 256)
        mask.save(folder / f"{name}.png")


def folder_source(root: Path) -> Dataset:
    (root / "images").mkdir(parents=True)
    names = [f"photo{number}" for number in range(NUM_ROWS)]
    for number, name in enumerate(names):
        picture(number).save(root / f"images/{name}.jpg")
    save_masks(root / "masks", names)
    rows = [f"{name}.jpg,{'cat;dog' if number % 2 else 'cat'}" for number, name in enumerate(names)]
    (root / "labels.csv").write_text("\n".join(["file_name,labels", *rows]))
    return load_folder(root)


def voc_source(root: Path) -> Dataset:
    names = [f"2007_00000{number}" for number in range(NUM_ROWS)]
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for number, name in enumerate(names):
        picture(number).save(root / f"JPEGImages/{name}.jpg")
        thing = f"<object><name>{'boat' if number % 2 else 'bird'}</name></object>"
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{thing}</annotation>")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    save_masks(root / "SegmentationClass", names)
    return load_voc(root, "val")


def coco_source(root: Path) -> Dataset:
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    content: dict[str, Any] = {"categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]}
    content["images"] = [
        {"id": number, "file_name": f"{number:012}.jpg", "height": 12, "width": 16} for number in range(NUM_ROWS)
    ]
    content["annotations"] = [
        {"id": n, "image_id": n, "category_id": 3, "iscrowd": 0, "segmentation": [[n, 0, n + 3, 0, n + 3, 9, n, 9]]}
        for n in range(NUM_ROWS)
    ]
    for number in range(NUM_ROWS):
        picture(number).save(root / f"val2017/{number:012}.jpg")
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return load_coco(root, "val")


def shapes_source(root: Path) -> Dataset:
    root.mkdir()
    return make_shapes(NUM_ROWS, 3)


SOURCES: list[Callable[[Path], Dataset]] = [folder_source, voc_source, coco_source, shapes_source]


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__.removesuffix("_source"))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    return request.param(tmp_path / "source")


def content(dataset: Dataset) -> list[tuple[str, bytes, list[int], list[list[int]] | None]]:
    """Everything that a data set says, decoded."""
    return [
        (
            row["image_id"],
            open_image(row["image"]).tobytes(),
            row["labels"],
            None if row["mask"] is None else open_mask(row["mask"]).tolist(),
        )
        for row in dataset
    ]


# ---- Workers and processes.


class ImagesAndMasks(torch.utils.data.Dataset[tuple[int, int]]):
    """Sums of what workers open."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, int]:
        row = self.rows[index]
        mask = 0 if row["mask"] is None else int(open_mask(row["mask"]).astype(np.int64).sum())
        return int(np.asarray(open_image(row["image"])).astype(np.int64).sum()), mask


def batches_of(dataset: torch.utils.data.Dataset[Any], **options: Any) -> list[Any]:
    return list(torch.utils.data.DataLoader(dataset, batch_size=2, **options))


def test_forked_workers_give_what_the_process_itself_gives(source: Dataset) -> None:
    opened = ImagesAndMasks(source)
    for one, other in zip(
        batches_of(opened), batches_of(opened, num_workers=2, multiprocessing_context="fork"), strict=True
    ):
        assert torch.equal(torch.stack(one), torch.stack(other))


def test_spawned_workers_give_what_the_process_itself_gives(tmp_path: Path) -> None:
    """Masks that are painted on demand are the hardest: a fresh process has to know how."""
    opened = torch.utils.data.ConcatDataset([ImagesAndMasks(make(tmp_path / make.__name__)) for make in SOURCES])
    for one, other in zip(
        batches_of(opened), batches_of(opened, num_workers=1, multiprocessing_context="spawn"), strict=True
    ):
        assert torch.equal(torch.stack(one), torch.stack(other))


def test_training_images_come_alike_from_any_number_of_workers(source: Dataset) -> None:
    images = TrainingImages(source, training_transform(16, "crop_flip"), seed=1)
    for one, other in zip(
        batches_of(images), batches_of(images, num_workers=2, multiprocessing_context="fork"), strict=True
    ):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_without_gap_or_overlap(source: Dataset, processes: int) -> None:
    everything = source["image_id"][:]
    shards = [source.shard(processes, index)["image_id"][:] for index in range(processes)]
    assert sorted(chain(*shards)) == sorted(everything)
    parts = [split_dataset_by_node(source, rank, processes)["image_id"][:] for rank in range(processes)]
    assert sorted(chain(*parts)) == sorted(everything)


# ---- Disk and Parquet.


def test_a_saved_data_set_is_loaded_back_without_its_source(source: Dataset, tmp_path: Path) -> None:
    if not source.features["mask"].decode:  # painted on demand: `write_parquet` is for these
        with pytest.raises(FileNotFoundError, match="coco:"):
            source.save_to_disk(tmp_path / "saved")
        return
    expected, rule = content(source), mask_rule(source)
    source.save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "source")
    loaded = load_from_disk(str(tmp_path / "saved"))
    assert content(loaded) == expected
    assert class_names(loaded) == class_names(source)
    assert mask_rule(loaded) == rule


@pytest.mark.parametrize("rows_per_file", [3, 100])
def test_parquet_files_hold_pictures_and_masks(source: Dataset, tmp_path: Path, rows_per_file: int) -> None:
    expected = content(source)
    files = write_parquet(source, tmp_path / "shared", split="validation", rows_per_file=rows_per_file)
    write_parquet(source.select([2]), tmp_path / "shared", split="test")
    shutil.rmtree(tmp_path / "source")
    assert [path.name for path in files] == [
        f"validation-{number:05}-of-{len(files):05}.parquet" for number in range(3 if rows_per_file == 3 else 1)
    ]
    loaded = load_dataset(str(tmp_path / "shared"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"validation", "test"}
    assert content(loaded["validation"]) == expected
    assert content(loaded["test"]) == expected[2:3]
    assert class_names(loaded["test"]) == class_names(source)
    # Images are still opened as they are stored, and no path of this machine went along.
    assert not loaded["validation"].features["image"].decode
    assert loaded["validation"].features["mask"].decode
    assert str(tmp_path) not in str(loaded["validation"].with_format("arrow")["image"][:].to_pylist())


def test_pictures_keep_their_bytes(tmp_path: Path) -> None:
    dataset = folder_source(tmp_path / "source")
    write_parquet(dataset, tmp_path / "shared")
    loaded = load_dataset(str(tmp_path / "shared"), cache_dir=str(tmp_path / "cache"), split="train")
    for row in loaded:
        assert row["image"]["bytes"] == (tmp_path / "source/images" / row["image"]["path"]).read_bytes()


def test_a_chosen_and_shuffled_part_is_written_as_it_is(tmp_path: Path) -> None:
    part = folder_source(tmp_path / "source").shuffle(seed=0).select(range(4))
    expected = content(part)
    write_parquet(part, tmp_path / "shared")
    loaded = load_dataset(str(tmp_path / "shared"), cache_dir=str(tmp_path / "cache"), split="train")
    assert content(loaded) == expected


def test_nothing_appears_when_a_file_is_missing(tmp_path: Path) -> None:
    dataset = folder_source(tmp_path / "source")
    (tmp_path / "source/images/photo6.jpg").unlink()
    with pytest.raises(UnreadableImageError, match=r"image .*photo6\.jpg cannot be read"):
        write_parquet(dataset, tmp_path / "shared", rows_per_file=2)
    assert not list((tmp_path / "shared").rglob("*.parquet"))
    write_parquet(dataset.select(range(6)), tmp_path / "shared")
    with pytest.raises(DataError, match="holds the split 'train' already"):
        write_parquet(dataset, tmp_path / "shared")
    with pytest.raises(DataError, match="the data set is empty"):
        write_parquet(dataset.select([]), tmp_path / "shared", split="none")
    with pytest.raises(ValueError, match="rows_per_file must be 1 or greater, got 0"):
        write_parquet(dataset, tmp_path / "shared", split="more", rows_per_file=0)


# ---- The Hub.

PUSH = """
import sys
import datasets
from datasets import load_dataset
from bitrans_hf.data import load_folder

datasets.disable_progress_bars()
load_folder(sys.argv[1]).push_to_hub("me/photos", split="validation")
load_dataset(sys.argv[2], split="validation").push_to_hub("me/street", split="validation")
"""
PULL = """
import hashlib, io, json
import datasets
import numpy as np
from PIL import Image

datasets.disable_progress_bars()
result = {}
for name in ("me/photos", "me/street"):
    loaded = datasets.load_dataset(name, split="validation")
    result[name] = {
        "classes": loaded.features["labels"].feature.names,
        "rows": [
            [row["image_id"], hashlib.sha256(Image.open(io.BytesIO(row["image"]["bytes"])).tobytes()).hexdigest(),
             row["labels"], None if row["mask"] is None else np.array(row["mask"]).tolist()]
            for row in loaded
        ],
    }
print(json.dumps(result))
"""


def run(code: str, hub: HubServer, home: Path, *arguments: Path) -> str:
    environment = {**os.environ, **hub.environment(hub.token, home)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_sets_are_pushed_and_pulled_by_a_machine_without_this_package(hub: HubServer, tmp_path: Path) -> None:
    expected = {}
    for name, make in (("me/photos", folder_source), ("me/street", coco_source)):
        dataset = make(tmp_path / make.__name__)
        rows = [[i, hashlib.sha256(pixels).hexdigest(), *rest] for i, pixels, *rest in content(dataset)]
        expected[name] = {"classes": class_names(dataset), "rows": rows}
    write_parquet(load_coco(tmp_path / "coco_source", "val"), tmp_path / "parquet", split="validation")
    run(PUSH, hub, tmp_path / "one_home", tmp_path / "folder_source", tmp_path / "parquet")
    for name in ("folder_source", "coco_source", "parquet", "one_home"):
        shutil.rmtree(tmp_path / name)
    assert json.loads(run(PULL, hub, tmp_path / "other_home")) == expected
    pushed = b"".join(blob.data for name in expected for blob in hub.repository("dataset", name).files().values())
    assert str(tmp_path).encode() not in pushed, "no path of the machine that pushed goes along"
