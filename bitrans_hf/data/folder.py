"""Your own images: a folder of images, labeled by a table or by folders named after classes."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    DataError,
    check_classes,
    chosen_classes,
    collector_paused,
    folded_name,
    inner_path,
    is_background,
    read_class_file,
    read_text,
    suggest,
    tidy_name,
    without_suffix,
)
from .image_files import ImageFinder, ImageListing, list_images
from .mask_names import MaskMatch, mask_files, match_masks, other_files
from .mask_values import MaskValues
from .masks import masks_in_order
from .tables import OWN_COLUMNS, Caller, Problem, Row, RowLabels, labels_of_rows, option, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

TABLE_NAMES = tuple(
    f"{stem}{suffix}" for stem in ("labels", "metadata") for suffix in (".csv", ".tsv", ".jsonl", ".parquet")
)
"""Names under which a table is found automatically: in the folder, its images folder, or each of its subfolders."""

SPLIT_FOLDERS = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation", "holdout"}
    | {"unlabeled"}
)
"""Without a table, folders with these names contain class folders and are not classes; see `_is_split_name`."""

_WORDS_BESIDE_SPLITS = frozenset({"set", "data", "dataset", "split", "part", "fold", "images", "image", "imgs", "img"})

_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})
"""Folders with these names between split and class folders, or inside them, carry no meaning."""

_MASK_FOLDERS = frozenset(
    {"mask", "annotation", "annotations", "labels", "gt", "groundtruth", "segmentation", "segmentations"}
    | {"segmentationclass", "segmentationmasks", "maskimages"}
)
"""Other common names of the folder `masks`, without spaces and punctuation."""

_MASK_ENDING = re.compile(
    r"(?<=.)[_\-. ](?:mask|masks|seg|segmentation|gt|groundtruth|annotation|label|labels)(?:[_\-. ]?\d+)?$",
    re.IGNORECASE,
)

_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})
_OTHER_TABLES = frozenset({".xlsx", ".xls", ".ods", ".json", ".txt", ".xml"})

_NOTHING = frozenset({"none", "nothing", "no", "empty", "negative", "n/a", "na", "unlabeled", "unknown"})
"""Names that may mean that an image shows none of the classes."""

_DENIAL = re.compile(r"(?:no|not|non|without)[\W_]+(.+)")


def load_folder(
    root: str | Path,
    table: str | Path | None = None,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    masks: str | Path | bool | None = None,
    classes: Sequence[str] | None = None,
    separator: str | None = None,
    allow_empty: bool = False,
    caller: Caller = "python",
    mask_values: str | None = None,
) -> Dataset:
    """Load a folder of images with image labels from a table, or from the names of the folders they are in.

    The table has a column `file_name` and either a column `labels` or one 0/1 column for each class. A cell of
    `labels` is text with a separator; a list of class names, or of class ids where the classes are given; the text of
    such a list as Python, numpy or JSON write it; or an object of a label tool. Names that differ only in whitespace
    or Unicode form are the same name; other names that look alike are refused, unless a list of classes says which
    spelling counts. Background is not a class. A file name may lack its suffix. Columns `split`, `image_id` and
    `mask_file_name` are optional; a `metadata.jsonl` for imagefolder is read as it is. Without a table, images in
    `<class>/` or `<split>/<class>/` have that class. Images are not opened here. Images without a row are counted in a
    log message and left out. `check_folder` lists all that is wrong with a folder.

    Args:
        root: The folder.
        table: CSV (comma, semicolon or tab), JSONL or Parquet; default: `labels` or `metadata` with such a suffix, in
            `root`, in the images folder, or one in each subfolder, whose name is then the split.
        split: Keep only rows of this split; None keeps all.
        images: Folder of the images, relative to `root`; default: `images` if it exists, else `root` itself. Names
            that are not found are looked for beside the table, as imagefolder does; names from `metadata` are looked
            for there first.
        masks: Folder of masks, relative to `root`, with the same names as the images but ending in `.png`, label ids
            as pixels (0 background, 1 for the first class, 255 ignored); default: `masks` if it exists. If all names
            differ from those of the images in the same way, they are matched too, and the log says so: see
            `match_masks`. A column `mask_file_name` takes precedence. False: no masks.
        classes: Class names in the order of their ids; default: `classes.txt` in `root`, else all names of the table
            in alphabetical order. With a `classes.txt` this may be a subset of it in any order: labels of other
            classes are dropped, and masks, which use the ids of the file, are renumbered.
        separator: Separator between names in `labels`; default: detected among `;`, `|`, `,` and line breaks, and
            spaces too if the classes are given.
        allow_empty: Read an empty cell of `labels` as "none of the classes" instead of refusing it. Rows that say so
            themselves (zeros in all columns, an empty list, background alone) need no permission.
        caller: Whose options the advice in messages names.
        mask_values: What the pixel values of masks mean, where they are not label ids: "binary", "voc_colors" or a
            list such as "0=0,128=255,255=1"; see `mask_values.FORMS`. All masks are then read here.

    Returns:
        A dataset in the order of the table: `image_id` (the column, else the file name without suffix), `image`
        (undecoded), `labels` (ascending class ids), `mask` (None where there is no file).

    Raises:
        DataError: something is missing, ambiguous or does not fit; the message names the row and the file.
    """
    from .rows import build_dataset  # here: `check_folder`, which looks through folders too, starts without `datasets`

    query = FolderQuery(Path(root), table, split, images, masks, classes, separator, allow_empty, caller, mask_values)
    found = look_through(query)
    if found.problems:
        first = found.problems[0]
        number = sum(problem.kind == first.kind for problem in found.problems)
        lister = option(caller, "every problem")
        more = f" ({number} such problems in {len(found.rows)} rows; {lister}.)" if number > 1 else ""
        raise DataError(first.message + more)
    for note in found.notes:
        logger.warning("%s: %s", root, note)
    if found.unlisted:
        shown = shown_names(found.unlisted, 3)
        lack = f"have no row in {found.source}" if found.has_table else "lie in no class folder"
        logger.warning("%d images in %s %s and are left out: %s", len(found.unlisted), root, lack, shown)
    for note in found.mask_notes:
        logger.warning("%s", note)
    mask_paths = [found.masks[position] for position in found.kept]
    if any(mask_paths) and None in mask_paths:
        first_id = found.image_ids[found.kept[mask_paths.index(None)]]
        logger.warning("%d of %d images have no mask, first %s", mask_paths.count(None), len(mask_paths), first_id)
    cells: Sequence[Path | bytes | None] = mask_paths
    if any(mask_paths):  # never for `bitrans masks`, which has no option for their values
        values_option = option(caller, "mask_values", "{}")
        cells = masks_in_order(mask_paths, found.classes, found.chosen, found.mask_values, values_option)
    ids = {name: class_id for class_id, name in enumerate(found.chosen)}
    return build_dataset(
        [found.image_ids[position] for position in found.kept],
        [f"{found.folder}/{found.rows[position].file_name}" for position in found.kept],
        [[ids[name] for name in found.names[position] if name in ids] for position in found.kept],
        cells,
        found.chosen,
    )


# ---- Looking through a folder.


@dataclass
class FolderContent:
    """The content of a folder, and everything that is wrong with single rows; each list has one entry per row.

    Attributes:
        root: The folder.
        source: Where the labels come from, in words.
        rows: Of the tables.
        problems: What is wrong with single rows.
        classes: All classes, in the order of the ids in masks.
        chosen: Classes to load, in the order of their ids.
        image_ids: Ids.
        folder: The folder that the rows' file names are relative to.
        has_table: Whether the rows are those of tables; otherwise folders name the classes.
        masks: Paths of the masks that exist.
        mask_values: What the pixel values of masks mean; None where they are label ids.
        mask_notes: Assumptions made about masks.
        unmatched_masks: Masks without a row, as paths within the folder of masks.
        names: Class names.
        kept: Positions of the rows of the split that was asked for.
        unlisted: Images without a row.
        unused_columns: Columns of the tables that are not used.
        notes: Findings that are not problems, in sentences.
    """

    root: Path
    source: str
    rows: list[Row]
    problems: list[Problem]
    folder: Path
    has_table: bool = True
    classes: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    masks: list[Path | None] = field(default_factory=list)
    mask_values: MaskValues | None = None
    mask_notes: list[str] = field(default_factory=list)
    unmatched_masks: list[str] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FolderQuery:
    """What the caller says about a folder: the arguments of `load_folder`."""

    root: Path
    table: str | Path | None = None
    split: str | None = None
    images: str | Path | None = None
    masks: str | Path | bool | None = None
    classes: Sequence[str] | None = None
    separator: str | None = None
    allow_empty: bool = False
    caller: Caller = "python"
    mask_values: str | None = None

    @property
    def class_file(self) -> Path | None:
        """The folder's own list of classes, if it has one."""
        path = self.root / "classes.txt"
        return path if path.is_file() else None

    def known_classes(self) -> list[str] | None:
        """Return the classes in the order of their ids, from a file or the caller; None if neither gives them."""
        if self.class_file is not None:
            return read_class_file(self.class_file)
        return None if self.classes is None else check_classes(self.classes, "classes")


