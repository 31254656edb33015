"""Drawn scenes with exact masks: textured shapes on clutter, made on the fly from a seed.

A class is a silhouette and nothing else. Whatever the class, objects and clutter are light, the background and its
patches dark, and all share the same textures; silhouettes of one size have equal areas. Only shape tells what an image
shows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image

from ..hub.errors import InputError
from .masks import index_png
from .rows import row_features

FloatArray = NDArray[np.float32]

REFERENCE_SIZE = 64
"""Side in pixels of the scenes for which the lengths below are given; other sizes scale them."""

DIAMETER_RANGE_PX = (18.0, 36.0)
"""Diameter of the disc of an object's area, in pixels of a 64-pixel scene."""

MIN_IMAGE_SIZE = 32
"""Smallest side in pixels: below it, the smallest objects have too few pixels to show their shape."""

OBJECT_COUNT = (1, 3)
"""Smallest and largest number of objects in a scene."""

MIN_VISIBLE_FRACTION = 0.6
"""Share of an object's silhouette that stays visible when later ones cover part of it."""

_ONE_CLASS_FRACTION = 1 / 3  # scenes whose objects are all of one class: 1.5 labels a scene, as VOC's 1.56
_PLACEMENT_TRIES = 40
# Per channel. Light on dark lets a small network see an outline within minutes on a CPU: were both from one range, it
# would first have to learn that an edge is an edge whichever side is lighter.
_DARK_COLOURS = (16.0, 112.0)
_LIGHT_COLOURS = (136.0, 240.0)
_OBJECT_TO_SURROUNDINGS = 110.0  # RGB distances, of 255 per channel
_OBJECT_TO_OBJECT = 70.0
_PATCH_TO_BACKGROUND = 40.0
# How busy a scene is: lowest and highest values of uniform draws; counts include both ends.
_TEXTURE_AMPLITUDE = (4.0, 16.0)  # levels of 255, for objects, background and patches alike
_NOISE_LEVEL = (1.0, 4.0)
_PATCH_COUNT = (0, 2)
_CLUTTER_COUNT = (3, 8)


@dataclass(frozen=True)
class DrawnShape:
    """One object of a scene.

    Attributes:
        class_id: Index into `SHAPE_CLASSES`.
        center: (row, column) of the circumcenter in pixels; (0.0, 0.0) is the center of the first pixel.
        diameter: Diameter in pixels of the disc with the silhouette's area.
        rotation: Angle in radians, from the column axis toward the row axis.
    """

    class_id: int
    center: tuple[float, float]
    diameter: float
    rotation: float

    @property
    def radius(self) -> float:
        """Radius of the circumscribed circle in pixels."""
        _, unit_area = _SILHOUETTES[SHAPE_CLASSES[self.class_id]]
        return self.diameter / 2.0 * math.sqrt(math.pi / unit_area)


