"""What a folder of your own images contains, and everything that is wrong with it, before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common import DataError, folded_name, look_at_file, look_at_image
from .folder import FolderContent, FolderQuery, look_through, notes_on_classes, shown_names
from .mask_report import MaskFinding, all_together, look_at_mask
from .tables import Caller, Problem

USUAL_PATCH = 16
"""Side of a DeiT patch in pixels. The model that will use a folder is unknown when the folder is checked."""


@dataclass(frozen=True)
class FolderReport:
    """What `check_folder` found; `str()` gives all of it, `summary()` a version short enough for a training log.

    Attributes:
        root: The folder.
        source: The table, or that the folders name the classes.
        images: Images that would be loaded.
        classes: Their classes in the order of ids.
        images_per_class: Class -> images that show it.
        labels_per_image: Number of labels -> number of images with that many.
        splits: Split -> number of images, for all splits of the folder; empty without splits.
        masks: Images with a mask.
        unused_columns: Columns of the table that mean nothing here.
        problems: Everything that is wrong, in the order of the table.
        notes: Worth knowing but not wrong, in sentences: files left out, a class that every image shows.
        remarks: Possible problems of single images: a blank image, guessed bit depth, further frames.
    """

    root: Path
    source: str
    images: int
    classes: tuple[str, ...]
    images_per_class: Mapping[str, int]
    labels_per_image: Mapping[int, int]
    splits: Mapping[str, int]
    masks: int
    unused_columns: tuple[str, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    remarks: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def summary(self, names: int = 3) -> str:
        """Return the report with the first `names` names of each kind of problem."""
        return "\n".join(self._lines(names, messages=False))

    def __str__(self) -> str:
        return "\n".join(self._lines(len(self.problems) + len(self.remarks), messages=True))

    def _lines(self, names: int, messages: bool) -> Iterator[str]:
        yield f"{self.root}: {self.images:,} images, {len(self.classes)} classes, {self.masks:,} masks, {self.source}"
        if self.splits:
            yield "  splits: " + ", ".join(f"{split} {count:,}" for split, count in self.splits.items())
        yield "  images of each class: " + ", ".join(f"{name} {n:,}" for name, n in self.images_per_class.items())
        yield "  labels for each image: " + ", ".join(f"{k} in {n:,}" for k, n in self.labels_per_image.items())
        if self.unused_columns:
            yield f"  columns without use: {', '.join(self.unused_columns)}"
        yield from (f"  note: {note}" for note in self.notes)
        kinds: dict[str, list[Problem]] = {}
        for problem in (*self.problems, *self.remarks):
            kinds.setdefault(problem.kind, []).append(problem)
        for kind, problems in kinds.items():
            shown = "" if messages else f", {shown_names([problem.name for problem in problems], names)}"
            yield f"  {kind}: {len(problems):,}{shown}"
            if messages:
                yield from (f"    {problem.message}" for problem in problems)
        if self.ok:
            yield "  no problems found"


def check_folder(
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
    decode: bool = True,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda checked, _: checked,
) -> FolderReport:
    """Report what a folder contains and everything that is wrong with it, without stopping at the first problem.

    Args:
        root: As for `load_folder`, like all that is not named here.
        table: See there.
        split: See there.
        images: See there.
        masks: See there.
        classes: See there.
        separator: See there.
        allow_empty: See there.
        caller: See there.
        mask_values: See there.
        decode: Decode every image and mask completely. False: read only the header of each image and no mask, which is
            much faster and misses damage inside.
        progress: Wraps the iterator over checked images, given their number.

    Raises:
        DataError: there is nothing to report on: no folder, or no readable table.
    """
    query = FolderQuery(Path(root), table, split, images, masks, classes, separator, allow_empty, caller, mask_values)
    found = look_through(query)
    there = [position for position in found.kept if (found.folder / found.rows[position].file_name).is_file()]
    pool = ThreadPoolExecutor()  # PIL and hashlib release the interpreter lock
    try:
        checked = pool.map(lambda position: _check_files(found, position, decode, caller), there)
        results = list(progress(checked, len(there)))
    finally:
        pool.shutdown(cancel_futures=True)
    findings = [each.mask for each in results if each.mask is not None]
    together, mask_notes = all_together(found, findings, values_given=mask_values is not None, caller=caller)
    counts = Counter(name for position in found.kept for name in set(found.names[position]))
    sizes = Counter(len(set(found.names[position]) & set(found.chosen)) for position in found.kept)
    return FolderReport(
        root=found.root,
        source=found.source,
        images=len(found.kept),
        classes=tuple(found.chosen),
        images_per_class={name: counts[name] for name in found.chosen},
        labels_per_image=dict(sorted(sizes.items())),
        splits=_split_sizes(found),
        masks=sum(found.masks[position] is not None for position in found.kept),
        unused_columns=tuple(found.unused_columns),
        problems=(*found.problems, *_unlisted(found), *_broken_links(found, there), *_of_files(results), *together),
        notes=(*found.notes, *notes_on_classes(found), *found.mask_notes, *mask_notes),
        remarks=tuple(remark for each in results for remark in each.remarks),
    )


def _unlisted(found: FolderContent) -> Iterator[Problem]:
    """Yield the images without a row."""
    lack, remedy = f"has no row in {found.source}", "add one or take it out"
    if not found.has_table:
        lack, remedy = "lies in no class folder", "move it into one or take it out"
    for name in found.unlisted:
        yield Problem("unlisted", name, f"{name} {lack} and is left out; {remedy}.")


def _broken_links(found: FolderContent, there: Sequence[int]) -> Iterator[Problem]:
    """Yield the links to files that do not exist."""
    for name in sorted({found.rows[position].file_name for position in set(found.kept).difference(there)}):
        if (found.folder / name).is_symlink():
            yield Problem(
                "missing", name, f"{name} is a link to a file that is not there; fix the link or take it out."
            )


def _of_files(results: Sequence[CheckedFile]) -> Iterator[Problem]:
    """Yield what is wrong with images and masks, in the order of the rows; the second of two equal files is a copy."""
    first_of: dict[bytes, str] = {}
    for each in results:
        yield from each.problems
        yield from each.mask.problems if each.mask is not None else ()
        other = first_of.setdefault(each.digest, each.name) if each.digest else each.name
        if other != each.name:
            message = f"{each.name} is the same file as {other}; join their labels, or take one out."
            yield Problem("copy", each.name, message)


def _split_sizes(found: FolderContent) -> dict[str, int]:
    """Return the number of rows of every split, by its first spelling."""
    spelling: dict[str, str] = {}
    splits = Counter(
        spelling.setdefault(folded_name(row.text("split")), row.text("split"))
        for row in found.rows
        if row.text("split")
    )
    return dict(sorted(splits.items()))


@dataclass(frozen=True)
class CheckedFile:
    """One row's image: a digest of its file (empty if it was not read), its mask, problems, and remarks."""

    name: str
    digest: bytes = b""
    mask: MaskFinding | None = None
    problems: Sequence[Problem] = ()
    remarks: Sequence[Problem] = ()


def _check_files(found: FolderContent, position: int, decode: bool, caller: Caller) -> CheckedFile:
    """Look at the image and the mask of a row."""
    name = found.rows[position].file_name
    path = found.folder / name
    try:
        image, digest = look_at_file(path) if decode else (look_at_image(path, decode=False), b"")
    except DataError as error:
        return CheckedFile(name, problems=[Problem("unreadable", name, str(error))])
    if not decode:
        return CheckedFile(name)
    size, found_out = image.size, list(image.notes)
    if min(size) < USUAL_PATCH:
        found_out.append(
            f"it is {size[0]} x {size[1]} pixels (height x width), and models with patches of {USUAL_PATCH} leave it "
            "out; give a larger copy, or take it out"
        )
    remarks = [Problem("look at", name, f"{name}: {each}.") for each in found_out]
    return CheckedFile(name, digest, look_at_mask(found, position, image, caller), remarks=remarks)
