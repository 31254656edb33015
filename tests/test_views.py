from __future__ import annotations

import numpy as np
import pytest
import torch

from bitrans_hf.hub.views import VIEWS, invert_affinity

GRIDS = [(3, 5), (4, 4), (1, 6), (5, 2)]


def position_in_view(name: str, row: int, column: int, h: int, w: int) -> tuple[int, int]:
    """Where the patch (row, column) of an h x w image is found after the transform."""
    return {
        "hflip": (row, w - 1 - column),
        "vflip": (h - 1 - row, column),
        "rot90": (w - 1 - column, row),  # a quarter turn to the left: the right edge becomes the top
        "rot180": (h - 1 - row, w - 1 - column),
        "none": (row, column),
    }[name]


def grid_in_view(name: str, h: int, w: int) -> tuple[int, int]:
    return (w, h) if name == "rot90" else (h, w)


def test_all_views_are_tested():
    for name in VIEWS:
        assert position_in_view(name, 0, 0, 2, 2) in {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_moves_each_patch_where_the_slow_loop_says(name: str, grid: tuple[int, int]):
    h, w = grid
    maps = torch.randn(2, 3, h, w)
    seen = VIEWS[name].apply(maps)
    assert seen.shape[2:] == grid_in_view(name, h, w)
    for row in range(h):
        for column in range(w):
            moved_row, moved_column = position_in_view(name, row, column, h, w)
            assert torch.equal(seen[:, :, moved_row, moved_column], maps[:, :, row, column])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", VIEWS)
def test_the_inverse_puts_each_patch_of_a_map_back(name: str, grid: tuple[int, int]):
    h, w = grid
    seen = torch.randn(2, 3, *grid_in_view(name, h, w))
    expected = torch.empty(2, 3, h, w)
    for row in range(h):
        for column in range(w):
            moved_row, moved_column = position_in_view(name, row, column, h, w)
            expected[:, :, row, column] = seen[:, :, moved_row, moved_column]
    assert torch.equal(VIEWS[name].invert(seen), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", VIEWS)
def test_the_inverse_puts_rows_and_columns_of_an_affinity_back(name: str, grid: tuple[int, int]):
    h, w = grid
    seen_h, seen_w = grid_in_view(name, h, w)
    seen = torch.randn(2, h * w, h * w)
    expected = torch.empty_like(seen)
    patches = [(row, column) for row in range(h) for column in range(w)]
    for query, (query_row, query_column) in enumerate(patches):
        for key, (key_row, key_column) in enumerate(patches):
            row, column = position_in_view(name, query_row, query_column, h, w)
            seen_query = row * seen_w + column
            row, column = position_in_view(name, key_row, key_column, h, w)
            expected[:, query, key] = seen[:, seen_query, row * seen_w + column]
    assert torch.equal(invert_affinity(VIEWS[name], seen, (seen_h, seen_w)), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_and_then_its_inverse_change_nothing(name: str, grid: tuple[int, int]):
    maps = torch.randn(2, 3, *grid)
    view = VIEWS[name]
    assert torch.equal(view.invert(view.apply(maps)), maps)
    assert torch.equal(view.apply(view.invert(maps)), maps)


@pytest.mark.parametrize("name", VIEWS)
def test_the_affinity_of_a_turned_picture_comes_back_as_that_of_the_picture(name: str):
    """An affinity made from patch colors alone must not depend on how the image lies."""
    h, w = 3, 5
    colors = torch.randn(1, 4, h, w)

    def affinity(features: torch.Tensor) -> torch.Tensor:
        flat = features.flatten(2)
        return (2.0 * flat.transpose(1, 2) @ flat).softmax(dim=-1)

    back = invert_affinity(VIEWS[name], affinity(VIEWS[name].apply(colors)), grid_in_view(name, h, w))
    torch.testing.assert_close(back, affinity(colors))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_the_image_is_the_same_view_of_its_patch_grid(name: str):
    images = torch.randn(1, 3, 12, 20)
    pool = torch.nn.AvgPool2d(4)
    torch.testing.assert_close(pool(VIEWS[name].apply(images)), VIEWS[name].apply(pool(images)))


@pytest.mark.parametrize("name", VIEWS)
def test_only_a_quarter_turn_needs_square_images(name: str):
    assert VIEWS[name].keeps_shape == (VIEWS[name].apply(torch.zeros(1, 3, 4, 6)).shape == (1, 3, 4, 6))


def test_flipping_the_flat_patch_axis_is_a_half_turn_and_no_flip():
    grid = np.arange(12).reshape(1, 3, 4)
    flat_flip = torch.from_numpy(grid).flatten(1).flip(-1).reshape(1, 3, 4)
    assert torch.equal(flat_flip, VIEWS["rot180"].invert(torch.from_numpy(grid)))
    assert not torch.equal(flat_flip, VIEWS["hflip"].invert(torch.from_numpy(grid)))
    np.testing.assert_array_equal(VIEWS["hflip"].invert(torch.from_numpy(grid)), grid[:, :, ::-1])
