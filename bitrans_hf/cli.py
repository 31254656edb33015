"""The console command `bitrans`: masks for a folder of pictures, a look over a folder, the app; no Python needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import transformers
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .data import check_folder, load_folder
from .data.folder import IMAGE_SUFFIXES, TABLE_NAMES
from .errors import InputError
from .pipeline_bitrans import REFINERS, LocalisedPicture, PseudoMaskPipeline, Refiner
from .pseudo_labels import write_label_png
from .store import atomic_write

EXAMPLES = """\
examples:
  bitrans check photos                    what is in the folder, and what is wrong with it
  bitrans masks --model runs/photos/train/model --images photos --labels labels.csv --out masks
                                          one PNG for each picture: 0 background, 1 the first class, ...
  bitrans masks --model org/bitrans-voc --images photos --out masks
                                          without a table the model decides what each picture shows
  bitrans app --model runs/photos/train/model
                                          try the model on single pictures, in the browser

`bitrans COMMAND --help` explains every option. A model is a folder that training wrote or the name of a repository on
the Hub.
"""

MASKS_HELP = """\
Write a label map for every picture of a folder.

--labels names a table with a column file_name and a column labels ("dog;person"), or one 0/1 column for each class:

  file_name,labels
  a.jpg,dog;person
  b.jpg,cat

