"""Outlines of objects in COCO's forms, polygons or run lengths: checked number by number, then painted.

pycocotools paints the polygons. It checks nothing and reads past its input if numbers are inconsistent, so everything
is checked first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import MissingExtraError

Region: TypeAlias = NDArray[np.bool_]
"""(H, W), True on the pixels of an object."""

_FAR = 100_000
"""Largest absolute coordinate of a corner in pixels: more is an error, and pycocotools' memory grows with it."""

_MOST_CHARACTERS = 7
"""Most characters of one compressed run length: 35 bits, more than any image needs."""


class OutlineError(Exception):
    """An outline that cannot be read; the message says what is wrong, but not where."""


@dataclass
class Outline:
    """Where an object is: the union of its parts.

    Attributes:
        polygons: (N, 2) corners x, y of each, N >= 3, finite.
        runs: (height, width) and lengths of the alternating runs, column by column, of each; they sum to height x
            width.
    """

    polygons: list[NDArray[np.float64]] = field(default_factory=list)
    runs: list[tuple[tuple[int, int], NDArray[np.int64]]] = field(default_factory=list)

    def check_size(self, height: int, width: int) -> None:
        """Raise OutlineError if run lengths are for another size than the image's."""
        for size, _ in self.runs:
            if size != (height, width):
                raise OutlineError(
                    f"its segmentation has run lengths of size {list(size)}, its image is {[height, width]} (height, "
                    "width)"
                )

    def paint(self, height: int, width: int) -> Region:
        """Return the pixels (height, width) of the object.

        Raises:
            OutlineError: the run lengths are for another size.
        """
        self.check_size(height, width)
        region = np.zeros((height, width), dtype=bool)
        for _, lengths in self.runs:
            inside = np.arange(len(lengths)) % 2 == 1
            region |= np.repeat(inside, lengths).reshape(width, height).T
        if self.polygons:
            region |= _paint_polygons(self.polygons, height, width)
        return region


def read_outline(segmentation: Any) -> Outline | None:
    """Check and read a `segmentation`; None if there is none, as for objects that have only a box.

    Besides the forms of COCO's own files (polygons as flat lists of numbers, run lengths as numbers or as compressed
    text), one flat polygon, corners as pairs and numbers as text are accepted. Parts with fewer than three corners
    enclose nothing and are skipped if there are others.

    Raises:
        OutlineError: it has another form, or is inconsistent.
    """
    if _is_absent(segmentation):
        return None
    outline = Outline()
    if isinstance(segmentation, Mapping):
        outline.runs.append(_read_runs(segmentation))
        return outline
    if not isinstance(segmentation, list):
        raise OutlineError(f"its segmentation is {_shown(segmentation)}, expected polygons or run lengths")
    parts = segmentation
    if all(isinstance(part, int | float | str) for part in parts):
        parts = [parts]  # one polygon without the list around it
    elif len(parts) > 2 and all(_is_pair(part) for part in parts):
        parts = [parts]  # one polygon, its corners as pairs
    thin: list[int] = []
    for part in parts:
        if isinstance(part, Mapping):
            outline.runs.append(_read_runs(part))
            continue
        if not isinstance(part, list):
            raise OutlineError(f"its segmentation holds {_shown(part)}, expected polygons or run lengths")
        if part and all(_is_pair(corner) for corner in part):
            part = [number for corner in part for number in corner]
        numbers = _numbers(part, "a polygon")
        if len(numbers) % 2:
            raise OutlineError(
                f"its segmentation has a polygon of {len(numbers)} numbers, expected an x and a y for each corner"
            )
        if len(numbers) and np.abs(numbers).max() > _FAR:
            raise OutlineError(
                f"its segmentation has a corner at {numbers[np.abs(numbers).argmax()]:g}, expected pixels of the image"
            )
        if len(numbers) < 6:
            thin.append(len(numbers))
        else:
            outline.polygons.append(numbers.reshape(-1, 2))
    if not outline.polygons and not outline.runs:
        raise OutlineError(
            f"its segmentation has a polygon of {thin[0]} numbers, expected 6 or more for three corners or more"
        )
    return outline


