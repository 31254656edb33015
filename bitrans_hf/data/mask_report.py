"""What is wrong with the masks of a folder, one by one and all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..hub.labels import BACKGROUND, IGNORE_INDEX
from .common import DataError, ImageFacts, look_at_image
from .folder import FolderContent, FolderQuery, look_through, shown_names
from .masks import open_mask_with_palette
from .tables import Caller, Problem, option

NUM_SAMPLED = 100
"""Number of masks opened before a run; `check_folder` opens all."""

_TURNED_TO_THE_SIDE = frozenset({5, 6, 7, 8})
_Color = tuple[int, int, int]


@dataclass(frozen=True)
class MaskFinding:
    """What one mask shows, and what is wrong with it.

    Attributes:
        name: Of its image.
        shows: Whether a pixel belongs to a class; None where the mask cannot be read.
        ignores: Whether a pixel is ignored (255).
        labeled: Whether the labels of its image name a class.
        doubtful_exif: The image's EXIF tag rotates it, and its size does not tell which view the mask was drawn on.
        colors: Label id -> color in the palette, of a palette image whose indices are the label ids.
        problems: What is wrong with this mask.
    """

    name: str
    shows: bool | None = None
    ignores: bool = False
    labeled: bool = False
    doubtful_exif: bool = False
    colors: Mapping[int, _Color] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def look_at_mask(found: FolderContent, position: int, image: ImageFacts, caller: Caller) -> MaskFinding | None:
    """Open the mask of a row; None where it has none.

    Args:
        found: The folder.
        position: Of the row.
        image: Of the row.
        caller: Whose options the advice names.
    """
    path, name = found.masks[position], found.rows[position].file_name
    if path is None:
        return None
    size, orientation = image.size, image.orientation
    try:
        mask, palette = open_mask_with_palette(
            path,
            num_classes=len(found.classes),
            values=found.mask_values,
            values_option=option(caller, "mask_values", "{}"),
        )
    except DataError as error:
        return MaskFinding(name, problems=(Problem(f"mask {error.kind}", name, str(error)),))
    if mask.shape != size:
        upright = orientation in _TURNED_TO_THE_SIDE and mask.shape == size[::-1]
        advice = (
            f"its EXIF tag turns it upright (orientation {orientation}), which the mask fits: draw masks on the "
            "stored pixels, or save the image upright without the tag."
            if upright
            else "save the mask at the size of the stored image, without EXIF rotation."
        )
        message = (
            f"mask {path} is {mask.shape[0]}x{mask.shape[1]} (height x width) and its image {size[0]}x{size[1]}; "
            f"{advice}"
        )
        return MaskFinding(name, problems=(Problem("mask size", name, message),))
    ids = np.bincount(mask.ravel(), minlength=256).nonzero()[0].tolist()  # np.unique takes several times as long
    shown = {found.classes[label - 1] for label in ids if label not in (BACKGROUND, IGNORE_INDEX)}
    problems = []
    if unnamed := sorted(shown - set(found.names[position])):
        message = f"mask {path} shows {', '.join(unnamed)}, which the labels of {name} do not name; fix one of them."
        problems.append(Problem("mask labels", name, message))
    doubtful = orientation > 1 and (orientation not in _TURNED_TO_THE_SIDE or size[0] == size[1])
    colors = _palette_colors(palette, ids) if found.mask_values is None else {}
    labeled = bool(found.names[position])
    return MaskFinding(name, bool(shown), IGNORE_INDEX in ids, labeled, doubtful, colors, tuple(problems))


def all_together(
    found: FolderContent, findings: Sequence[MaskFinding], *, values_given: bool, caller: Caller = "python"
) -> tuple[list[Problem], list[str]]:
    """Return the problems and notes that only show across all masks.

    Args:
        found: The folder.
        findings: Of the masks that were opened.
        values_given: The caller said what pixel values mean, so masks without objects are accepted.
        caller: Whose options the advice names.
    """
    problems, notes = [], []
    readable = [finding for finding in findings if finding.shows is not None]
    empty = [finding for finding in readable if not finding.shows]
    if empty and len(empty) == len(readable) and not values_given:
        problems.append(Problem("mask values", empty[0].name, no_object(empty, len(found.classes), caller)))
    elif not values_given:
        problems += [
            Problem("mask values", finding.name, _ignored_object(finding, len(found.classes), caller))
            for finding in empty
            if finding.ignores and finding.labeled
        ]
    if len(wrong := [each for each in readable if any(one.kind == "mask labels" for one in each.problems)]) > 1:
        notes.append(
            f"{len(wrong)} of {len(readable)} masks show classes that the labels do not name. If the ids in masks "
            "count the classes in another order, list the classes in that order in classes.txt; here 1 is "
            f"{found.classes[0]!r}."
        )
    turned = [finding.name for finding in readable if finding.doubtful_exif]
    if turned:
        notes.append(
            f"{len(turned)} images with a mask are turned or mirrored by their EXIF tag, and sizes do not tell on "
            f"which view the mask was drawn: {shown_names(turned, 3)}. Masks belong to the stored pixels; if yours "
            "were drawn on the upright view, save these images upright without the tag."
        )
    first_of: dict[int, tuple[_Color, str]] = {}
    for finding in readable:
        for label, color in finding.colors.items():
            earlier, name = first_of.setdefault(label, (color, finding.name))
            if earlier != color:
                one, other = ("/".join(map(str, each)) for each in (earlier, color))
                notes.append(
                    f"masks have different palettes: the label id {label} has the color {one} in the mask of {name} "
                    f"and {other} in that of {finding.name}. Palette indices are read as label ids; if colors are "
                    f"meant, give {option(caller, 'mask_values', f'0/0/0=0,{one}=1')} and so on."
                )
                return problems, notes
    return problems, notes


def no_object(masks: Sequence[MaskFinding], num_classes: int, caller: Caller) -> str:
    """Say that no mask shows an object, and the likely reason."""
    binary = option(caller, "mask_values", "binary" if num_classes == 1 else "0=0,255=1")
    ids = option(caller, "mask_values", "ids")
    if any(finding.ignores for finding in masks):
        return (
            f"all {len(masks)} masks hold only 0 (background) and 255 (ignored), expected pixels of a class; if 255 "
            f"is the object, give {binary}; if it is not, give {ids}."
        )
    return (
        f"all {len(masks)} masks are background (0) in every pixel, expected pixels of a class; save masks whose "
        f"pixels are label ids (1 for the first class), or give {ids} if no image shows an object."
    )


def _ignored_object(mask: MaskFinding, num_classes: int, caller: Caller) -> str:
    """Say that a mask ignores what its labels name, where other masks show objects."""
    meant = "save it with label ids"
    if num_classes == 1:
        meant = f"give {option(caller, 'mask_values', '0=0,1=1,255=1')}"
    ids = option(caller, "mask_values", "ids")
    return (
        f"the mask of {mask.name} holds only 0 (background) and 255 (ignored), expected pixels of a class, as its "
        f"labels name one; if 255 is an object, {meant}; if it is not, give {ids}."
    )


def check_masks(
    root: str | Path,
    table: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    separator: str | None = None,
    mask_values: str | None = None,
    caller: Caller = "python",
    num_masks: int = NUM_SAMPLED,
) -> tuple[int, list[str]]:
    """Check some masks of a folder, spread evenly over its splits, before a run depends on them.

    Args:
        root: As for `load_folder`, like all that is not named here.
        table: See there.
        classes: See there.
        separator: See there.
        mask_values: See there.
        caller: See there.
        num_masks: Largest number of masks to open.

    Returns:
        How many were opened, and notes.

    Raises:
        DataError: a mask cannot be used for scores.
    """
    query = FolderQuery(Path(root), table, None, None, None, classes, separator, True, caller, mask_values)
    found = look_through(query)
    positions = [position for position, mask in enumerate(found.masks) if mask is not None]
    spread = np.unique(np.linspace(0, len(positions) - 1, min(num_masks, len(positions))).astype(int))

    def look(position: int) -> MaskFinding | None:
        try:
            image = look_at_image(found.folder / found.rows[position].file_name, decode=False)
            return look_at_mask(found, position, image, caller)
        except DataError:
            return None  # of the image, which has its own report

    with ThreadPoolExecutor() as pool:
        seen = [finding for finding in pool.map(look, [positions[index] for index in spread]) if finding is not None]
    problems = [problem for finding in seen for problem in finding.problems if problem.kind != "mask labels"]
    together, notes = all_together(found, seen, values_given=mask_values is not None, caller=caller)
    named = [problem for problem in found.problems if problem.kind.startswith("mask ")]
    for problem in [*named, *problems, *together]:
        raise DataError(problem.message)
    return len(seen), [*found.mask_notes, *notes]


def _palette_colors(colors: Sequence[int], ids: Sequence[int]) -> dict[int, _Color]:
    """Return the palette's colors of label ids, without background and 255; nothing for a mask without a palette."""
    return {
        label: (colors[3 * label], colors[3 * label + 1], colors[3 * label + 2])
        for label in ids
        if label not in (BACKGROUND, IGNORE_INDEX) and 3 * label + 2 < len(colors)
    }
