"""Data sets of COCO's size, with made-up file names: time and memory until the first batch of training images."""

from __future__ import annotations

import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from PIL import Image

from bitrans_hf.data import load_coco, load_folder, make_shapes
from bitrans_hf.data.transforms import TrainingImages, training_transform
from bitrans_hf.hub.labels import COCO_CLASSES

from .harness import Options, Row, can_measure_memory, resident_memory

NUM_IMAGES = 122_218
"""Images of COCO 2014 that have a label."""

INSTANCES_PER_IMAGE = 7
LIMIT_MS, LIMIT_MIB = 5000.0, 100.0
BATCH_SIZE = 32
LAUNCHES = 3

LOADERS: Mapping[str, Callable[[Path], Dataset]] = {
    "folder with a Parquet table": load_folder,
    "COCO instances": lambda root: load_coco(root, "train2014", masks=False),
}


def make_files(root: Path) -> None:
    """Make one photo with 122,218 names, a table of their labels, and an `instances_train2014.json`."""
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    Image.fromarray(generator.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(root / "photo.jpg")
    names = [f"COCO_train2014_{number:012}.jpg" for number in range(NUM_IMAGES)]
    for name in names:
        (root / "images" / name).symlink_to(root / "photo.jpg")
    (root / "train2014").symlink_to(root / "images")
    class_ids = generator.integers(0, len(COCO_CLASSES), (NUM_IMAGES, INSTANCES_PER_IMAGE))
    labels = [[COCO_CLASSES[class_id] for class_id in np.unique(row)[:3]] for row in class_ids]
    pq.write_table(pa.table({"file_name": names, "labels": labels}), root / "labels.parquet")
    (root / "classes.txt").write_text("\n".join(COCO_CLASSES), encoding="utf-8")

    polygon = [np.round(generator.uniform(0, 480, 40), 2).tolist()]  # COCO's have about 50 numbers
    content = {
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(COCO_CLASSES)],
        "images": [{"id": n, "file_name": name, "height": 480, "width": 640} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": n // INSTANCES_PER_IMAGE, "category_id": c, "iscrowd": 0, "segmentation": polygon}
            for n, c in enumerate((class_ids.reshape(-1) + 1).tolist())
        ],
    }
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2014.json").write_text(json.dumps(content), encoding="utf-8")


def first_batch(dataset: Dataset) -> tuple[TrainingImages, dict[str, torch.Tensor]]:
    """Return a data set as training reads it, and its first batch."""
    images = TrainingImages(dataset, training_transform(224, "crop_flip"))
    return images, next(iter(torch.utils.data.DataLoader(images, batch_size=BATCH_SIZE, shuffle=True)))


def until_first_batch(name: str, root: Path, options: Options) -> tuple[float, float]:
    """Return milliseconds from nothing to a batch of training images, and the MiB of resident memory that stay.

    A small data set goes first: libraries that are loaded at their first use, and the batch itself, cost the same
    whatever the number of rows.
    """
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    first_batch(make_shapes(BATCH_SIZE, 0))
    gc.collect()
    before, start = resident_memory(), clock()
    images, batch = first_batch(LOADERS[name](root))
    elapsed = 1e3 * (clock() - start)
    if len(images) != NUM_IMAGES or batch["pixel_values"].shape != (BATCH_SIZE, 3, 224, 224):
        raise RuntimeError(f"expected a batch of {NUM_IMAGES} images, got {len(images)}.")
    del batch  # 18 MiB that are the same for ten images
    gc.collect()
    return elapsed, (resident_memory() - before) / 2**20


def data_of_cocos_size(options: Options) -> list[Row]:
    """Load 122,218 rows and take the first batch, in a fresh process each time."""
    if not can_measure_memory(options):
        return []
    memory = Path("/dev/shm")  # disks differ, and are not what is measured
    rows = []
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        make_files(Path(folder))
        for name in LOADERS:
            results = []
            for _ in range(LAUNCHES):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    results.append(pool.submit(until_first_batch, name, Path(folder), options).result())
            times, sizes = zip(*results, strict=True)
            what = f"{name}, {NUM_IMAGES:,} images, to the first batch"
            rows += [
                Row(f"{what}, time", statistics.median(times), LIMIT_MS, "the limit", "ms", 1.0),
                Row(f"{what}, memory", statistics.median(sizes), LIMIT_MIB, "the limit", "MiB", 1.0),
            ]
    return rows