def _is_absent(segmentation: Any) -> bool:
    if isinstance(segmentation, float):
        return math.isnan(segmentation)  # what pandas writes for an empty cell
    if isinstance(segmentation, list):
        return all(_is_absent(part) for part in segmentation)
    return segmentation is None or segmentation == {} or (isinstance(segmentation, str) and not segmentation.strip())


def _is_pair(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and all(isinstance(number, int | float | str) for number in part)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _numbers(values: Sequence[Any], what: str) -> NDArray[np.float64]:
    """Return finite numbers, also those written as text."""
    numbers = np.empty(len(values))
    for place, value in enumerate(values):
        try:
            if not isinstance(value, int | float | str) or isinstance(value, bool):
                raise ValueError
            numbers[place] = float(value)
            if not math.isfinite(numbers[place]):
                raise ValueError
        except (ValueError, OverflowError) as error:
            raise OutlineError(f"its segmentation has {what} that holds {_shown(value)}, expected numbers") from error
    return numbers


# ---- Run lengths.


def _read_runs(part: Mapping[str, Any]) -> tuple[tuple[int, int], NDArray[np.int64]]:
    """Return (height, width) and run lengths that sum to it."""
    counts, size = part.get("counts"), part.get("size")
    if not isinstance(size, list) or len(size) != 2:
        raise OutlineError(f"its segmentation has run lengths of size {_shown(size)}, expected [height, width]")
    height, width = _whole(_numbers(size, "a size"), "a size").tolist()
    if height < 1 or width < 1:
        raise OutlineError(
            f"its segmentation has run lengths of size {_shown(size)}, expected [height, width] above 0"
        )
    if isinstance(counts, str | bytes):
        lengths = _decompressed(counts.encode() if isinstance(counts, str) else counts)
    elif isinstance(counts, list):
        lengths = _whole(_numbers(counts, "run lengths"), "run lengths")
    else:
        raise OutlineError(
            f"its segmentation has the run lengths {_shown(counts)}, expected a list of numbers or compressed text"
        )
    if (lengths < 0).any():
        raise OutlineError(f"its segmentation has the run length {lengths.min()}, expected none below 0")
    total = sum(lengths.tolist())  # Python's numbers do not wrap around
    if total != height * width:
        raise OutlineError(
            f"its segmentation has run lengths that sum to {total}, expected {height * width} = {height} x {width} "
            "(height x width)"
        )
    return (height, width), lengths


def _whole(numbers: NDArray[np.float64], what: str) -> NDArray[np.int64]:
    wrong = numbers[(numbers != np.floor(numbers)) | (np.abs(numbers) > 2**53)]
    if wrong.size:
        raise OutlineError(f"its segmentation has {what} that holds {wrong[0]:g}, expected whole numbers")
    return numbers.astype(np.int64)


def _decompressed(text: bytes) -> NDArray[np.int64]:
    """Return the run lengths of COCO's compressed text.

    Each character holds five bits, lowest first, and a flag for more to follow; from the fourth number on, each is the
    difference from the one two places earlier.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise OutlineError(
            f"its segmentation has the run lengths {_shown(text)}, expected a list of numbers or compressed text"
        )
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > _MOST_CHARACTERS:
        raise OutlineError(
            f"its segmentation has the run lengths {_shown(text)}, expected a list of numbers or compressed text"
        )
    places = np.arange(len(codes)) - np.repeat(starts, sizes)
    lengths = np.add.reduceat((codes & 31) << (5 * places), starts)
    lengths -= np.where(codes[ends] & 16, np.int64(1) << (5 * sizes), 0)  # the sign
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return lengths


# ---- Polygons.


def _paint_polygons(polygons: Sequence[NDArray[np.float64]], height: int, width: int) -> Region:
    """Return the pixels (height, width) inside any of the polygons, by COCO's own rule."""
    coco = polygon_painter()
    runs = coco.merge(coco.frPyObjects([corners.ravel().tolist() for corners in polygons], height, width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 asks NumPy 2 in NumPy 1's way
        region: Region = coco.decode(runs).astype(bool)
    return region


def polygon_painter() -> Any:
    """Return the module that paints polygons.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pycocotools.mask  # here: an extra, needed for masks alone
    except ImportError as error:
        raise MissingExtraError(
            "COCO's masks need pycocotools; install it with: pip install 'bitrans-hf[coco]'."
        ) from error
    return pycocotools.mask
