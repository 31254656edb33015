from __future__ import annotations

import numpy as np
import pycocotools.mask as pycocotools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitrans_hf.data.outlines import OutlineError, read_outline

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools itself

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def regions(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(SIZES)
    pixels = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(pixels, dtype=bool).reshape(height, width)


def run_lengths(region: np.ndarray) -> list[int]:
    """Slowly, pixel by pixel, down the columns."""
    lengths, inside = [0], False
    for column in range(region.shape[1]):
        for row in range(region.shape[0]):
            if bool(region[row, column]) != inside:
                lengths.append(0)
                inside = not inside
            lengths[-1] += 1
    return lengths


@settings(max_examples=40, deadline=None)
@given(regions())
def test_run_lengths_of_every_form_give_the_region_back(region: np.ndarray) -> None:
    size = list(region.shape)
    compressed = pycocotools.encode(np.asfortranarray(region.astype(np.uint8)))["counts"]
    lengths = run_lengths(region)
    for counts in (
        lengths,
        [float(each) for each in lengths],
        list(map(str, lengths)),
        compressed,
        compressed.decode(),
    ):
        outline = read_outline({"counts": counts, "size": size})
        assert outline is not None
        np.testing.assert_array_equal(outline.paint(*region.shape), region)


@settings(max_examples=40, deadline=None)
@given(regions(), st.data())
def test_run_lengths_that_do_not_fit_are_always_refused(region: np.ndarray, data: st.DataObject) -> None:
    lengths = run_lengths(region)
    place = data.draw(st.integers(0, len(lengths) - 1))
    lengths[place] += data.draw(st.integers(-(2**40), 2**40).filter(bool))
    compressed = pycocotools.encode(np.asfortranarray(region.astype(np.uint8)))["counts"].decode()
    for counts in (lengths, compressed[:-1], compressed + "1", compressed + "o", f" {compressed}", compressed + "~"):
        with pytest.raises(OutlineError, match="its segmentation has"):
            read_outline({"counts": counts, "size": list(region.shape)})


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=12), SIZES)
def test_text_is_either_run_lengths_of_this_size_or_refused(text: str, size: tuple[int, int]) -> None:
    try:
        outline = read_outline({"counts": text, "size": list(size)})
    except OutlineError:
        return
    assert outline is not None
    [(_, lengths)] = outline.runs
    assert lengths.min() >= 0
    assert lengths.sum() == size[0] * size[1]


COORDINATES = st.one_of(
    st.integers(-10, 40), st.floats(-10, 40, allow_nan=False), st.sampled_from([0.5, 1.5, 2.5, 24.0, -200.0, 300.0])
)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.lists(st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=8), min_size=1, max_size=3))
def test_polygons_are_painted_as_pycocotools_paints_them(
    size: tuple[int, int], polygons: list[list[tuple[float, float]]]
) -> None:
    flat = [[float(number) for corner in polygon for number in corner] for polygon in polygons]
    expected = pycocotools.decode(pycocotools.merge(pycocotools.frPyObjects(flat, *size))).astype(bool)
    for form in (flat, [[list(corner) for corner in polygon] for polygon in polygons]):
        outline = read_outline(form)
        assert outline is not None
        np.testing.assert_array_equal(outline.paint(*size), expected)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.lists(st.integers(-30, 50), min_size=4, max_size=4))
def test_rectangles_of_whole_numbers_are_painted_to_the_pixel(size: tuple[int, int], sides: list[int]) -> None:
    (left, right), (top, bottom) = sorted(sides[:2]), sorted(sides[2:])
    outline = read_outline([[left, top, right, top, right, bottom, left, bottom]])
    assert outline is not None
    rows, columns = np.ogrid[: size[0], : size[1]]
    expected = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    np.testing.assert_array_equal(outline.paint(*size), expected)


@pytest.mark.parametrize("far", [100_001.0, -1e6, 1e12, 1e300])
def test_corners_that_nobody_draws_are_refused(far: float) -> None:
    with pytest.raises(OutlineError, match=r"a corner at .*expected pixels of the image"):
        read_outline([[0, 5, far, 5, far, 7, 0, 7]])


def test_corners_outside_the_image_keep_the_inside() -> None:
    outline = read_outline([[-90_000, 5, 90_000, 5, 90_000, 7, -90_000, 7]])
    assert outline is not None
    assert np.flatnonzero(outline.paint(10, 20).all(axis=1)).tolist() == [5, 6]


@pytest.mark.parametrize("nothing", [None, [], {}, "", " ", [[]], [None], float("nan")])
def test_no_outline_is_none(nothing: object) -> None:
    assert read_outline(nothing) is None


@pytest.mark.parametrize("thing", [7, "polygon", True, [[True] * 6], [[1, 2, [3], 4, 5, 6]], [[1, 2, 3, 4, 5, None]]])
def test_other_things_are_refused(thing: object) -> None:
    with pytest.raises(OutlineError, match=r"its segmentation (is|has|holds) .*expected"):
        read_outline(thing)