@collector_paused()
def look_through(query: FolderQuery) -> FolderContent:
    """Find rows, classes, images and masks, for `load_folder` and `check_folder`.

    Raises:
        DataError: something is wrong with the folder, the table or the arguments as a whole.
    """
    root, class_file = query.root, query.class_file
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds the images and the table of labels.")
    if query.separator == "":
        raise DataError("separator is empty, expected what stands between class names, such as a semicolon.")
    mask_folder = _mask_folder(root, query.masks)
    known = query.known_classes()
    content, listing = _rows_and_images(query, mask_folder)
    rows, problems = content.rows, content.problems
    labels = labels_of_rows(rows, known, query.separator, content.source, problems, query.caller)
    content.names = labels.names
    content.notes += labels.notes
    if class_file is not None and is_background(_first_line(class_file)):
        content.notes.append(
            f"{class_file} begins with background, which is no class; it has the label id 0 in masks."
        )
        _refuse_ids_with_background(rows, class_file)
    content.classes = _classes_of_rows(content, labels) if known is None else known
    classes_name = "classes" if class_file is None else str(class_file)
    content.chosen = chosen_classes(query.classes, content.classes, classes_name)
    content.kept = _rows_of_split(rows, query.split, content.source, query.caller)
    used = (*OWN_COLUMNS, *labels.columns)
    columns = dict.fromkeys(key for row in rows for key in row.cells)
    content.unused_columns = [name for name in columns if name not in used]
    _find_ids(content, listing)
    content.mask_values = MaskValues.parse(query.mask_values)
    if content.mask_values is not None:
        content.mask_values.require_classes(len(content.classes))
    _find_masks(content, mask_folder, query.masks is not False)
    _check_labels(content, labels, class_file or "classes", query.allow_empty, query.caller)
    return content


