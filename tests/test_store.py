from __future__ import annotations

import io
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import pixels, tiny_model

from bitrans_hf.files import DiskFullError, atomic_write
from bitrans_hf.hub.seeds import SEED_VARIANTS, normalized_seeds, sum_over_views
from bitrans_hf.refine.pseudo_labels import write_label_png
from bitrans_hf.store import SeedStore

IDS = np.array([1, 4])


def grids(num_maps: int = 2, seed: int = 0) -> torch.Tensor:
    """Summed maps on a small grid, far from [0, 1]."""
    return 5.0 + 0.01 * torch.rand(num_maps, 6, 9, generator=torch.Generator().manual_seed(seed))


# ---- What comes back.


@pytest.mark.parametrize("size", [(96, 144), (100, 131)])
def test_seeds_come_back_at_the_images_size_as_if_they_had_been_kept_whole(tmp_path: Path, size: tuple[int, int]):
    store = SeedStore(tmp_path / "seeds")
    maps = {"fused": grids(seed=0), "refined": 1e-6 * grids(seed=1)}
    store.write("2007_000032", IDS, maps, size)
    for variant, values in maps.items():
        seeds = store.read("2007_000032", variant)
        expected = torch.nn.functional.interpolate(values[None].double(), size=size, mode="bilinear")[0].numpy()
        low, high = expected.min((1, 2), keepdims=True), expected.max((1, 2), keepdims=True)
        assert seeds.class_ids.tolist() == [1, 4]
        assert seeds.maps.dtype == np.float32
        assert seeds.maps.shape == (2, *size)
        reference = (expected - low) / (high - low)
        np.testing.assert_allclose(seeds.maps, reference, atol=1e-3 if variant == "fused" else 5e-2)
        assert (seeds.maps.min(), seeds.maps.max()) == (0.0, pytest.approx(1.0, abs=1e-6))


def test_stored_seeds_of_a_model_are_the_exact_ones_and_hardly_take_room(tmp_path: Path):
    model = tiny_model(patch_size=16, image_size=64)
    image, size = pixels(1, 3, 375, 500), (375, 500)
    class_ids = np.array([0, 2])
    small = sum_over_views(model, [image], SEED_VARIANTS)
    large = sum_over_views(model, [image], SEED_VARIANTS, size=size)
    store = SeedStore(tmp_path)
    store.write("image", class_ids, {name: maps[0, class_ids] for name, maps in small.items()}, size)
    exact = {name: normalized_seeds(class_ids, maps[0, class_ids], size) for name, maps in large.items()}
    for name, seeds in exact.items():
        np.testing.assert_allclose(store.read("image", name).maps, seeds.maps, atol=1e-3)
    # The reference keeps one variant: a dict of class -> (H, W) float32.
    reference = io.BytesIO()
    np.save(reference, {int(c): exact["refined"].maps[i] for i, c in enumerate(class_ids)}, allow_pickle=True)  # type: ignore[arg-type]
    assert store.path("image").stat().st_size < 0.05 * reference.getbuffer().nbytes


def test_an_image_without_labels_is_stored_too(tmp_path: Path):
    store = SeedStore(tmp_path)
    store.write("empty", np.zeros(0, dtype=np.int64), {"fused": torch.zeros(0, 6, 9)}, (48, 72))
    seeds = store.read("empty", "fused")
    assert seeds.class_ids.shape == (0,)
    assert seeds.maps.shape == (0, 48, 72)
    assert "empty" in store


def test_a_flat_map_comes_back_as_zeros(tmp_path: Path):
    store = SeedStore(tmp_path)
    store.write("flat", np.array([3]), {"fused": torch.full((1, 6, 9), 0.25)}, (48, 72))
    assert (store.read("flat", "fused").maps == 0).all()


def test_a_file_holds_no_pickle(tmp_path: Path):
    store = SeedStore(tmp_path)
    store.write("a", IDS, {"fused": grids()}, (48, 72))
    with zipfile.ZipFile(store.path("a")) as archive:
        assert sorted(archive.namelist()) == ["class_ids.npy", "image_id.npy", "maps_fused.npy", "size.npy"]
        assert not any(b"|O" in archive.read(name)[:128] for name in archive.namelist())


# ---- Names.

NAMES = [
    "2007_000032", "train2017/000001", "a b.c", "ä%2F", "..", "../up", ".hidden", "C:\\x", "*",
    "사진" * 16, "사진" * 40, "x" * 250, "folder/" * 60 + "x", "con", "new\nline", "-dash", "dot.", "blank ",
    "🐶" * 60,
]  # fmt: skip


def test_ids_of_any_kind_are_found_again_inside_the_folder(tmp_path: Path):
    store = SeedStore(tmp_path / "seeds")
    for index, name in enumerate(NAMES):
        assert name not in store
        store.write(name, np.array([index]), {"fused": grids(1)}, (48, 72))
    assert store.ids() == sorted(NAMES)
    assert [store.read(name, "fused").class_ids.tolist() for name in NAMES] == [[i] for i in range(len(NAMES))]
    assert [path.name for path in tmp_path.iterdir()] == ["seeds"]
    assert len(list((tmp_path / "seeds").iterdir())) == len(NAMES)


