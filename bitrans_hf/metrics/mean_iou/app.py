"""The page of the Space: two index images in, the scores out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate
import numpy as np


def score_files(
    prediction: str | None, reference: str | None, num_labels: float | None
) -> tuple[str, list[list[Any]]]:
    """Score one label map against another.

    Args:
        prediction: Path of an index image, for instance a palette PNG.
        reference: Path of the true one.
        num_labels: Number of label ids, background included.

    Returns:
        A sentence, and for each label that occurs its id, IoU and accuracy in percent; without rows, the sentence says
        what is wrong.
    """
    from PIL import Image

    if num_labels is None:
        return "Give the number of labels.", []
    if prediction is None or reference is None:
        return "Choose two index images, for instance palette PNGs.", []
    try:
        metric = evaluate.load(str(Path(__file__).with_name("mean_iou.py")), num_labels=int(num_labels))
        with Image.open(prediction) as predicted, Image.open(reference) as true:
            scores = metric.compute(predictions=[predicted], references=[true])
    except (ValueError, OSError) as error:
        return str(error), []
    pairs = zip(scores["per_category_iou"], scores["per_category_accuracy"], strict=True)
    rows = [
        [label, *(None if np.isnan(value) else round(100 * float(value), 2) for value in pair)]
        for label, pair in enumerate(pairs)
        if not np.isnan(pair).all()
    ]
    return f"Mean IoU {100 * scores['mean_iou']:.2f} % over the labels that occur.", rows


def build() -> Any:
    """Lay out the page."""
    import gradio

    with gradio.Blocks(title="Mean IoU") as page:
        gradio.Markdown("# Mean IoU of two label maps\nIndex images (palette or gray PNGs); 255 is left out.")
        with gradio.Row():
            prediction = gradio.File(label="Prediction", type="filepath")
            reference = gradio.File(label="Ground truth", type="filepath")
        num_labels = gradio.Number(21, label="Number of labels, background included", precision=0)
        button = gradio.Button("Score")
        sentence = gradio.Markdown()
        table = gradio.Dataframe(headers=["label", "IoU (%)", "accuracy (%)"], interactive=False)
        button.click(score_files, [prediction, reference, num_labels], [sentence, table])
    return page


if __name__ == "__main__":
    build().launch()