Each mask is a palette PNG of its picture's name and size, whose pixels are label ids: 0 is background, 1 the model's
first class, and so on; masks.json beside them lists the names. A run that was stopped goes on when the same command
is given again. Pictures that cannot be read are named at the end and do not stop the run.
"""

MASKS_EXAMPLES = """\
examples:
  bitrans masks --model runs/photos/train/model --images photos --labels labels.csv --out masks
  bitrans masks --model org/bitrans-voc --images photos --out masks --threshold 0.5     smaller masks
  bitrans masks ... --scales 1.0 0.75 1.25 --refiner par      slower, with sharper outlines
  bitrans masks ... --stored-pixels                           masks to train on: EXIF orientation is not applied
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error that a person can mend ends it with one sentence, not a traceback."""
    options = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit("stopped; give the same command again to go on.") from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `bitrans` with its commands, each of which sets `run`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="bitrans",
        description="Image-level labels in, segmentation masks out.",
        epilog=EXAMPLES,
        formatter_class=form,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    masks = commands.add_parser(
        "masks",
        help="write a mask for every picture of a folder",
        description=MASKS_HELP,
        epilog=MASKS_EXAMPLES,
        formatter_class=form,
    )
    masks.add_argument("--model", required=True, help="folder of a trained model, or repository on the Hub")
    masks.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="folder of pictures")
    masks.add_argument(
        "--labels", type=Path, metavar="TABLE", help="CSV, JSONL or Parquet; without it the model predicts the classes"
    )
    masks.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the masks go")
    masks.add_argument("--threshold", type=float, default=0.4, help="background score, 0 to 1 (%(default)s)")
    masks.add_argument(
        "--label-threshold", type=float, default=0.5, help="without a table: probability of a class (%(default)s)"
    )
    masks.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="sizes to average over (1.0)"
    )
    masks.add_argument("--no-flip", action="store_true", help="do not average over the flipped picture: twice as fast")
    masks.add_argument("--no-refine", action="store_true", help="do not spread the maps along the affinity of patches")
    masks.add_argument(
        "--refiner",
        choices=sorted(REFINERS),
        help="sharpen outlines on the picture's colours: crf takes seconds for each picture, par less",
    )
    masks.add_argument(
        "--max-side", type=int, metavar="PX", help="work on larger pictures reduced to this side (the model's, 640)"
    )
    masks.add_argument(
        "--stored-pixels", action="store_true", help="masks for the pixels as stored, not turned upright by EXIF"
    )
    masks.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures read at a time (%(default)s)")
    masks.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read pictures (%(default)s)"
    )
    masks.add_argument("--device", help='"cpu", "cuda:0", ... (a GPU if there is one)')
    masks.add_argument("--overwrite", action="store_true", help="make masks again that are already there")
    masks.add_argument("--strict", action="store_true", help="stop at the first picture that cannot be read")
    masks.add_argument("--quiet", action="store_true", help="no progress bar")
    masks.set_defaults(run=run_masks)

    check = commands.add_parser(
        "check",
        help="say what is in a folder of pictures and labels, and what is wrong with it",
        description="Look over a folder before training: its pictures, labels and masks. Ends with status 1 if "
        "something is wrong.",
        epilog="examples:\n  bitrans check photos\n  bitrans check photos --labels tags.csv\n",
        formatter_class=form,
    )
    check.add_argument("folder", type=Path, help="folder with the pictures and the table of labels")
    check.add_argument("--labels", type=Path, metavar="TABLE", help="the table, if its name is not labels or metadata")
    check.add_argument("--quiet", action="store_true", help="no progress bar")
    check.set_defaults(run=run_check)

    app = commands.add_parser(
        "app",
        help="try a model on single pictures, in the browser",
        description="Open a page in the browser: drop a picture, choose its labels, see maps and mask at once.",
        epilog="examples:\n  bitrans app --model runs/photos/train/model\n"
        "  bitrans app --model org/bitrans-voc --port 8000 --host 0.0.0.0      reachable from other machines\n"
        "  bitrans app --model org/bitrans-voc --space space                   a folder to upload as a Space\n",
        formatter_class=form,
    )
    app.add_argument("--model", required=True, help="folder of a trained model, or repository on the Hub")
    app.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    app.add_argument("--port", type=int, help="(the first free one from 7860)")
    app.add_argument("--device", help='"cpu", "cuda:0", ... (a GPU if there is one)')
    app.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write the folder of a Space that serves the model, and end"
    )
    app.add_argument("--no-browser", action="store_true", help="do not open the browser")
    app.set_defaults(run=run_app)
    return parser


# ---- bitrans masks


def run_masks(options: argparse.Namespace) -> None:
    """Write the masks of a folder; see `MASKS_HELP`."""
    bar = not options.quiet and sys.stderr.isatty()
    if not bar:
        transformers.utils.logging.disable_progress_bar()
    if not options.images.is_dir():
        raise InputError(f"{options.images} is not a folder; give the folder that holds the pictures.")
    pipe = LabelMapPipeline.from_pretrained(options.model, options.device)
    pictures = pictures_with_labels(options.images, options.labels, pipe.class_names)
    settings = {
        "threshold": options.threshold,
        "label_threshold": options.label_threshold,
        "scales": tuple(options.scales),
        "flip": not options.no_flip,
        "refine": not options.no_refine,
        "refiner": options.refiner,
        "max_side": options.max_side,
        "upright": not options.stored_pixels,
    }
    record = {
        "model": options.model,
        "labels": str(options.labels or "predicted"),
        **settings,
        "scales": options.scales,
    }
    record["label_ids"] = {"background": 0, **{name: index + 1 for index, name in enumerate(pipe.class_names)}}
    write_record(options.out / "masks.json", record, overwrite=options.overwrite)
    todo = [picture for picture in pictures if options.overwrite or not mask_path(options.out, picture).is_file()]

    unreadable: list[str] = []
    answers = pipe(PictureList(todo), batch_size=options.batch_size, num_workers=options.workers, **settings)
    for picture, answer in zip(tqdm(todo, desc="masks", unit="picture", disable=not bar), answers, strict=True):
        if isinstance(answer, RefusedPicture):
            if options.strict:
                raise InputError(answer.reason)
            unreadable.append(answer.reason)
        else:
            write_label_png(mask_path(options.out, picture), answer)
    for reason in unreadable:
        say(f"left out: {reason}", sys.stderr)
    say(
        f"masks: {len(pictures):,} pictures, {len(todo) - len(unreadable):,} written, {len(pictures) - len(todo):,} "
        f"there before, {len(unreadable):,} left out -> {options.out}"
    )


@dataclass(frozen=True)
class PictureFile:
    """A picture of the folder: its name without suffix, its path, and the names of its classes if known."""

    image_id: str
    path: str
    labels: tuple[str, ...] | None


class PictureList(Dataset[dict[str, Any]]):
    """Pictures as the pipeline reads them."""

    def __init__(self, pictures: Sequence[PictureFile]):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pictures[index].path, "candidate_labels": self.pictures[index].labels}


@dataclass(frozen=True)
class RefusedPicture:
    """A picture that cannot be used, and why, in one sentence that names it."""

    reason: str


class LabelMapPipeline(PseudoMaskPipeline):
    """The pipeline with one label map (H, W) uint8 for each picture, and a `RefusedPicture` instead of an error."""

    @property
    def class_names(self) -> list[str]:
        """Names of the object classes in the order of their ids."""
        names = cast("Mapping[int, str]", self.model.config.id2label)
        return [names[index] for index in range(len(names))]

    def preprocess(self, item: Any, **options: Any) -> dict[str, list[Any]]:  # type: ignore[override]
        """Open a picture, or say why it cannot be opened."""
        try:
            return cast("dict[str, list[Any]]", super().preprocess(item, **options))
        except ValueError as error:
            return {"pictures": [RefusedPicture(str(error))]}

    def _forward(self, inputs: dict[str, Any], **options: Any) -> dict[str, list[Any]]:  # type: ignore[override]
        entries = [entry[0] if isinstance(entry, list) else entry for entry in inputs["pictures"]]
        usable = [entry for entry in entries if not isinstance(entry, RefusedPicture)]
        localised: Iterator[LocalisedPicture] = iter(super()._forward({"pictures": usable}, **options)["pictures"])
        return {"pictures": [entry if isinstance(entry, RefusedPicture) else next(localised) for entry in entries]}

    def postprocess(  # type: ignore[override]
        self,
        outputs: dict[str, Any],
        threshold: float = 0.4,
        label_threshold: float = 0.5,
        refiner: str | Refiner | None = None,
    ) -> np.ndarray | RefusedPicture:
        """Lay one picture's masks, which do not overlap, into one label map."""
        entry = outputs["pictures"]
        entry = entry[0] if isinstance(entry, list) else entry
        if isinstance(entry, RefusedPicture):
            return entry
        label_map = np.zeros(entry.picture.size, dtype=np.uint8)
        for answer in super().postprocess({"pictures": [entry]}, threshold, label_threshold, refiner):
            label_map[np.asarray(answer["mask"]) > 0] = self.class_names.index(answer["label"]) + 1
        return label_map


