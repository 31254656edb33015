"""Re-render the cards in model_cards/ from the numbers stored next to them; the numbers of named runs are read again.

python training/render_cards.py                                  (all cards, from model_cards/<run>/run.json)
python training/render_cards.py runs/shapes runs/voc_deit_small  (these runs' numbers are copied first)
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from bitrans_hf.commands import run_script

    run_script("render_cards")

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import bitrans_hf
from bitrans_hf.files import atomic_write
from bitrans_hf.publishing.cards import NETWORK_STAGES, RunRecord, render_card

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
FILES = {"bitrans": "README.md", "affinitynet": "affinitynet.md", "deeplab": "deeplab.md"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from command-line arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, such as runs/shapes")
    parser.add_argument("--cards", type=Path, default=CARDS, help="where the cards are")
    options = parser.parse_args(arguments)
    for folder in options.runs:
        copy_numbers(folder, options.cards)
    for source in sorted(options.cards.glob("*/run.json")):
        for file, text in rendered(source).items():
            with atomic_write(source.with_name(file)) as temporary:
                temporary.write_text(text, encoding="utf-8")
            print(source.with_name(file))


def copy_numbers(folder: Path, cards: Path) -> None:
    """Copy what a run measured, and its gallery where the images are drawn by us, beside its cards."""
    run = RunRecord.from_folder(folder)
    with atomic_write(cards / run.name / "run.json") as temporary:
        temporary.write_text(run.to_json(), encoding="utf-8")
    gallery = folder / "report" / "index_pictures" / "gallery.png"
    if run.recipe["data"]["source"] == "shapes" and gallery.is_file():
        shutil.copyfile(gallery, cards / run.name / "gallery.png")


def rendered(source: Path) -> dict[str, str]:
    """Return the cards of one `run.json` by their file names, one for each network that the run has."""
    run = RunRecord.from_json(source.read_text(encoding="utf-8"))
    picture = "gallery.png" if source.with_name("gallery.png").is_file() else None
    return {
        FILES[network]: render_card(
            run, network, repo=f"OWNER/bitrans-{run.name}", version="v1.0",
            package_version=bitrans_hf.__version__, picture=picture if network == "bitrans" else None,
        )
        for network, stage in NETWORK_STAGES.items()
        if stage in run.stages
    }  # fmt: skip
