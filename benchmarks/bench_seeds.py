"""Seeds of an image set against the reference's loop, which takes one image and one view at a time."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bitrans_hf import BiTransImageProcessor
from bitrans_hf.hub.seeds import sum_over_views
from bitrans_hf.store import SeedStore

from .bench_model import NUM_CLASSES, EveryHeadKept, make_bitrans
from .harness import Options, Row, median_times

MEBIBYTE = 2**20


def make_images(count: int) -> list[tuple[str, Image.Image, np.ndarray]]:
    """Make (id, image, present class ids) of noise, in the three sizes that are most frequent in VOC."""
    generator = np.random.default_rng(0)
    sizes = itertools.cycle([(375, 500), (375, 500), (333, 500), (500, 375)])
    images = []
    for index, (height, width) in zip(range(count), sizes, strict=False):
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        class_ids = np.sort(generator.choice(NUM_CLASSES, size=1 + index % 2, replace=False))
        images.append((f"{index:06d}", picture, class_ids.astype(np.int64)))
    return images


def write_seeds_one_at_a_time(
    model: EveryHeadKept,
    images: list[tuple[str, Image.Image, np.ndarray]],
    processor: BiTransImageProcessor,
    folder: Path,
) -> None:
    """Do as MCTformer's script does: batch 1, each view alone, all classes resized, pickled float32 at image size."""
    device = model.model.device
    for image_id, picture, class_ids in images:
        pixel_values = processor.scaled_views(picture)[0].to(device)
        present = torch.zeros(1, NUM_CLASSES, 1, 1, device=device)
        present[0, torch.from_numpy(class_ids)] = 1.0
        total = torch.zeros(1, NUM_CLASSES, picture.height, picture.width, device=device)
        for flipped in (False, True):
            with torch.no_grad():
                _, coarse_cam, sc_cam, affinity = model.maps(pixel_values.flip(-1) if flipped else pixel_values)
            fused = sc_cam * coarse_cam.relu()
            refined = (affinity.unsqueeze(1) @ fused.flatten(2).unsqueeze(-1)).reshape(fused.shape)
            maps = F.interpolate(refined, size=total.shape[2:], mode="bilinear") * present
            total += maps.flip(-1) if flipped else maps
        seeds = {}
        for class_id in class_ids.tolist():
            one = total[0, class_id].cpu().numpy()
            seeds[class_id] = (one - one.min()) / (one.max() - one.min() + 1e-8)
        (folder / f"{image_id}.npy").write_bytes(pickle.dumps(seeds))


def write_seeds_in_batches(
    model: EveryHeadKept,
    images: list[tuple[str, Image.Image, np.ndarray]],
    processor: BiTransImageProcessor,
    store: SeedStore,
    batch_size: int,
) -> None:
    """Do as `training/make_seeds.py` does: images of one size together, maps kept on the token grid."""
    variants = {"refined": ("fused", True)}
    by_size = sorted(images, key=lambda item: item[1].size)
    for _, group in itertools.groupby(by_size, key=lambda item: item[1].size):
        same_size = list(group)
        for start in range(0, len(same_size), batch_size):
            batch = same_size[start : start + batch_size]
            pixel_values = torch.cat([processor.scaled_views(picture)[0] for _, picture, _ in batch])
            maps = sum_over_views(model.model, [pixel_values.to(model.model.device)], variants)["refined"].cpu()
            for (image_id, picture, class_ids), scores in zip(batch, maps, strict=True):
                store.write(image_id, class_ids, {"refined": scores[class_ids]}, (picture.height, picture.width))


def seeds_of_a_set(options: Options) -> list[Row]:
    """Refined seeds at scale 1 with flip: time for the set, and bytes on disk."""
    images = make_images(8 if options.device == "cpu" else 64)
    # Larger weights than usual: maps of a fresh model are so flat that min-max normalization shows rounding errors.
    model = EveryHeadKept(make_bitrans(options, initializer_range=0.1).eval())
    processor = BiTransImageProcessor()
    with tempfile.TemporaryDirectory() as name:
        reference_folder, store = Path(name) / "reference", SeedStore(Path(name) / "ours")
        reference_folder.mkdir()
        batch_size = 4 if options.device == "cpu" else 16
        candidates: dict[str, Callable[[], object]] = {
            "ours": lambda: write_seeds_in_batches(model, images, processor, store, batch_size),
            "reference": lambda: write_seeds_one_at_a_time(model, images, processor, reference_folder),
        }
        times = median_times(candidates, options)
        check_equal(images, reference_folder, store)
        disk = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in Path(name).iterdir()}
    title, loop = f"seeds of {len(images)} images (flip, refined)", "the one-at-a-time loop"
    return [
        Row(f"{title}, time", times["ours"], times["reference"], loop, "ms", 0.8 if options.device == "cpu" else 0.15),
        Row(f"{title}, disk", disk[store.folder] / MEBIBYTE, disk[reference_folder] / MEBIBYTE, loop, "MiB", 0.05),
    ]


def check_equal(images: list[tuple[str, Image.Image, np.ndarray]], reference_folder: Path, store: SeedStore) -> None:
    """Raise RuntimeError unless both ways gave the same seeds, up to the store's float16."""
    for image_id, _, class_ids in images:
        reference = np.load(reference_folder / f"{image_id}.npy", allow_pickle=True)  # written by this process
        seeds = store.read(image_id, "refined")
        expected = np.stack([reference[class_id] for class_id in class_ids.tolist()])
        difference = float(np.abs(seeds.maps - expected).max())
        if difference > 2e-3:
            raise RuntimeError(f"seeds of image {image_id} differ by {difference:.3g}, expected the same.")
