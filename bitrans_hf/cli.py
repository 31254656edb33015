"""The console command `bitrans`: from a folder of images and labels to masks, without writing Python."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from .commands import if_stopped, leave_process_group, run_command, starting, starts_quietly
from .hub.errors import MissingExtraError
from .progress import progress

REFINERS = ("crf", "none", "par")
"""The pipeline's refiners by name: importing its module takes seconds."""

EXAMPLES = """\
examples:
  bitrans check photos                    what is in the folder, and any problems
  bitrans train photos                    train on its labels; writes masks and a page to review them
  bitrans masks --model runs/photos/train/model --images photos --labels labels.csv --out masks
                                          one PNG for each image: 0 background, 1 the first class, ...
  bitrans masks --model org/bitrans-voc --images photos --out masks
                                          without a table, the model predicts the classes
  bitrans app --model runs/photos/train/model
                                          try the model on single images, in the browser

`bitrans COMMAND --help` explains every option. A model is a folder that training wrote or the name of a repository on
the Hub.
"""

TRAIN_HELP = """\
Train on the image-level labels of a folder, make seeds and pseudo labels for its images, and write a page to review
them: runs/NAME/report/index.html. No masks are needed; masks in the folder are only used for scores. To resume an
interrupted run, rerun the same command.

Every key of the recipe may follow as --section.key value; `python -m bitrans_hf.stages run_all --help` explains them.
"""

TRAIN_EXAMPLES = """\
examples:
  bitrans train photos
  bitrans train photos --name small --model.weights timm:deit_tiny_patch16_224.fb_in1k --train.epochs 10
  accelerate launch -m bitrans_hf train photos                on several GPUs
"""

MASKS_HELP = """\
Write a label map for every image in a folder.

--labels names a table with a column file_name and a column labels ("dog;person"), or one 0/1 column for each class:

  file_name,labels
  a.jpg,dog;person
  b.jpg,cat

Each mask is a palette PNG of its image's name and size, whose pixels are label ids: 0 is background, 1 the model's
first class, and so on; masks.json beside them lists the names. To resume an interrupted run,
rerun the same command. Images that cannot be read are listed at the end and do not stop the run.
"""