@dataclass(frozen=True)
class Scene:
    """An image, its label map and what was drawn.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 0 background, class id + 1 on objects; later objects cover earlier ones.
        objects: The objects in the order of drawing.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    objects: tuple[DrawnShape, ...]


# ---- Silhouettes: signed distances (negative inside) for a circumscribed circle of radius 1 around the origin.


def _disc(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.hypot(x, y) - np.float32(1.0)


_CROSS_ANGLE = 0.4  # between an arm's axis and its corner; the arms are sin(0.4) = 0.39 wide for each side


def _cross(x: FloatArray, y: FloatArray) -> FloatArray:
    long_side, short_side = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long_side - np.float32(math.cos(_CROSS_ANGLE)), short_side - np.float32(math.sin(_CROSS_ANGLE)))


def _pointed(x: FloatArray, y: FloatArray, points: int, inner: float) -> FloatArray:
    """Star with `points` tips at radius 1 and notches at radius `inner`; the apothem makes it a regular polygon."""
    sector = 2.0 * math.pi / points
    angle = np.abs((np.arctan2(y, x) + sector / 2.0) % sector - sector / 2.0)
    radius = np.hypot(x, y)
    # Folded into half a sector, the outline is the one straight line from the tip (1, 0) to the next notch.
    edge_x, edge_y = inner * math.cos(sector / 2.0) - 1.0, inner * math.sin(sector / 2.0)
    length = math.hypot(edge_x, edge_y)
    distance = (radius * np.cos(angle) - 1.0) * (edge_y / length) - radius * np.sin(angle) * (edge_x / length)
    return np.asarray(distance, dtype=np.float32)


# name -> (signed distance, area inside), both for a circumscribed circle of radius 1
_SILHOUETTES: dict[str, tuple[Callable[[FloatArray, FloatArray], FloatArray], float]] = {
    "disc": (_disc, math.pi),
    "square": (partial(_pointed, points=4, inner=math.cos(math.pi / 4)), 2.0),
    "triangle": (partial(_pointed, points=3, inner=0.5), 0.75 * math.sqrt(3.0)),
    "star": (partial(_pointed, points=5, inner=0.5), 2.5 * math.sin(math.pi / 5)),
    "cross": (_cross, 4.0 * math.sin(2.0 * _CROSS_ANGLE) - 4.0 * math.sin(_CROSS_ANGLE) ** 2),
}

SHAPE_CLASSES: tuple[str, ...] = tuple(_SILHOUETTES)
"""Object classes of the scenes, in the order of their ids; background is not one of them."""


def make_shapes(
    n: int, seed: int, *, image_size: int = REFERENCE_SIZE, objects: tuple[int, int] = OBJECT_COUNT
) -> Dataset:
    """Draw `n` scenes of shapes among clutter, with their image labels and exact masks.

    Scene i of a seed does not depend on `n`, and scenes of different seeds are independent, so a training and a
    validation set only need different seeds.

    Args:
        n: Number of scenes, at least 1.
        seed: Which stream of scenes, 0 or greater.
        image_size: Side of the square scenes in pixels, at least 32. At 64, objects have the area of
            discs of 18 to 36 pixels; they scale with it.
        objects: Smallest and largest number of objects in a scene, inclusive; each pair has its own streams. A scene
            may have fewer where no room is left, but at least one.

    Returns:
        A dataset with `image_id` ("shapes-<seed>-<index>", for other numbers of objects than one to three
        "shapes-<fewest>-<most>-<seed>-<index>"), `image` (PNG, undecoded), `labels` (sorted ids of the
        classes present, indices into `SHAPE_CLASSES`) and `mask` (palette PNG: 0 background, class id + 1).

    Raises:
        ValueError: `n`, `seed` or `image_size` is too small, or `objects` is no range from 1 up.

    Example:
        >>> scenes = make_shapes(2, seed=0)
        >>> scenes["image_id"][1], scenes[1]["mask"].size
        ('shapes-0-1', (64, 64))
    """
    if n < 1:
        raise InputError(f"n must be at least 1 scene, got {n}; ask for one scene or more.")
    _check_seed(seed)
    features = row_features(SHAPE_CLASSES)
    stream = "-".join(map(str, (*_stream(objects), seed)))
    columns: dict[str, list[object]] = {name: [] for name in features}
    for index in range(n):
        scene = draw_scene(seed, index, image_size=image_size, objects=objects)
        columns["image_id"].append(f"shapes-{stream}-{index}")
        columns["image"].append({"path": None, "bytes": _png(scene.image)})
        columns["labels"].append(sorted({shape.class_id for shape in scene.objects}))
        columns["mask"].append({"path": None, "bytes": index_png(scene.mask)})
    return Dataset.from_dict(columns, features=features)


def draw_scene(
    seed: int, index: int, *, image_size: int = REFERENCE_SIZE, objects: tuple[int, int] = OBJECT_COUNT
) -> Scene:
    """Draw one scene; the result depends on the arguments alone.

    Args:
        seed: Which stream of scenes, 0 or greater.
        index: Which scene of the stream, 0 or greater.
        image_size: Side of the square scene in pixels, at least 32.
        objects: Smallest and largest number of objects, inclusive, as in `make_shapes`.

    Returns:
        The scene, with at least one object; each object keeps at least 60 % of its silhouette in sight.

    Raises:
        ValueError: `seed`, `index` or `image_size` is too small, or `objects` is no range from 1 up.
    """
    _check_seed(seed)
    if index < 0:
        raise InputError(f"index must be 0 or greater, got {index}; scenes of a seed are counted from 0.")
    if image_size < MIN_IMAGE_SIZE:
        raise InputError(
            f"image_size must be at least {MIN_IMAGE_SIZE} pixels, got {image_size}; "
            "smaller scenes cannot show their shapes."
        )
    if not 1 <= objects[0] <= objects[1]:
        raise InputError(f"objects must be (fewest, most) with 1 <= fewest <= most, got {objects}.")
    # A spawn key keeps streams apart for every pair (seed, index); a plain list [seed, index] does not.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, *_stream(objects))))
    shapes, mask = _place_objects(rng, image_size, objects)
    canvas, used_colors = _draw_background(rng, image_size)
    _draw_clutter(rng, canvas)
    for position, shape in enumerate(shapes):
        distances = np.full(len(used_colors), _OBJECT_TO_SURROUNDINGS, dtype=np.float32)
        distances[len(used_colors) - position :] = _OBJECT_TO_OBJECT
        color = _pick_color(rng, _LIGHT_COLOURS, np.stack(used_colors), distances)
        _draw_object(rng, canvas, shape, color)
        used_colors.append(color)
    canvas += np.float32(rng.uniform(*_NOISE_LEVEL)) * rng.standard_normal(size=canvas.shape, dtype=np.float32)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), mask, tuple(shapes))


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(f"seed must be 0 or greater, got {seed}; any other number gives other scenes.")


def _stream(objects: tuple[int, int]) -> tuple[int, ...]:
    """Key that separates the streams of scenes with another range of objects."""
    return () if objects == OBJECT_COUNT else objects


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=1)  # noise hardly compresses; time matters more
    return stream.getvalue()


# ---- What stands where.


def _place_objects(
    rng: np.random.Generator, image_size: int, count: tuple[int, int]
) -> tuple[list[DrawnShape], NDArray[np.uint8]]:
    """Choose classes, sizes and places; return the objects and the label map (H, W)."""
    scale = image_size / REFERENCE_SIZE
    mask = np.zeros((image_size, image_size), dtype=np.uint8)
    owner = np.full((image_size, image_size), -1, dtype=np.int8)
    objects: list[DrawnShape] = []
    full_areas: list[int] = []
    class_ids = rng.integers(len(SHAPE_CLASSES), size=rng.integers(*count, endpoint=True))
    if rng.uniform() < _ONE_CLASS_FRACTION:
        class_ids[:] = class_ids[0]
    for class_id in class_ids.tolist():
        for _ in range(_PLACEMENT_TRIES):
            diameter, rotation = scale * rng.uniform(*DIAMETER_RANGE_PX), rng.uniform(0.0, 2.0 * math.pi)
            shape = DrawnShape(class_id, (0.0, 0.0), diameter, rotation)
            # The whole circumscribed circle lies inside the image.
            row, column = rng.uniform(shape.radius - 0.5, image_size - 0.5 - shape.radius, size=2).tolist()
            shape = replace(shape, center=(row, column))
            if any(math.dist(shape.center, other.center) < 0.4 * (diameter + other.diameter) for other in objects):
                continue
            window, y, x = _window(shape.center, shape.radius + 1.0, image_size)
            inside = _signed_distance(shape, y, x) <= 0.0
            covered = np.bincount(owner[window][inside] + 1, minlength=len(objects) + 1)[1:]
            visible = np.bincount(owner.ravel() + 1, minlength=len(objects) + 1)[1:] - covered
            if np.any(visible < MIN_VISIBLE_FRACTION * np.asarray(full_areas)):
                continue
            owner[window][inside] = len(objects)
            mask[window][inside] = class_id + 1
            objects.append(shape)
            full_areas.append(int(inside.sum()))
            break
    return objects, mask


def _signed_distance(shape: DrawnShape, y: FloatArray, x: FloatArray) -> FloatArray:
    """Return distances in pixels to the outline of `shape`, negative inside, for offsets from its center."""
    cos, sin = math.cos(shape.rotation) / shape.radius, math.sin(shape.rotation) / shape.radius
    silhouette, _ = _SILHOUETTES[SHAPE_CLASSES[shape.class_id]]
    return np.float32(shape.radius) * silhouette(x * cos + y * sin, y * cos - x * sin)


def _window(
    center: tuple[float, float], reach: float, image_size: int
) -> tuple[tuple[slice, slice], FloatArray, FloatArray]:
    """Return the square window of half side `reach` around `center`, and the (row, column) offsets from it."""
    # Clamping both ends leaves an empty window, not a wrapped one, where a stroke has walked out of the image.
    rows, columns = (
        slice(
            min(max(math.floor(value - reach), 0), image_size), min(max(math.ceil(value + reach) + 1, 0), image_size)
        )
        for value in center
    )
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(center[0])
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(center[1])
    return (rows, columns), y, x


# ---- What it looks like: a dark and a light palette, one set of textures for all.


def _pick_color(
    rng: np.random.Generator, colors: tuple[float, float], others: FloatArray, min_distances: FloatArray
) -> FloatArray:
    """Return a random color (3,) with channels in `colors`, at its distances from `others` (k, 3).

    Distances are Euclidean in RGB; of 64 tries, the first that keeps all of them, else the closest.
    """
    candidates = rng.uniform(*colors, size=(64, 3)).astype(np.float32)
    room = (np.linalg.norm(candidates[:, None] - others[None], axis=2) / min_distances).min(axis=1)
    fitting = np.flatnonzero(room >= 1.0)
    choice: FloatArray = candidates[fitting[0] if len(fitting) else room.argmax()]
    return choice


def _texture(rng: np.random.Generator, y: FloatArray, x: FloatArray, scale: float) -> FloatArray:
    """Return one of five textures (h, w) in about [-1, 1]: plain, grain, stripes, checks or dots, at any angle."""
    kind = int(rng.integers(5))
    angle = rng.uniform(0.0, math.pi)
    frequency = 2.0 * math.pi / (scale * rng.uniform(4.0, 8.0))
    if kind == 0:
        return np.zeros((y.shape[0], x.shape[1]), dtype=np.float32)
    if kind == 1:
        return np.asarray(rng.uniform(-1.0, 1.0, size=(y.shape[0], x.shape[1])), dtype=np.float32)
    along = np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle)))
    if kind == 2:
        wave = along
    else:
        across = np.sin(frequency * (y * math.cos(angle) - x * math.sin(angle)))
        wave = along * across if kind == 3 else along + across - 0.8
    return np.asarray(np.clip(3.0 * wave, -1.0, 1.0), dtype=np.float32)


def _paint(rng: np.random.Generator, y: FloatArray, x: FloatArray, color: FloatArray, scale: float) -> FloatArray:
    """Return `color` (3,) with a random texture for the places (h, 1), (1, w): (h, w, 3)."""
    tint = (rng.uniform(*_TEXTURE_AMPLITUDE) * rng.uniform(0.4, 1.0, size=3)).astype(np.float32)
    return color + _texture(rng, y, x, scale)[:, :, None] * tint


def _draw_background(rng: np.random.Generator, image_size: int) -> tuple[FloatArray, list[FloatArray]]:
    """Return a shaded, textured canvas (H, W, 3) with up to two soft patches, and the colors used."""
    scale = image_size / REFERENCE_SIZE
    y = np.arange(image_size, dtype=np.float32)[:, None]
    x = y.T
    colors = [rng.uniform(*_DARK_COLOURS, size=3).astype(np.float32)]
    canvas = _paint(rng, y, x, colors[0], scale)
    for _ in range(int(rng.integers(*_PATCH_COUNT, endpoint=True))):
        field = _smooth_field(rng, image_size)
        level = np.quantile(field[::4, ::4], rng.uniform(0.65, 0.9))
        # Patches end softly, over a few pixels, where objects end sharply.
        alpha = np.clip((field - level) * 8.0 + 0.5, 0.0, 1.0)[:, :, None]
        distances = np.full(len(colors), _PATCH_TO_BACKGROUND, dtype=np.float32)
        color = _pick_color(rng, _DARK_COLOURS, np.stack(colors), distances)
        canvas += alpha * (_paint(rng, y, x, color, scale) - canvas)
        colors.append(color)
    shade = _smooth_field(rng, image_size)
    canvas += (shade - shade.mean())[:, :, None] * rng.uniform(10.0, 30.0, size=3).astype(np.float32)
    return canvas, colors


def _smooth_field(rng: np.random.Generator, image_size: int) -> FloatArray:
    """Return a random field (H, W) in [0, 1] that varies over about a third of the image."""
    knots = rng.uniform(size=(4, 4)).astype(np.float32)
    place = np.linspace(0.0, 3.0, image_size, dtype=np.float32)
    # Cosine interpolation between neighboring knots, as one matrix for rows and columns.
    gap = np.clip(np.abs(place[:, None] - np.arange(4, dtype=np.float32)), 0.0, 1.0)
    weights = 0.5 * (1.0 + np.cos(np.float32(math.pi) * gap))
    return np.asarray(weights @ knots @ weights.T, dtype=np.float32)


def _draw_clutter(rng: np.random.Generator, canvas: FloatArray) -> None:
    """Draw dots, lines, thin curves and small blobs onto `canvas` (H, W, 3) in place, as chains of strokes."""
    image_size = canvas.shape[0]
    scale = image_size / REFERENCE_SIZE
    for kind in rng.integers(4, size=rng.integers(*_CLUTTER_COUNT, endpoint=True)).tolist():
        # kind -> number of strokes, stroke length, half width, greatest turn between strokes
        strokes, length, half_width, turn = (
            (1, 0.0, rng.uniform(0.5, 1.6), 0.0),  # dot or speckle
            (1, rng.uniform(5.0, 14.0), rng.uniform(0.4, 0.9), 0.0),  # line
            (4, rng.uniform(2.5, 5.0), rng.uniform(0.4, 0.9), 0.9),  # thin curve
            (3, rng.uniform(1.5, 3.0), rng.uniform(1.5, 2.6), 2.0),  # blob
        )[kind]
        color = rng.uniform(*_LIGHT_COLOURS, size=3).astype(np.float32)
        heading = rng.uniform(0.0, 2.0 * math.pi)
        bend = rng.uniform(-turn, turn)
        row, column = rng.uniform(0.0, image_size, size=2).tolist()
        for _ in range(strokes):
            step = (scale * length * math.sin(heading), scale * length * math.cos(heading))
            _draw_stroke(canvas, (row, column), step, scale * half_width, color)
            row, column, heading = row + step[0], column + step[1], heading + bend


def _draw_stroke(
    canvas: FloatArray, start: tuple[float, float], step: tuple[float, float], half_width: float, color: FloatArray
) -> None:
    """Draw a round-ended stroke from `start` to `start + step` (row, column) onto `canvas` in place."""
    middle = (start[0] + step[0] / 2.0, start[1] + step[1] / 2.0)
    window, y, x = _window(middle, math.hypot(*step) / 2.0 + half_width + 1.0, canvas.shape[0])
    squared_length = step[0] ** 2 + step[1] ** 2
    along = np.clip((y * step[0] + x * step[1]) / max(squared_length, 1e-6), -0.5, 0.5)  # a dot has no length
    distance = np.hypot(y - along * step[0], x - along * step[1])
    alpha = np.clip(half_width + 0.5 - distance, 0.0, 1.0)[:, :, None]
    canvas[window] += alpha * (color - canvas[window])


def _draw_object(rng: np.random.Generator, canvas: FloatArray, shape: DrawnShape, color: FloatArray) -> None:
    """Draw `shape` onto `canvas` (H, W, 3) in place, with its outline antialiased over one pixel."""
    window, y, x = _window(shape.center, shape.radius + 1.0, canvas.shape[0])
    alpha = np.clip(0.5 - _signed_distance(shape, y, x), 0.0, 1.0)[:, :, None]
    paint = _paint(rng, y, x, color, canvas.shape[0] / REFERENCE_SIZE)
    canvas[window] += alpha * (paint - canvas[window])