def _rows_and_images(query: FolderQuery, mask_folder: Path | None) -> tuple[FolderContent, ImageListing]:
    """Return the rows of the tables, or of the class folders, with their images, and all images of the folder.

    Raises:
        DataError: there are no rows.
    """
    root = query.root
    images_folder = _images_folder(root, query.images)
    problems: list[Problem] = []
    notes: list[str] = []
    tables = _find_tables(root, images_folder, query.table, query.caller)
    # Masks are no images, wanted or not.
    other_masks = _other_mask_folders(root)
    excluded = (mask_folder or root / "masks", _folder_called(root, "masks"), *other_masks)
    if other_masks and mask_folder is None and query.masks is None:
        notes.append(f"there is no folder {root / 'masks'}; if {other_masks[0]} holds the masks, rename it to masks.")
    if tables:
        where = ", ".join(str(path) for path in tables)
        rows = _rows_of_tables(tables, problems)
        folder = _folder_of_names(rows, tables, images_folder, root)
        listing = list_images(folder, excluded=excluded)
    else:
        where, folder = f"the names of the folders in {images_folder}", images_folder
        listing = list_images(folder, excluded=excluded)
        if beside := _masks_beside_images(listing.names):
            listing.names = [name for name in listing.names if name not in beside]
            notes.append(
                f"{len(beside):,} images are named like masks of other images and are left out: "
                f"{shown_names(sorted(beside), 3)}; to score with them, move them to a folder called masks."
            )
        rows = _rows_of_class_folders(listing, query.split, notes)
    notes += listing.left_out()
    if not rows:
        nothing = f"{where} has no rows, expected one for each image with file_name and labels."
        if not tables:
            nothing = (
                f"{root} holds no table of labels, looked for {', '.join(TABLE_NAMES)}, and no folders of images "
                f"named by class; {_advice_without_table(root, query.caller)}" + (f" ({notes[0]})" if notes else "")
            )
        raise DataError(problems[0].message if problems else nothing)
    rows = _rows_with_found_images(rows, folder, ImageFinder(listing.names), problems)
    return FolderContent(root, where, rows, problems, folder, has_table=bool(tables), notes=notes), listing