def test_stores_of_earlier_runs_are_read(tmp_path: Path):
    np.savez_compressed(
        tmp_path / "a%2F%C3%A4.npz", class_ids=IDS, size=np.array([48, 72], dtype=np.int32), maps_fused=grids().numpy()
    )
    store = SeedStore(tmp_path)
    assert store.ids() == ["a/ä"]
    assert store.read("a/ä", "fused").class_ids.tolist() == IDS.tolist()


def test_the_seeds_of_another_image_are_not_handed_out_by_a_disk_that_ignores_case(tmp_path: Path):
    store = SeedStore(tmp_path)
    store.write("IMG_1", IDS, {"fused": grids()}, (48, 72))
    store.path("IMG_1").rename(store.path("img_1"))  # what such a disk answers when it is asked for img_1
    with pytest.raises(ValueError, match=r"holds 'IMG_1' where 'img_1' belongs.*differ in case"):
        store.read("img_1", "fused")


def test_a_file_with_the_longest_name_is_written(tmp_path: Path):
    for path in (tmp_path / ("x" * 251 + ".png"), tmp_path / ("사" * 83 + "xx.png")):
        with atomic_write(path) as temporary:
            temporary.write_text("whole", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "whole"


def test_a_store_without_a_folder_is_empty(tmp_path: Path):
    assert SeedStore(tmp_path / "absent").ids() == []
    assert "x" not in SeedStore(tmp_path / "absent")


def test_writing_again_replaces(tmp_path: Path):
    store = SeedStore(tmp_path)
    store.write("a", IDS, {"fused": grids()}, (48, 72))
    store.write("a", np.array([7]), {"fused": grids(1)}, (48, 72))
    assert store.read("a", "fused").class_ids.tolist() == [7]
    assert store.ids() == ["a"]


# ---- All or nothing.


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(RuntimeError, match="half-way"), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("half-way")
    assert list(path.parent.iterdir()) == []


def test_an_error_while_writing_keeps_what_was_there(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_appears_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, ".txt")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_written_is_no_stored_image(tmp_path: Path):
    store = SeedStore(tmp_path)
    with atomic_write(store.path("a")) as temporary:
        temporary.write_bytes(b"half")
        assert store.ids() == []
        assert "a" not in store


# ---- Bad input.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float):
    maps = grids()
    maps[1, 2, 3] = value
    with pytest.raises(ValueError, match="2007_000032: the maps of 'refined' hold NaN or infinity"):
        SeedStore(tmp_path).write("2007_000032", IDS, {"fused": grids(), "refined": maps}, (48, 72))
    assert list(tmp_path.iterdir()) == []


def test_maps_that_do_not_match_the_classes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="a: 3 maps of 'fused' for 2 classes"):
        SeedStore(tmp_path).write("a", IDS, {"fused": grids(3)}, (48, 72))


def test_what_is_not_there_is_named(tmp_path: Path):
    store = SeedStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no seeds of image 'b' in .*make its seeds first"):
        store.read("b", "fused")
    store.write("a", IDS, {"fused": grids(), "sc_cam": grids()}, (48, 72))
    with pytest.raises(ValueError, match=r"holds the variants fused, sc_cam, not 'refined'"):
        store.read("a", "refined")


# ---- A full disk.


@pytest.fixture(params=["small disk", "file-size limit"])
def cramped_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder with room for small files only: a tmpfs of 64 KiB, or a limit on the size of files."""
    if request.param == "small disk":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("mounting a small disk needs rights that this user lacks")
        try:
            yield tmp_path
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
    else:
        resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
        try:
            yield tmp_path
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(cramped_folder: Path):
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (side, side), dtype=np.uint8) for side in (20, 600))
    write_label_png(cramped_folder / "small.png", small)
    SeedStore(cramped_folder).write("small", IDS, {"fused": torch.rand(2, 4, 4)}, (20, 20))
    writers: list[Callable[[], None]] = [
        lambda: write_label_png(cramped_folder / "large.png", large),
        lambda: SeedStore(cramped_folder).write("large", IDS, {"fused": torch.rand(2, 300, 300)}, (600, 600)),
    ]
    for write in writers:
        with pytest.raises(DiskFullError, match=r"no room left to write .*large\.(png|npz) \(.*make room and rerun"):
            write()
    assert sorted(path.name for path in cramped_folder.iterdir()) == ["small.npz", "small.png"]
    write_label_png(cramped_folder / "small.png", small.T)  # what fits can still be written


def test_other_errors_of_the_disk_keep_their_own_words(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError):
        write_label_png(tmp_path / "file" / "a.png", np.zeros((2, 2), dtype=np.uint8))