MASKS_EXAMPLES = """\
examples:
  bitrans masks --model runs/photos/train/model --images photos --labels labels.csv --out masks
  bitrans masks --model org/bitrans-voc --images photos --out masks --threshold 0.5     smaller masks
  bitrans masks ... --scales 1.0 0.75 1.25 --refiner par      slower, with sharper outlines
  bitrans masks ... --stored-pixels                           masks to train on: EXIF orientation is not applied
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; Ctrl-C, or an error that the user can fix, ends it with one sentence, not a traceback."""

    def run() -> None:
        parser = build_parser()
        options, others = parser.parse_known_args(arguments)
        if others and options.run is not run_train:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        options.others = others
        options.run(options)
        leave_process_group()

    run_command(run)


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers` returns; argparse has no public name for it."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `bitrans` and its commands; each command sets `run`."""
    parser = argparse.ArgumentParser(
        prog="bitrans",
        description="Image-level labels in, segmentation masks out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_train, add_masks, add_check, add_app):
        add(commands)
    for name, (module, text) in PASSED_ON.items():
        # No word looks like an option to this parser: all are for the parser of the module.
        passed_on = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
        passed_on.add_argument("words", nargs="*")
        passed_on.set_defaults(run=pass_on(f"bitrans {name}", module))
    return parser


def add_train(commands: Commands) -> None:
    """Add the command `train`."""
    train = commands.add_parser(
        "train",
        help="train on a folder of images and labels, and make masks for its images",
        description=TRAIN_HELP,
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("folder", help="folder with the images and the table of labels")
    train.add_argument("--name", help="results go to runs/NAME (default: the folder's name)")
    train.add_argument(
        "--config", default="folder", metavar="RECIPE", help="shipped recipe or YAML file (%(default)s)"
    )
    train.set_defaults(run=run_train)


def add_masks(commands: Commands) -> None:
    """Add the command `masks`."""
    masks = commands.add_parser(
        "masks",
        help="write a mask for every image in a folder",
        description=MASKS_HELP,
        epilog=MASKS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    masks.add_argument("--model", required=True, help="folder of a trained model, or repository on the Hub")
    masks.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="folder of images")
    masks.add_argument(
        "--labels", type=Path, metavar="TABLE", help="CSV, JSONL or Parquet; without it the model predicts the classes"
    )
    masks.add_argument(
        "--separator", metavar="TEXT", help="separator between class names in the table (detected by default)"
    )
    masks.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the masks go")
    masks.add_argument("--threshold", type=float, help="background score, 0 to 1 (the model's)")
    masks.add_argument(
        "--label-threshold", type=float, default=0.5, help="without a table: probability of a class (%(default)s)"
    )
    masks.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="S", help="sizes to average over (1.0)"
    )
    masks.add_argument("--no-flip", action="store_true", help="do not average with the flipped image (twice as fast)")
    masks.add_argument("--no-refine", action="store_true", help="skip affinity refinement")
    masks.add_argument(
        "--refiner",
        choices=REFINERS,
        help="sharpen outlines on the image's colors: crf takes seconds for each image, par less",
    )
    masks.add_argument(
        "--max-side", type=int, metavar="PX", help="work on larger images reduced to this side (the model's, 640)"
    )
    masks.add_argument(
        "--stored-pixels", action="store_true", help="ignore EXIF orientation: masks match the stored pixels"
    )
    masks.add_argument("--batch-size", type=int, default=8, metavar="N", help="images per batch (%(default)s)")
    masks.add_argument("--workers", type=int, default=0, metavar="N", help="image-loading processes (%(default)s)")
    masks.add_argument("--device", help='"cpu", "cuda:0", ... (a GPU if there is one)')
    masks.add_argument("--overwrite", action="store_true", help="rewrite masks that exist")
    masks.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    masks.add_argument("--quiet", action="store_true", help="no progress bar")
    masks.set_defaults(run=run_masks)


def add_check(commands: Commands) -> None:
    """Add the command `check`."""
    check = commands.add_parser(
        "check",
        help="report what is in a folder of images and labels, and any problems",
        description="Check the images, labels and masks of a folder before training. Exits with status 1 if there "
        "are problems.",
        epilog="examples:\n  bitrans check photos\n  bitrans check photos --labels tags.csv\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("folder", type=Path, help="folder with the images and the table of labels")
    check.add_argument("--labels", type=Path, metavar="TABLE", help="the table, if its name is not labels or metadata")
    check.add_argument(
        "--separator", metavar="TEXT", help="separator between class names in the table (detected by default)"
    )
    check.add_argument(
        "--allow-empty", action="store_true", help="an empty cell of labels means that the image shows no class"
    )
    check.add_argument(
        "--mask-values",
        metavar="FORM",
        help="what the pixel values of masks mean, where they are not label ids: binary (0 and one other value), "
        "voc_colors, a list such as 0=0,128=255,255=1 (value=label id), 0-127=0,128-255=1 or 128/0/0=1 (color=label "
        "id), or ids; in a recipe, data.mask_values",
    )
    check.add_argument("--quiet", action="store_true", help="no progress bar")
    check.set_defaults(run=run_check)


def add_app(commands: Commands) -> None:
    """Add the command `app`."""
    app = commands.add_parser(
        "app",
        help="try a model on single images, in the browser",
        description="Open a page in the browser: drop an image, choose its labels, and see its maps and mask.",
        epilog="examples:\n  bitrans app --model runs/photos/train/model\n"
        "  bitrans app --model org/bitrans-voc --port 8000 --host 0.0.0.0      reachable from other machines\n"
        "  bitrans app --model org/bitrans-voc --space space                   a folder to upload as a Space\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    app.add_argument("--model", required=True, help="folder of a trained model, or repository on the Hub")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    app.add_argument("--port", type=int, help="port to listen on (the first free one from 7860)")
    app.add_argument("--device", help='"cpu", "cuda:0", ... (a GPU if there is one)')
    app.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write the folder of a Space that serves the model, then exit"
    )
    app.add_argument("--no-browser", action="store_true", help="do not open the browser")
    app.set_defaults(run=run_app)


PASSED_ON = {
    "evaluate": ("stages.evaluate", "score masks or seeds against ground truth"),
    "publish": ("stages.publish", "write what a run made as folders for the Hub, and upload them"),
    "export": ("publishing.export", "write a model as ONNX and as a torch.export program"),
}
"""Commands with their own parser: module below this package, and description."""


# ---- The commands. Each imports what it needs itself, so that `bitrans --help` answers at once.


def run_train(options: argparse.Namespace) -> None:
    """Run every stage of a recipe on a folder."""
    name = options.name or Path(options.folder).resolve().name
    words = ["--config", options.config, "--data.root", options.folder, "--name", name, *options.others]
    with starting("bitrans train", quiet=starts_quietly(words)):
        from .stages.run_all import main as run_all
    run_all(words)


def pass_on(command: str, module: str) -> Callable[[argparse.Namespace], None]:
    """Return a function that runs a module's `main` with the arguments after the command."""

    def run(options: argparse.Namespace) -> None:
        with starting(command, quiet=starts_quietly(options.words)):
            loaded = importlib.import_module(f".{module}", __package__)
        loaded.main(options.words)

    return run


def run_masks(options: argparse.Namespace) -> None:
    """Write the masks of a folder."""
    with starting("bitrans masks", quiet=options.quiet):
        from .mask_folder import run_masks as run

    run(options)


def run_check(options: argparse.Namespace) -> None:
    """Print the report on a folder; exit with status 1 if it has problems."""
    from .data import check_folder

    if_stopped(lambda: "before the report was made")
    report = check_folder(
        options.folder,
        options.labels,
        separator=options.separator,
        allow_empty=options.allow_empty,
        caller="check",
        mask_values=options.mask_values,
        progress=lambda images, total: progress(images, total=total, desc="check", unit="image", quiet=options.quiet),
    )
    print(report)
    if not report.ok:
        raise SystemExit(1)


def run_app(options: argparse.Namespace) -> None:
    """Serve the app until it is stopped, or write the folder of a Space."""
    try:
        with starting("bitrans app", quiet=False):
            from .app import serve, write_space  # here, because gradio is an extra and takes seconds to import
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingExtraError('the app needs gradio; install it with pip install "bitrans-hf[app]".') from error

    if options.space is not None:
        folder = write_space(options.space, options.model)
        upload = f"hf upload spaces/YOUR_NAME/{folder.name} {folder} ."
        print(f"space: -> {folder}; make a Gradio Space on the Hub, then: {upload}")
        return
    serve(options.model, host=options.host, port=options.port, device=options.device, browser=not options.no_browser)


if __name__ == "__main__":
    main()