def _classes_of_rows(content: FolderContent, labels: RowLabels) -> list[str]:
    """Return the classes named by the rows, for use when no list is given.

    Raises:
        DataError: no row names a class.
    """
    named = {name for names in content.names for name in names}
    if content.problems and not named:
        raise DataError(content.problems[0].message)
    if not named:
        raise DataError(
            f"no row of {content.source} names a class, expected one name or more; background does not count."
        )
    return sorted(labels.columns or named)


def shown_names(names: Sequence[str], count: int) -> str:
    """Return the first `count` names, followed by dots if there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _images_folder(root: Path, images: str | Path | None) -> Path:
    if images is None:
        return _folder_called(root, "images") or root
    if not (root / images).is_dir():
        raise DataError(f"images folder {root / images} is not there; give images= relative to {root}.")
    return root / images


def _mask_folder(root: Path, masks: str | Path | bool | None) -> Path | None:
    if masks is False:
        return None
    folder = root / ("masks" if masks is None or masks is True else masks)
    if masks is None or masks is True:
        folder = _folder_called(root, "masks") or folder
    if folder.is_dir():
        return folder
    if masks is None:
        return None
    raise DataError(f"mask folder {folder} is not there; give masks= relative to {root}, or False for no masks.")


def _folder_called(root: Path, name: str) -> Path | None:
    """Return the folder with this name in `root`, or the one that differs only in case."""
    folders = [path for path in root.iterdir() if path.name.lower() == name and path.is_dir()]
    exact = [path for path in folders if path.name == name]
    return (exact or folders)[0] if exact or len(folders) == 1 else None


def _other_mask_folders(root: Path) -> list[Path]:
    """Return the folders in `root` that hold masks, judging by their names, and are not called `masks`."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    called = [path for path in folders if re.sub(r"[\W_]", "", folded_name(path.name)) in _MASK_FOLDERS]
    return [path for path in called if mask_files(path)]


def _find_tables(root: Path, images_folder: Path, table: str | Path | None, caller: Caller) -> dict[Path, str | None]:
    """Return the table; or those in subfolders, one in each, with the name of the subfolder; or nothing."""
    if table is not None:
        path = root / table
        if not path.is_file() and Path(table).is_file():
            path = Path(table)
        if not path.is_file():
            raise DataError(
                f"table {path} is not there; give its name relative to {root} with {option(caller, 'table')}."
            )
        return {path: None}
    for folder in dict.fromkeys((root, images_folder)):
        if found := _tables_in(folder, caller):
            return {found[0]: None}
    subfolders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path: folder.name for folder in subfolders for path in _tables_in(folder, caller)}


