"""Cards say what was measured and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from render_cards import main as render_cards_main
from render_cards import rendered
from tiny_run import METRICS, RECIPE, write_run

import bitrans_hf
from bitrans_hf.publishing.cards import DATA_NAMES, NOT_MEASURED, RunRecord, render_card

REPOSITORY = Path(__file__).resolve().parents[1]

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w])")
KEPT_CARDS = sorted((REPOSITORY / "model_cards").glob("*/run.json"))


def values_in(content: Any) -> list[Any]:
    """Every number and every text, keys included, of a JSON document."""
    if isinstance(content, dict):
        return [*content, *(value for inner in content.values() for value in values_in(inner))]
    if isinstance(content, list):
        return [value for inner in content for value in values_in(inner)]
    return [content]


def unfounded_numbers(card: str, source: Any, *texts: str) -> list[str]:
    """Numbers of a card that are not in the source (to the digits shown), nor in the texts that it was made from."""
    values = values_in(source)
    measured = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    known = {number for text in (*texts, *(str(value) for value in values)) for number in NUMBER.findall(text)}
    unfounded = []
    for shown in NUMBER.findall(card):
        digits = len(shown.partition(".")[2]) if "e" not in shown.lower() else None
        founded = shown in known or any(
            float(shown) == (value if digits is None else round(value, digits)) for value in measured
        )
        if not founded:
            unfounded.append(shown)
    return unfounded


def template_texts() -> list[str]:
    """What every card is made from besides the run: templates, names of data sets, versions, licence."""
    return [
        *DATA_NAMES.values(),
        *(path.read_text() for path in (REPOSITORY / "bitrans_hf" / "publishing" / "templates").glob("*.jinja")),
        "apache-2.0",
        bitrans_hf.__version__,
    ]


def card_of(run: RunRecord, network: str = "bitrans", **options: Any) -> str:
    given = {"repo": "me/bitrans-x", "version": "v1.0", "package_version": bitrans_hf.__version__, **options}
    return render_card(run, network, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return RunRecord.from_folder(write_run(tmp_path_factory.mktemp("runs") / "animals"))


@pytest.mark.parametrize("network", ["bitrans", "affinitynet", "deeplab"])
def test_every_number_of_a_card_is_in_the_files_of_the_run(run: RunRecord, network: str):
    card = card_of(run, network, picture="gallery.png")
    assert unfounded_numbers(card, json.loads(run.to_json()), *template_texts()) == []
    assert len(NUMBER.findall(card)) > 15
    # The check sees a number that nobody measured, and one that was rounded wrongly.
    assert unfounded_numbers(card + "\nIt reaches 99.9.", json.loads(run.to_json()), *template_texts()) == ["99.9"]
    assert unfounded_numbers("75.2", json.loads(run.to_json())) == ["75.2"]  # 75.27


@pytest.mark.parametrize("source", KEPT_CARDS, ids=lambda path: path.parent.name)
def test_the_cards_that_are_kept_are_those_of_the_numbers_beside_them(source: Path):
    cards = rendered(source)
    assert "README.md" in cards
    for name, card in cards.items():
        assert source.with_name(name).read_text(encoding="utf-8") == card, "run training/render_cards.py"
        assert unfounded_numbers(card, json.loads(source.read_text()), *template_texts()) == []


def test_there_are_cards_of_what_was_really_trained_here():
    assert {path.parent.name for path in KEPT_CARDS} >= {"shapes", "voc_animals_deit_tiny"}


def test_scores_stand_where_readers_and_the_hub_look_for_them(run: RunRecord):
    card = ModelCard(card_of(run))
    results = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results == {
        ("train", "mean_iou"): 75.27,
        ("val", "mean_iou"): 73.27,
        ("val", "mean_average_precision"): 91.08,
    }
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "timm/deit_tiny_patch16_224.fb_in1k"
    assert "| val | 435 | 72.3 | 48.5 | 73.1 | 73.3 | 0.31 |" in card.content
    assert 'settings = {"threshold": 0.31, "scales": [1.0, 0.75]}' in card.content
    assert "| pseudo labels | train | 77.8 |" in card.content
    segmenter = ModelCard(card_of(run, "deeplab"))
    assert [(result.metric_value, result.dataset_split) for result in segmenter.data.eval_results] == [
        (66.66, "val"), (68.18, "val"),
    ]  # fmt: skip


def test_what_was_not_measured_is_said_to_be_missing(tmp_path: Path):
    alone = RunRecord.from_folder(write_run(tmp_path / "alone", ("train",)))
    stages = {"train": {**alone.stages["train"], "metrics": {"loss": 1.0}}}
    card = card_of(RunRecord("alone", alone.classes, stages))
    assert card.count(NOT_MEASURED) >= 12
    assert "model-index" not in card
    assert "%" in card
    assert not re.search(r"\bNone\b|\bnan\b|null", card)


def test_a_ceiling_that_was_trained_on_masks_does_not_claim_weak_supervision(run: RunRecord, tmp_path: Path):
    recipe = {**RECIPE, "segmentation": {**RECIPE["segmentation"], "labels": "ground_truth"}}
    card = card_of(RunRecord.from_folder(write_run(tmp_path / "ceiling", recipe=recipe)), "deeplab")
    assert "trained on ground-truth masks" in card
    assert "No mask was seen" not in card
    assert "No mask was seen" in card_of(run, "deeplab")


def test_a_network_that_was_not_trained_has_no_card(tmp_path: Path):
    alone = RunRecord.from_folder(write_run(tmp_path / "alone", ("train", "seeds")))
    with pytest.raises(ValueError, match=r"run alone has no finished stage 'segmentation', which trains DeepLab"):
        card_of(alone, "deeplab")
    with pytest.raises(FileNotFoundError, match=r"train is not finished; run its recipe first"):
        RunRecord.from_folder(tmp_path)


def test_a_card_shows_the_recipe_and_not_where_the_data_lay(run: RunRecord):
    card = card_of(run)
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert shown["train"] == RECIPE["train"]
    assert shown["data"]["root"] == "VOC2012"
    assert "somebody" not in card + run.to_json()
    assert "Flickr" in card
    assert "`deit_tiny_patch16_224.fb_in1k`" in card


@pytest.mark.parametrize(("source", "words"), [
    ({"source": "shapes", "num_train": 250, "image_size": 64, "seed": 5}, "250 scenes of 64 x 64 pixels"),
    (
        {"source": "folder", "root": "/data/wasps", "train_split": None},
        "Somebody's own folder of images, wasps, split `all images`",
    ),
    ({"source": "coco", "root": "/data/coco", "train_split": "train2014"}, "MS COCO, split `train2014`"),
])  # fmt: skip
def test_a_card_says_what_the_network_was_trained_on(tmp_path: Path, source: dict[str, Any], words: str):
    recipe = {**RECIPE, "data": source}
    run = RunRecord.from_folder(write_run(tmp_path / "other", ("train", "seeds"), recipe))
    card = card_of(run)
    assert words in card
    assert ("Flickr" in card) == (source["source"] == "coco")


def test_markdown_has_neither_gaps_nor_traces_of_the_template(run: RunRecord):
    for network in ("bitrans", "affinitynet", "deeplab"):
        for card in (card_of(run, network), card_of(run, network, picture="gallery.png")):
            assert "\n\n\n" not in card
            assert "{%" not in card
            assert "{{" not in card.replace("version = {{", "")
            assert ("![" in card) == ("gallery.png" in card)
            for before, line in zip(card.splitlines(), card.splitlines()[1:], strict=False):
                if line.startswith("#"):
                    assert before == "", f"a heading needs an empty line before it: {line}"


def test_numbers_of_a_run_are_copied_and_all_cards_rendered_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path / "runs" / "animals")
    render_cards_main([str(tmp_path / "runs" / "animals"), "--cards", str(tmp_path / "cards")])
    folder = tmp_path / "cards" / "animals"
    assert {path.name for path in folder.iterdir()} == {"run.json", "README.md", "affinitynet.md", "deeplab.md"}
    assert (
        RunRecord.from_json((folder / "run.json").read_text()).metrics("predictions")["miou"]
        == METRICS["predictions"]["miou"]
    )
    assert "README.md" in capsys.readouterr().out
    assert rendered(folder / "run.json")["README.md"] == (folder / "README.md").read_text()
