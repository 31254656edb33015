"""A run's pseudo labels as a data set for the Hub, and its card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..file_names import label_files
from ..hub.errors import MissingFileError
from ..hub.labels import IGNORE_INDEX
from .markdown import literal


def pseudo_label_dataset(folder: str | Path, *, image_ids: list[str] | None = None) -> Dataset:
    """Read a folder of pseudo labels as a data set that can be saved, pushed to the Hub and joined by `image_id`.

    Args:
        folder: PNGs named `<image_id>.png`, in subfolders where ids have a "/"; see `file_names.label_path`.
        image_ids: Images to include, in this order; None: all, sorted.

    Returns:
        Columns `image_id` and `pseudo_label`, an Image of mode "P" whose values are label ids and whose palette is
        kept by `save_to_disk` and `push_to_hub`. Images are not included: their licences are their owners'.

    Raises:
        MissingFileError: an image without a label map, or a folder without any.
    """
    folder = Path(folder)
    paths = label_files(folder)
    if not paths:
        raise MissingFileError(f"no pseudo labels (<image_id>.png) in {folder}; make them first.")
    chosen = sorted(paths) if image_ids is None else image_ids
    missing = [image_id for image_id in chosen if image_id not in paths]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise MissingFileError(f"{len(missing)} of {len(chosen)} images have no pseudo label in {folder}: {shown}")
    features = datasets.Features({"image_id": datasets.Value("string"), "pseudo_label": datasets.Image()})
    columns = {"image_id": chosen, "pseudo_label": [str(paths[image_id]) for image_id in chosen]}
    return Dataset.from_dict(columns, features=features)


def pseudo_label_card(
    dataset: Dataset, class_names: list[str], recipe: Mapping[str, Any], metrics: Mapping[str, Any]
) -> str:
    """Write the data set's card: what the labels are, how they were made, and their score.

    Args:
        dataset: Of `pseudo_label_dataset`.
        class_names: Names of the object classes; label id 1 is the first.
        recipe: The stage's `recipe.json`.
        metrics: The stage's `metrics.json`. Its "miou" in percent, "images" and "made_with" are shown where present;
            without "miou" the card says that there is no score.

    Returns:
        Text of a README.md with its YAML head.
    """
    ids = [
        "| 0 | background |",
        *(f"| {number} | {literal(name)} |" for number, name in enumerate(class_names, start=1)),
    ]
    if "miou" in metrics:
        scored = f" over {metrics['scored']} images with known masks" if "scored" in metrics else ""
        score = f"Mean IoU against known masks: **{metrics['miou']:.2f} %**{scored}, background included."
    else:
        score = "They were not scored: no masks are known for these images."
    made_with = metrics.get("made_with", {})
    provenance = "\n".join(f"- {key}: `{value}`" for key, value in made_with.items())
    return CARD.format(
        count=len(dataset),
        category=_size_category(len(dataset)),
        ids="\n".join([*ids, f"| {IGNORE_INDEX} | unsure, to be ignored |"]),
        score=score,
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
        provenance=f"\nMade with\n{provenance}\n" if provenance else "",
    )


def _size_category(count: int) -> str:
    """Return the Hub's name for a number of rows."""
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < limit:
            return name
    return "100K<n<1M"


CARD = """---
task_categories:
- image-segmentation
tags:
- weakly-supervised
- pseudo-labels
- bitrans_hf
size_categories:
- {category}
---

# Pseudo labels

{count} segmentation masks that were computed from image-level labels alone; nobody drew or corrected them. The images
are not included: join by `image_id`.

{score}

| column | |
|---|---|
| `image_id` | name of the image in its own data set |
| `pseudo_label` | palette PNG at the image's size; its values are label ids |

| label id | class |
|---|---|
{ids}

## How they were made

```json
{recipe}
```
{provenance}"""