def _tables_in(folder: Path, caller: Caller) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.name.lower() in TABLE_NAMES and path.is_file())
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder} holds {names}; say which one has the labels with {option(caller, 'table')}.")
    return found


def _advice_without_table(root: Path, caller: Caller) -> str:
    """Say what to do about a folder without labels, depending on the files in it."""
    by_suffix: dict[str, list[str]] = {}
    for path in sorted(root.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            by_suffix.setdefault(path.suffix.lower(), []).append(path.name)
    tables = [name for suffix in (".csv", ".tsv", ".jsonl", ".parquet") for name in by_suffix.get(suffix, ())]
    others = [name for suffix in sorted(_OTHER_TABLES) for name in by_suffix.get(suffix, ()) if name != "classes.txt"]
    archives = [name for suffix in sorted(_ARCHIVES) for name in by_suffix.get(suffix, ())]
    if tables:
        return f"if {' or '.join(tables[:3])} has the labels, name it with {option(caller, 'table')}."
    if others:
        return (
            f"if {' or '.join(others[:3])} has the labels, save them as labels.csv with the columns file_name and "
            "labels."
        )
    if archives:
        return f"unpack {archives[0]} there."
    return f"write a table with the columns file_name and labels, or name it with {option(caller, 'table')}."


def _rows_of_tables(tables: Mapping[Path, str | None], problems: list[Problem]) -> list[Row]:
    """Return the rows of one table, or of those in subfolders, each of which is a split."""
    rows = []
    for path, subfolder in tables.items():
        for row in read_rows(path, problems):
            if subfolder is not None:
                cells = {"split": subfolder, **row.cells}
                if cells.get("mask_file_name"):
                    cells["mask_file_name"] = f"{subfolder}/{cells['mask_file_name']}"
                row = Row(f"{subfolder}/{row.where}", f"{subfolder}/{row.file_name}", cells)
            rows.append(row)
    return rows


def _folder_of_names(rows: Sequence[Row], tables: Mapping[Path, str | None], images_folder: Path, root: Path) -> Path:
    """Return the folder that the names in a table are relative to, the one that has the first row's image.

    `metadata` is imagefolder's name for a table whose images lie beside it; ours lie in the images folder.
    """
    table, subfolder = next(iter(tables.items()))
    candidates = [images_folder, table.parent if subfolder is None else root]
    if table.stem == "metadata":
        candidates.reverse()
    there = [folder for folder in candidates if rows and (folder / rows[0].file_name).is_file()]
    return there[0] if there else images_folder


def _rows_with_found_images(
    rows: Sequence[Row], folder: Path, images: ImageFinder, problems: list[Problem]
) -> list[Row]:
    """Return the rows with their images' names as the files have them; note images that are missing."""
    found_rows = []
    for row in rows:
        found = images.found(row.file_name)
        if found is not None and found != row.file_name:
            row = Row(row.where, found, row.cells)
        elif found is None and not (folder / row.file_name).is_file():
            message = f"{row.where} names {row.file_name}, which is not in {folder}; {images.advice(row.file_name)}"
            problems.append(Problem("missing", row.file_name, message))
        found_rows.append(row)
    return found_rows


def _rows_of_class_folders(listing: ImageListing, split: str | None, notes: list[str]) -> list[Row]:
    """Return a row for each image in `<class>/`, `<split>/<class>/` or `<class>/<split>/`, in alphabetical order."""
    names = [name for name in listing.names if "/" in name]
    folders_of = _telling_folders(names, notes)
    has_splits = _are_splits([f"{'/'.join(folders)}/image" for folders in folders_of.values() if folders], split)
    has_inner_splits = not has_splits and all(
        len(folders) > 1 and _is_split_name(folders[1]) for folders in folders_of.values()
    )
    rows, without_class = [], []
    deeper: dict[str, str] = {}
    for name, folders in folders_of.items():
        if len(folders) < (2 if has_splits else 1):
            without_class.append(name)
            continue
        label, *inner = folders[1:] if has_splits else folders
        splits = {"split": folders[0]} if has_splits else {"split": inner[0]} if has_inner_splits else {}
        if inner and not has_inner_splits:
            deeper.setdefault(inner[0], label)
        rows.append(Row(f"folder {name.rpartition('/')[0]}", name, {"labels": [tidy_name(label)], **splits}))
    if deeper:
        inner_name, label = next(iter(deeper.items()))
        notes.append(
            f"folders inside of class folders name no class: {label}/{inner_name} belongs to {label!r}. If "
            f"{shown_names(list(deeper), 3)} are the classes, move their folders up, or write a table."
        )
    if rows and (empty := [name for name in listing.empty_folders if name.count("/") < 2]):
        notes.append(f"{len(empty):,} folders hold no image and make no class: {shown_names(empty, 3)}")
    if rows and without_class:
        notes.append(
            f"{len(without_class):,} images lie in no class folder and are left out: {shown_names(without_class, 3)}"
        )
    return rows


def _masks_beside_images(names: Sequence[str]) -> set[str]:
    """Return the images named like another one in their folder plus an ending such as `_mask`."""
    stems = {without_suffix(name) for name in names}
    endings = {stem: _MASK_ENDING.sub("", stem) for stem in stems}
    return {
        name
        for name in names
        if (shorter := endings[without_suffix(name)]) in stems and shorter != without_suffix(name)
    }


def _telling_folders(names: Sequence[str], notes: list[str]) -> dict[str, list[str]]:
    """Return, for each name, the folders that state its class or split.

    A folder such as `images` at the same level of every name, and a folder around all others, are left out.
    """
    folders_of = {name: name.split("/")[:-1] for name in names}
    depth = min(map(len, folders_of.values()), default=0)
    for place in range(depth):
        if all(folded_name(folders[place]) in _IMAGE_FOLDERS for folders in folders_of.values()):
            folders_of = {name: folders[:place] + folders[place + 1 :] for name, folders in folders_of.items()}
            depth -= 1
            break
    around = {folders[0] for folders in folders_of.values() if folders}
    inner = {folders[1] for folders in folders_of.values() if len(folders) > 1}
    has_classes = depth > 2 or (depth == 2 and not any(map(_is_split_name, inner)))
    if len(around) == 1 and len(inner) > 1 and has_classes and not _is_split_name(*around):
        notes.append(f"all class folders lie in {next(iter(around))}, which names no class itself.")
        return {name: folders[1:] for name, folders in folders_of.items()}
    return folders_of


def _is_split_name(name: str) -> bool:
    """Return whether a folder has the name of a split: `val`, `Training set`, `test2`."""
    words = re.findall(r"[^\W\d_]+", folded_name(name))
    return folded_name(name) in SPLIT_FOLDERS or (
        not SPLIT_FOLDERS.isdisjoint(words)
        and all(word in SPLIT_FOLDERS or word in _WORDS_BESIDE_SPLITS for word in words)
    )


def _are_splits(names: Sequence[str], split: str | None) -> bool:
    """Return whether the first folders of images are splits, not classes.

    Raises:
        DataError: one of them may be either: a folder `train` with folders in it, beside folders of images.
    """
    inner: dict[str, set[str]] = {}
    for name in names:
        first, *rest = name.split("/")
        inner.setdefault(first, set()).add(folded_name(rest[0]) if len(rest) > 1 else "")
    if split is not None and folded_name(split) in {folded_name(first) for first in inner}:
        return True
    named = [first for first in inner if _is_split_name(first)]
    if not named or len(named) == len(inner):
        return bool(named)
    nested = [first for first in named if "" not in inner[first]]
    others = [first for first in inner if first not in named]
    if not nested:
        return False  # a class that is called train, beside other classes
    shared = {name for first in nested for name in inner[first]} & {name for first in others for name in inner[first]}
    if shared or len(nested) > 1:
        return True
    raise DataError(
        f"the folder {nested[0]} holds folders as a split does, and {others[0]} beside it does not, so that "
        f"{nested[0]} may be a split or a class; put class folders into every split, or rename {nested[0]}."
    )


def _first_line(path: Path) -> str:
    return next((line for line in read_text(path).splitlines() if line.strip()), "")


def _refuse_ids_with_background(rows: Sequence[Row], class_file: Path) -> None:
    """Refuse class ids if the list of classes begins with background, which may or may not count."""
    for row in rows:
        cell = row.cells.get("labels")
        if isinstance(cell, list) and any(isinstance(class_id, int) for class_id in cell):
            raise DataError(
                f"{row.where} gives class ids and {class_file} begins with background, so that 1 may mean its "
                "first or its second class; take background out and count classes from 0, or write class names."
            )


def _rows_of_split(rows: Sequence[Row], split: str | None, source: str, caller: Caller) -> list[int]:
    """Return the positions of the rows of `split`, ignoring case."""
    if split is None:
        return list(range(len(rows)))
    if not all("split" in row.cells for row in rows):
        raise DataError(
            f"{source} has no column split to look for {split!r} in; add it, or give {option(caller, 'no split')} for "
            "all images."
        )
    kept = [position for position, row in enumerate(rows) if folded_name(row.text("split")) == folded_name(split)]
    if not kept:
        found = sorted({row.text("split") for row in rows})
        raise DataError(f"{source} has no row with split {split!r}, found {', '.join(found)}; choose one of them.")
    return kept


def _find_ids(content: FolderContent, listing: ImageListing) -> None:
    """Fill in ids; note rows for one image, and images without a row."""
    first_row: dict[str, Row] = {}
    for row in content.rows:
        image_id = row.text("image_id") or without_suffix(row.file_name)
        content.image_ids.append(image_id)
        earlier = first_row.setdefault(unicodedata.normalize("NFC", image_id), row)
        if earlier is not row:
            message = (
                f"{earlier.where} names {earlier.file_name} and {row.where} names {row.file_name}, both with the id "
                f"{image_id!r}; expected one row for each image and different names before the suffix: join the rows "
                "or rename a file."
            )
            content.problems.append(Problem("duplicate", row.file_name, message))
    named = {row.file_name for row in content.rows}
    named |= {row.text("mask_file_name") for row in content.rows}
    content.unlisted = [name for name in listing.names if name not in named]


def _find_masks(content: FolderContent, mask_folder: Path | None, wanted: bool) -> None:
    """Fill in the masks: the file that a row names, else the file with the image's name in the mask folder."""
    folder, named_masks = content.folder, set()
    unnamed = [row.file_name for row in content.rows if wanted and not row.text("mask_file_name")]
    match = MaskMatch() if mask_folder is None else match_masks(list(dict.fromkeys(unnamed)), mask_folder)
    for row in content.rows:
        named = row.text("mask_file_name") if wanted else ""
        path = None
        if named:
            try:
                path = folder / inner_path(named, row.where)
                if not path.is_file() and mask_folder is not None:
                    path = mask_folder / inner_path(named, row.where)
                named_masks.add(path)
                if not path.is_file():
                    message = (
                        f"{row.where} names the mask {named}, which is not in {folder}; add it or empty the cell."
                    )
                    content.problems.append(Problem("mask missing", row.file_name, message))
            except DataError as error:
                content.problems.append(Problem("table", row.where, str(error)))
        elif wanted:
            path = match.paths.get(row.file_name)
            if row.file_name in match.ambiguous:
                message = (
                    f"{row.file_name} may have the masks {' and '.join(match.ambiguous[row.file_name])} in "
                    f"{mask_folder}; keep one of them, or name it in a column mask_file_name."
                )
                content.problems.append(Problem("mask names", row.file_name, message))
        content.masks.append(path if path is not None and path.is_file() else None)
    if mask_folder is None:
        return
    content.unmatched_masks = [name for name in match.unmatched if mask_folder / name not in named_masks]
    if match.rule:
        content.mask_notes.append(f"masks in {mask_folder} are matched to images by name, where {match.rule}")
    if not any(content.masks) and not content.unmatched_masks and (others := other_files(mask_folder)):
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        message = f"{mask_folder} holds {kinds} and no image; save masks as PNG, with label ids as pixel values."
        content.problems.append(Problem("mask names", str(mask_folder), message))
    elif content.unmatched_masks and not any(content.masks):
        content.problems.append(Problem("mask names", str(mask_folder), _unmatched_message(content, mask_folder)))
    elif content.unmatched_masks:
        content.mask_notes.append(_unmatched_message(content, mask_folder))


def _unmatched_message(content: FolderContent, mask_folder: Path) -> str:
    """Say that masks match no image, and how they should be named."""
    unmatched, total = content.unmatched_masks, sum(mask is not None for mask in content.masks)
    row = next((row for row, mask in zip(content.rows, content.masks, strict=True) if mask is None), content.rows[0])
    return (
        f"{len(unmatched)} masks in {mask_folder} belong to no image ({shown_names(unmatched, 3)}) and {total} of "
        f"{len(content.rows)} images have a mask; call a mask as its image, {without_suffix(row.file_name)}.png for "
        f"{row.file_name}, or name it in a column mask_file_name."
    )


def _check_labels(
    content: FolderContent, labels: RowLabels, class_list: Path | str, allow_empty: bool, caller: Caller
) -> None:
    """Note unknown class names, and rows of the split that name no class without saying that there is none."""
    known, kept = set(content.classes), set(content.kept)
    bad = {problem.name for problem in content.problems if problem.kind == "labels"}
    for position, (row, names) in enumerate(zip(content.rows, content.names, strict=True)):
        for name in names:
            if name not in known:
                message = (
                    f"{row.where} ({row.file_name}) names the class {name!r}, which is not in {class_list}: "
                    f"{suggest(name, content.classes)}"
                )
                content.problems.append(Problem("labels", row.file_name, message))
        empty = not names and not labels.stated[position] and position in kept
        if empty and not allow_empty and row.file_name not in bad:
            message = (
                f"{row.where} ({row.file_name}) names no class, expected one or more; fill it in, take the row "
                f"out, or give {option(caller, 'allow_empty')} if empty cells mean that an image shows no class."
            )
            content.problems.append(Problem("unlabeled", row.file_name, message))


def notes_on_classes(content: FolderContent) -> list[str]:
    """Say which classes appear in no image, and which in all images."""
    counts = Counter(name for position in content.kept for name in set(content.names[position]))
    notes = []
    if never := [name for name in content.chosen if not counts[name]]:
        notes.append(f"no image shows {', '.join(map(repr, never[:5]))}{', ...' if len(never) > 5 else ''}.")
    if empty := [name for name in content.chosen if folded_name(name) in _NOTHING]:
        notes.append(
            f"{empty[0]!r} is a class like any other; if it means that an image shows no class, write background "
            "instead."
        )
    by_fold = {folded_name(name): name for name in content.chosen}
    for name in content.chosen:
        denial = _DENIAL.match(folded_name(name))
        if denial and (denied := by_fold.get(denial[1])):
            notes.append(
                f"{name!r} is a class like any other; if it means that an image does not show {denied!r}, write "
                "background instead."
            )
    if note := note_on_contrast(content.chosen, counts, len(content.kept)):
        notes.append(note)
    return notes


def note_on_contrast(classes: Sequence[str], counts: Mapping[str, int], images: int) -> str | None:
    """Name the classes that all images show, which cannot be told from their surroundings; None if there are none."""
    always = [name for name in classes if images and counts.get(name, 0) == images]
    if not always:
        return None
    each, them = ("it", "it") if len(always) == 1 else ("each of them", "them")
    return (
        f"every image shows {', '.join(map(repr, always))}, so that training cannot tell {each} from what surrounds "
        f"it; add images that do not show {them}."
    )
