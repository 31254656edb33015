from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitrans_hf.file_names import ascii_name, image_id_of, label_files, label_path
from bitrans_hf.publishing.pseudo_labels import pseudo_label_dataset
from bitrans_hf.refine.pseudo_labels import write_label_png

# Letters that meet in one name on some disk, the signs that a disk or an escape treats in a special way, and devices.
SIGNS = "aAä%~.-/ #?*:<>|\\\"'+\n\t\x7f\u0131\u017f\u0308"
PIECES = st.sampled_from([*SIGNS, "%2F", "%~", "con", "nul.", "LPT1", "사진", "🐶", ".png", "//"])
IDS = st.lists(PIECES, min_size=1, max_size=8).map("".join) | st.text(min_size=1, max_size=30)
LONG_IDS = st.builds(lambda piece, count, end: piece * count + end, IDS, st.integers(1, 100), st.text(max_size=2))
ANY_IDS = IDS | LONG_IDS

WINDOWS_FORBIDS = re.compile(r'[<>:"\\|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]) *(\.|$)', re.I)


def legal(name: str) -> bool:
    """Whether Linux, macOS and Windows take a file name."""
    return 0 < len(name.encode()) <= 255 and "/" not in name and not WINDOWS_FORBIDS.search(name) and name[0] != "."


@settings(max_examples=100, deadline=None, database=None)
@given(ANY_IDS)
@example("사진" * 16)
@example("x" * 251)
@example("x" * 252)
@example("con")
def test_a_name_in_a_store_is_legal_everywhere_and_holds_its_id_where_it_is_not_cut_off(image_id: str):
    name = ascii_name(image_id, ".npz")
    assert legal(name)
    assert name.isascii()
    assert image_id_of(name.removesuffix(".npz")) in (image_id, None)
    assert image_id_of(name.removesuffix(".npz")) == image_id or len(name) > 200


@settings(max_examples=100, deadline=None, database=None)
@given(ANY_IDS)
@example("/")
@example("..")
@example("a.png/b")
@example("nul/con.x/aux")
def test_a_label_maps_path_is_legal_everywhere_and_holds_its_id_where_it_is_not_cut_off(image_id: str):
    path = label_path(Path("labels"), image_id).relative_to("labels")
    assert all(legal(part) for part in path.parts)
    cut_off = any(len(part.encode()) > 200 for part in path.parts)
    assert image_id_of(path.as_posix().removesuffix(".png")) == image_id or cut_off


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(ANY_IDS, min_size=2, max_size=8, unique=True))
@example(["a/b", "a%2Fb", "a//b", "/a/b", "a/b/"])
@example(["x" * 300, "x" * 301, "x" * 300 + "/"])
def test_different_ids_never_share_a_file(image_ids: list[str]):
    assert len({ascii_name(image_id, ".npz") for image_id in image_ids}) == len(image_ids)
    assert len({label_path(Path("labels"), image_id) for image_id in image_ids}) == len(image_ids)


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(ANY_IDS.filter(lambda image_id: image_id.count("/") < 8), min_size=1, max_size=4, unique=True))
@example(["사진" * 16, "사진" * 60, "a/" + "사진" * 60 + "/b", "a", "a.png/b", "-x", "50% off"])
def test_label_maps_on_disk_are_found_by_their_ids(image_ids: list[str]):
    with tempfile.TemporaryDirectory() as name:
        for number, image_id in enumerate(image_ids):
            write_label_png(label_path(Path(name), image_id), np.full((2, 3), number, dtype=np.uint8), image_id)
        assert set(label_files(Path(name))) == set(image_ids)
        found = pseudo_label_dataset(name, image_ids=image_ids)
        assert [np.asarray(each)[0, 0] for each in found["pseudo_label"]] == list(range(len(image_ids)))


@pytest.mark.parametrize("image_id", ["2007_000032", "folder/a b", "사진 1", "IMG#1, 'x' (2)", "-x"])
def test_ordinary_ids_are_their_own_names(tmp_path: Path, image_id: str):
    assert label_path(tmp_path, image_id) == tmp_path / f"{image_id}.png"


@pytest.mark.parametrize("image_id", ["50%", "what?", "a.png/b", ".hidden"])
def test_a_label_map_that_another_program_wrote_under_the_plain_name_is_used(tmp_path: Path, image_id: str):
    plain = tmp_path / f"{image_id}.png"
    assert label_path(tmp_path, image_id) != plain
    write_label_png(plain, np.zeros((2, 2), dtype=np.uint8))
    assert label_path(tmp_path, image_id) == plain


def test_a_percent_sign_in_another_programs_name_is_no_escape(tmp_path: Path):
    write_label_png(tmp_path / "my%20photo.png", np.zeros((2, 2), dtype=np.uint8))
    assert label_files(tmp_path) == {"my%20photo": tmp_path / "my%20photo.png"}
    assert label_path(tmp_path, "my%20photo") == tmp_path / "my%20photo.png"