def pictures_with_labels(folder: Path, table: Path | None, class_names: Sequence[str]) -> list[PictureFile]:
    """List the pictures of a folder: the rows of a table with their labels, or else all pictures, whatever they show.

    Raises:
        ValueError: there are none, a table does not fit (the message names row and file), or two pictures would get
            the same mask.
    """
    if table is not None:
        table = table.absolute() if table.is_file() else table
        rows = load_folder(folder, table, masks=False, classes=class_names, allow_empty=True)
        pictures = [
            PictureFile(row["image_id"], row["image"]["path"], tuple(class_names[index] for index in row["labels"]))
            for row in rows
        ]
    else:
        unused = [name for name in TABLE_NAMES if (folder / name).is_file()]
        if unused:
            say(f"note: {folder / unused[0]} is not used; --labels {unused[0]} uses its labels.", sys.stderr)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        pictures = [
            PictureFile(path.relative_to(folder).with_suffix("").as_posix(), str(path), None) for path in files
        ]
    if not pictures:
        raise InputError(
            f"{folder} holds no pictures; looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    by_id: dict[str, PictureFile] = {}
    for picture in pictures:
        if (other := by_id.setdefault(picture.image_id, picture)) is not picture:
            raise InputError(f"{other.path} and {picture.path} would get the same mask; rename one of them.")
    return pictures


def mask_path(folder: Path, picture: PictureFile) -> Path:
    """Return where a picture's mask goes."""
    return folder / f"{picture.image_id}.png"


def write_record(path: Path, record: Mapping[str, Any], *, overwrite: bool) -> None:
    """Note how the masks of a folder are made, and refuse to mix masks made in different ways.

    Raises:
        ValueError: the folder holds masks made with other settings.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False)
    if path.is_file() and not overwrite:
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(text)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"{path.parent} holds masks made with {name} {before.get(name)}, now it is {now[name]}; give another "
                "--out, or --overwrite to make them again."
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


# ---- bitrans check, bitrans app


def run_check(options: argparse.Namespace) -> None:
    """Print what is in a folder; end with status 1 if something is wrong with it."""
    bar = not options.quiet and sys.stderr.isatty()
    report = check_folder(
        options.folder,
        options.labels,
        progress=lambda images, total: tqdm(images, total=total, desc="check", unit="image", disable=not bar),
    )
    say(str(report))
    if not report.ok:
        raise SystemExit(1)


def run_app(options: argparse.Namespace) -> None:
    """Serve the app until it is stopped, or write the folder of a Space."""
    try:
        from .app import serve, write_space  # here, because gradio is an extra and takes seconds to import
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError('the app needs gradio; install it with pip install "bitrans-hf[app]".') from error

    if options.space is not None:
        folder = write_space(options.space, options.model)
        upload = f"hf upload spaces/YOUR_NAME/{folder.name} {folder} ."
        say(f"space: -> {folder}; make a Gradio Space on the Hub, then: {upload}")
        return
    serve(options.model, host=options.host, port=options.port, device=options.device, browser=not options.no_browser)


def say(text: str, stream: Any = None) -> None:
    """Print a line between the steps of a progress bar."""
    tqdm.write(text, file=stream or sys.stdout)


if __name__ == "__main__":
    main()
