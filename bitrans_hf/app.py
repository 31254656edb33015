"""A web page to try a model: drop an image, choose labels, see its maps and mask, click a patch to see its affinity.

`bitrans app --model FOLDER_OR_REPO` runs it here, `write_space` makes the folder of a Space. The network runs once per
image and scale; moving a slider only recombines its outputs.
"""

from __future__ import annotations

import functools
import html
import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageDraw

from .commands import if_stopped
from .file_names import label_path
from .files import lies_in
from .hub.errors import InputError
from .hub.image_processing_bitrans import BiTransImageProcessor
from .hub.labels import palette
from .hub.maps import ClassMaps, fused_maps, min_max_normalized, resized, strongest_row, sum_over_scales
from .hub.pipeline_bitrans import PseudoMaskPipeline, open_picture
from .hub.seeds import seed_variants
from .refine.pseudo_labels import write_label_png
from .report.drawing import VARIANT_TITLES, heat_overlay, label_overlay

SCALES = (1.0, 0.75, 1.25, 1.5)
"""Scales that the slider adds, in order."""

MAX_SIDE = 512
"""Longest side in pixels at scale 1. The attention of all layers is kept: at scale 1.5 some 1,800 tokens for each of
two views, about 0.3 GB for 12 layers."""

CLICKABLE_SIDE = 800
"""Pixels on the longer side of the clickable image: more than the page's layout shows."""

PICTURES_KEPT = 8
"""Number of images, over all visitors, whose maps are kept; others are computed again."""


# ---- What the network says of an image.


@dataclass(frozen=True)
class ScaleMaps:
    """One scale of an image and its horizontal flip (V = 2 views), C classes, L layers, h x w = N patches.

    Attributes:
        class_attention: (V, L, C, h, w) class-to-patch attention of every layer, mean over heads.
        coarse_cam: (V, C, h, w) before the ReLU.
        affinity: (V, N, N) patch affinity, as the model's configuration says.
        probabilities: (C,) of each class' presence, mean over the views.
    """

    class_attention: torch.Tensor
    coarse_cam: torch.Tensor
    affinity: torch.Tensor
    probabilities: torch.Tensor


class PictureMaps:
    """All maps of one image. A scale is computed on first use, then kept.

    Args:
        pipe: Model and image processor.
        path: File of the image.

    Raises:
        ValueError: the file is not an image or smaller than a patch; the message is one sentence for the user.
    """

    def __init__(self, pipe: PseudoMaskPipeline, path: str | Path):
        image = open_picture(path)
        self.size = (image.height, image.width)
        self.processor = cast("BiTransImageProcessor", pipe.image_processor)
        self.image = self.processor.bounded(image, max_side=MAX_SIDE)
        self.model = pipe.model
        patch_size = self.model.config.patch_size
        if round(min(self.image.size) * min(SCALES)) < patch_size:
            smallest = -int(-patch_size // min(SCALES))
            raise InputError(
                f"The image is {self.size[0]} x {self.size[1]} pixels (height x width), too small for this model, "
                f"which needs {smallest} on each side once the longer one is reduced to {MAX_SIDE}."
            )
        self._scales: dict[float, ScaleMaps] = {}
        self._seeds: tuple[Any, dict[str, torch.Tensor]] = (None, {})

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches at scale 1."""
        h, w = self.at_scale(1.0).coarse_cam.shape[2:]
        return h, w

    @property
    def probabilities(self) -> torch.Tensor:
        """(C,) probability of each class' presence at scale 1."""
        return self.at_scale(1.0).probabilities

    @torch.no_grad()
    def at_scale(self, scale: float) -> ScaleMaps:
        """Pass the image and its flip through the network, unless the maps are kept."""
        if scale not in self._scales:
            (view,) = self.processor.scaled_views(self.image, (scale,))
            view = view.to(device=self.model.device, dtype=self.model.dtype)
            output = self.model(torch.cat([view, view.flip(-1)]), output_attentions=True)
            num_classes, grid = output.coarse_cam.shape[1], output.coarse_cam.shape[2:]
            by_layer = [attention[:, :num_classes, num_classes:].unflatten(2, grid) for attention in output.attentions]
            self._scales[scale] = ScaleMaps(
                torch.stack(by_layer, dim=1).float().cpu(),
                output.coarse_cam.float().cpu(),
                output.affinity.float().cpu(),
                output.logits.float().sigmoid().mean(dim=0).cpu(),
            )
        return self._scales[scale]

    def seeds(self, class_ids: Sequence[int], num_scales: int, num_layers: int) -> dict[str, torch.Tensor]:
        """Combine the kept maps; the last result is kept too, for later thresholds.

        Args:
            class_ids: The K classes that the image shows.
            num_scales: Number of `SCALES` to average.
            num_layers: Number of last layers that give the SC-CAM (K of Eq. 2).

        Returns:
            Each of `seed_variants` -> (K, H', W') in [0, 1] at the size of `image`.
        """
        question, ids = (tuple(class_ids), num_scales, num_layers), list(class_ids)
        asked_before, answer = self._seeds
        if asked_before == question:
            return answer
        size = (self.image.height, self.image.width)

        def maps_of(scale: float) -> dict[str, torch.Tensor]:
            kept = self.at_scale(scale)
            sc_cam = kept.class_attention[:, -num_layers:, ids].mean(dim=1)
            maps = ClassMaps(sc_cam, kept.coarse_cam[:, ids], kept.affinity)
            config = self.model.config
            spread = {"refine_steps": config.refine_steps, "normalize_affinity": config.normalize_affinity}
            return {
                name: fused_maps(maps, mode, refine=refine, flip=True, **spread)[0]
                for name, (mode, refine) in seed_variants(config.fusion).items()
            }

        totals = sum_over_scales(map(maps_of, SCALES[:num_scales]), size)
        answer = {name: min_max_normalized(maps) for name, maps in totals.items()}
        self._seeds = (question, answer)
        return answer

    def label_map(
        self, class_ids: Sequence[int], seeds: torch.Tensor, threshold: float, size: tuple[int, int]
    ) -> np.ndarray:
        """Cut seeds (K, H', W') into a label map (H, W) uint8: 0 background, class id + 1."""
        rows = chain([torch.full(size, threshold)], (resized(row, size) for row in seeds))
        label_map: np.ndarray = strongest_row([0, *(class_id + 1 for class_id in class_ids)], rows).numpy()
        return label_map

    def affinity_row(self, row: int, column: int) -> torch.Tensor:
        """Return how much a patch attends to every patch, as a map (h, w) in [0, 1].

        0 and 1 are the lowest and highest attention to another patch; attention to itself, often the highest, is drawn
        as 1.
        """
        h, w = self.grid
        query = row * w + column
        affinity = self.at_scale(1.0).affinity[0, query]
        others = torch.cat([affinity[:query], affinity[query + 1 :]])
        low, high = (others.min(), others.max()) if len(others) else (affinity[0], affinity[0])
        values = (affinity - low) / (high - low).clamp(min=torch.finfo(affinity.dtype).tiny)
        values[query] = 1
        return values.clamp(0, 1).reshape(h, w)


# ---- The page.

STYLE = """
.gradio-container { max-width: 1240px !important; }
#panels { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; }
#panels > * { min-width: 0 !important; }
#panels .image-container, #affinity .image-container { height: auto; }
#panels button, #affinity button, #panels .image-frame, #affinity .image-frame { width: 100%; height: auto; }
#panels img, #affinity img { width: 100%; height: auto; object-fit: contain; }
#panels label, #affinity label { position: static; border: 0; width: 100%; border-radius: 0; }
#panels .empty, #affinity .empty { min-height: 6em; height: 6em; }
#affinity img { cursor: crosshair; }
#status { min-height: 1.6em; }
#status .bad { color: #b3261e; font-weight: 600; }
.dark #status .bad { color: #ff8a80; }
.chip { display: inline-block; margin: 0 .8em .3em 0; }
.chip i { display: inline-block; width: .9em; height: .9em; margin-right: .35em; border-radius: 2px;
          vertical-align: -.1em; border: 1px solid #8888; }
@media (max-width: 640px) { #panels { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""

INTRODUCTION = """# Masks from labels
Drop an image and say what it shows. The model never saw a mask: it was trained on labels alone."""


def build_app(pipe: PseudoMaskPipeline) -> gr.Blocks:
    """Lay out the page and connect its controls.

    Args:
        pipe: Model and image processor, see `PseudoMaskPipeline.from_pretrained`.
    """
    with gr.Blocks(title="Masks from labels", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as app:
        gr.Markdown(INTRODUCTION)
        current = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                question = lay_out_question(pipe)
            with gr.Column(scale=3, min_width=280):
                result = lay_out_result(pipe.model.config.threshold)
                affinity = lay_out_affinity()
        page = Page(pipe, current, question, result, affinity)
        page.connect(app)
    return cast("gr.Blocks", app)


@dataclass(frozen=True)
class QuestionControls:
    """Controls for the image and its labels."""

    file: gr.File
    status: gr.HTML
    labels: gr.Dropdown
    guess: gr.Button
    scales: gr.Slider
    layers: gr.Slider


def lay_out_question(pipe: PseudoMaskPipeline) -> QuestionControls:
    """Lay out the left column."""
    config = pipe.model.config
    return QuestionControls(
        file=gr.File(label="Image (drop it here)", type="filepath", height=110, elem_id="image"),
        status=gr.HTML(say("Drop an image to begin."), elem_id="status"),
        labels=gr.Dropdown(names_of(pipe), value=[], multiselect=True, label="Labels", elem_id="labels"),
        guess=gr.Button("Guess the labels", elem_id="guess"),
        scales=gr.Slider(
            1, len(SCALES), 1, step=1, label="Scales", elem_id="scales",
            info=f"how many of {', '.join(f'{scale:g}' for scale in SCALES)} are averaged",
        ),
        layers=gr.Slider(
            1, config.num_hidden_layers, config.num_seed_layers, step=1, label="Layers", elem_id="layers",
            info="how many of the last ones give the SC-CAM",
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class ResultControls:
    """The maps of one class, by seed variant, and the mask of all classes."""

    shown_class: gr.Radio
    plain: gr.Image
    panels: Mapping[str, gr.Image]
    mask: gr.Image
    threshold: gr.Slider
    legend: gr.HTML
    download: gr.DownloadButton


def lay_out_result(threshold: float) -> ResultControls:
    """Lay out the maps, and below them the threshold, which starts at the one that is given, and the mask's legend."""
    shown_class = gr.Radio([], label="Class whose maps are shown", elem_id="shown")
    with gr.Row(elem_id="panels"):
        plain = still("Image", "The image, upright")
        panels = {
            variant: still(title, f"{title} of the chosen class over the image: blue low, red high")
            for variant, title in VARIANT_TITLES.items()
        }
        mask = still("Mask", "The mask of all labels over the image")
    with gr.Row():
        with gr.Column(min_width=200):
            slider = gr.Slider(
                0, 1, threshold, step=0.01, label="Threshold", info="higher: smaller masks", elem_id="threshold"
            )
            legend = gr.HTML("", elem_id="legend", min_height=40)
        download = gr.DownloadButton(
            "Download the mask (PNG)", variant="primary", interactive=False, elem_id="download"
        )
    return ResultControls(shown_class, plain, panels, mask, slider, legend, download)


@dataclass(frozen=True)
class AffinityControls:
    """One patch's affinity, and which patch."""

    image: gr.Image
    row: gr.Slider
    column: gr.Slider


def lay_out_affinity() -> AffinityControls:
    """Lay out the image to click on."""
    with gr.Row():
        image = gr.Image(
            label="Affinity: click a patch", interactive=False, buttons=[], format="jpeg", scale=1,
            min_width=240, elem_id="affinity",
            alt_text="How much the chosen patch attends to the others: blue low, red high",
        )  # fmt: skip
        with gr.Column(scale=1, min_width=200):
            row = gr.Slider(1, 2, 1, step=1, label="Patch row", elem_id="row")
            column = gr.Slider(
                1, 2, 1, step=1, label="Patch column", elem_id="column", info="the arrow keys do what a click does"
            )
    return AffinityControls(image, row, column)


Changes: TypeAlias = dict[Any, Any]
"""Component -> its new value, as gradio expects from a listener."""


class Page:
    """The behavior of the controls.

    Public methods are listeners: gradio calls them with the values of the components that `connect` names, the path of
    the current image first.

    Args:
        pipe: Model and image processor.
        current: Holds the path of the image that is shown.
        question: The left column.
        result: The maps and the mask.
        affinity: The patch's affinity.
    """

    def __init__(
        self,
        pipe: PseudoMaskPipeline,
        current: gr.State,
        question: QuestionControls,
        result: ResultControls,
        affinity: AffinityControls,
    ):
        self.current, self.question, self.result, self.affinity = current, question, result, affinity
        self.names = names_of(pipe)
        self.maps_of = functools.lru_cache(maxsize=PICTURES_KEPT)(functools.partial(PictureMaps, pipe))
        self.masks_folder = tempfile.TemporaryDirectory(prefix="bitrans_app_")

    def ids_of(self, chosen: Sequence[str]) -> list[int]:
        """Return the ids of classes, ascending."""
        return sorted(self.names.index(name) for name in chosen)

    def connect(self, app: gr.Blocks) -> None:
        """Connect methods to controls."""
        ask, result, affinity = self.question, self.result, self.affinity
        mask_inputs = [self.current, ask.labels, ask.scales, ask.layers, result.threshold]
        panel_inputs = [self.current, ask.labels, result.shown_class, ask.scales, ask.layers, result.threshold]
        mask_outputs = [result.mask, result.legend, result.download]
        panel_outputs = [*result.panels.values(), *mask_outputs]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        latest = {**quiet, "trigger_mode": "always_last"}

        label_outputs = [ask.status, ask.labels, result.shown_class]
        read = ask.file.change(
            self.read_picture,
            ask.file,
            [self.current, *label_outputs, result.plain, affinity.row, affinity.column, affinity.image],
            show_progress_on=ask.status,
            api_visibility="private",
        )
        guessed = ask.guess.click(self.guess_again, self.current, label_outputs, **quiet)
        chosen = ask.labels.input(
            self.choose_labels,
            [self.current, ask.labels, result.shown_class],
            [ask.status, result.shown_class],
            **latest,
        )
        for event in (read, guessed, chosen):
            event.then(self.draw_panels, panel_inputs, panel_outputs, **quiet).then(
                self.write_mask, mask_inputs, result.download, **quiet
            )
        for control in (ask.scales, ask.layers, result.shown_class):
            # A new scale takes the network's time, the others none: a clock runs where one waits.
            shown = {**latest, "show_progress": "minimal" if control is ask.scales else "hidden"}
            control.input(self.draw_panels, panel_inputs, panel_outputs, **shown).then(
                self.write_mask, mask_inputs, result.download, **quiet
            )
        result.threshold.input(self.draw_mask, mask_inputs, mask_outputs, **latest).then(
            self.write_mask, mask_inputs, result.download, **quiet
        )
        patch = [affinity.row, affinity.column]
        affinity.image.select(self.click_patch, self.current, [*patch, affinity.image], **quiet)
        for control in patch:
            control.input(self.move_patch, [self.current, *patch], affinity.image, **latest)
        app.unload(self.forget_visitor)

    # ---- An image and its labels.

    def read_picture(self, path: str | None) -> Changes:
        """Read a new image, guess its labels, and reset the page."""
        ask, result, affinity = self.question, self.result, self.affinity
        cleared: Changes = {
            result.shown_class: gr.Radio(choices=[], value=None),
            ask.labels: gr.Dropdown(value=[]),
            result.plain: None,
            affinity.image: None,
            self.current: None,
        }
        if path is None:
            return {**cleared, ask.status: say("Drop an image to begin.")}
        try:
            maps = self.maps_of(path)
            changes = self._guessed(maps)
        except InputError as error:
            return {**cleared, ask.status: say(without_path(str(error), path), bad=True)}
        h, w = maps.grid
        row, column = h // 2, w // 2
        return {
            **changes,
            self.current: path,
            result.plain: maps.image,
            affinity.row: gr.Slider(maximum=h, value=row + 1),
            affinity.column: gr.Slider(maximum=w, value=column + 1),
            affinity.image: draw_affinity(maps, row, column),
        }

    def guess_again(self, path: str | None) -> Changes:
        """Guess the labels."""
        if path is None:
            return {self.question.status: say("Drop an image to begin.")}
        return self._guessed(self.maps_of(path))

    def _guessed(self, maps: PictureMaps) -> Changes:
        guessed, sentence = guess(maps, self.names)
        return {
            self.question.status: say(sentence),
            self.question.labels: gr.Dropdown(value=guessed),
            self.result.shown_class: gr.Radio(choices=guessed, value=guessed[0]),
        }

    def choose_labels(self, path: str | None, chosen: list[str], shown: str | None) -> Changes:
        """Keep the class that is shown if it is still among the labels."""
        chosen = [name for name in self.names if name in chosen]
        sentence = "Choose what the image shows, or let the model guess."
        if path is None:
            sentence = "Drop an image to begin."
        elif chosen:
            shares = self.maps_of(path).probabilities
            sentence = "The model's own opinion: " + ", ".join(
                f"{name} {percent(shares[self.names.index(name)])}" for name in chosen
            )
        value = shown if shown in chosen else next(iter(chosen), None)
        return {
            self.question.status: say(sentence),
            self.result.shown_class: gr.Radio(choices=chosen, value=value),
        }

    # ---- Maps and mask.

    def draw_panels(
        self, path: str | None, chosen: list[str], shown: str | None, num_scales: int, layers: int, cut: float
    ) -> Changes:
        """Draw the maps of the class that is shown and the mask of all."""
        if path is None or not chosen:
            return {**dict.fromkeys(self.result.panels.values()), **self._no_mask()}
        maps, class_ids = self.maps_of(path), self.ids_of(chosen)
        seeds = maps.seeds(class_ids, num_scales, layers)
        position = class_ids.index(self.names.index(shown)) if shown in chosen else 0
        drawn = {
            self.result.panels[variant]: heat_overlay(maps.image, values[position].numpy())
            for variant, values in seeds.items()
        }
        return {**drawn, **self._mask(maps, class_ids, seeds["refined"], cut)}

    def draw_mask(self, path: str | None, chosen: list[str], num_scales: int, layers: int, cut: float) -> Changes:
        """Redraw the mask only: nothing else depends on the threshold."""
        if path is None or not chosen:
            return self._no_mask()
        maps, class_ids = self.maps_of(path), self.ids_of(chosen)
        return self._mask(maps, class_ids, maps.seeds(class_ids, num_scales, layers)["refined"], cut)

    def _no_mask(self) -> Changes:
        return {
            self.result.mask: None,
            self.result.legend: "",
            self.result.download: gr.DownloadButton(interactive=False),
        }

    def _mask(self, maps: PictureMaps, class_ids: list[int], seeds: torch.Tensor, cut: float) -> Changes:
        label_map = maps.label_map(class_ids, seeds, cut, (maps.image.height, maps.image.width))
        return {
            self.result.mask: label_overlay(maps.image, label_map),
            self.result.legend: legend_of(label_map, class_ids, self.names),
            self.result.download: gr.DownloadButton(interactive=False),  # until the file of this very mask is there
        }

    def write_mask(
        self, path: str | None, chosen: list[str], num_scales: int, layers: int, cut: float, request: gr.Request
    ) -> gr.DownloadButton:
        """Write the mask at the image's own size, in the visitor's own folder."""
        if path is None or not chosen:
            return gr.DownloadButton(interactive=False)
        maps, class_ids = self.maps_of(path), self.ids_of(chosen)
        seeds = maps.seeds(class_ids, num_scales, layers)["refined"]
        file = label_path(self._folder_of(request), f"{Path(path).stem}_mask")
        write_label_png(file, maps.label_map(class_ids, seeds, cut, maps.size))
        return gr.DownloadButton(value=str(file), interactive=True)

    def forget_visitor(self, request: gr.Request) -> None:
        """Delete the masks of a visitor who left."""
        shutil.rmtree(self._folder_of(request), ignore_errors=True)

    def _folder_of(self, request: gr.Request) -> Path:
        return Path(self.masks_folder.name) / str(request.session_hash)

    # ---- Affinity.

    def click_patch(self, path: str | None, event: gr.SelectData) -> Changes:
        """Move the query to the patch under the pointer."""
        affinity = self.affinity
        if path is None:
            return {affinity.image: None}
        maps = self.maps_of(path)
        h, w = maps.grid
        x, y = event.index
        height, width = clickable_size(maps)
        row, column = min(int(y * h / height), h - 1), min(int(x * w / width), w - 1)
        return {
            affinity.row: row + 1,
            affinity.column: column + 1,
            affinity.image: draw_affinity(maps, row, column),
        }

    def move_patch(self, path: str | None, row: int, column: int) -> Image.Image | None:
        """Move the query to the patch that the sliders name."""
        return None if path is None else draw_affinity(self.maps_of(path), int(row) - 1, int(column) - 1)


def names_of(pipe: PseudoMaskPipeline) -> list[str]:
    """Return the names of the model's classes in the order of their ids."""
    id2label = cast("Mapping[int, str]", pipe.model.config.id2label)
    return [id2label[class_id] for class_id in range(len(id2label))]


def still(label: str, alt_text: str) -> gr.Image:
    """A read-only image."""
    return gr.Image(label=label, interactive=False, buttons=[], alt_text=alt_text, format="jpeg", min_width=100)


def guess(maps: PictureMaps, names: Sequence[str]) -> tuple[list[str], str]:
    """Return the classes above 50 %, or the most likely one, in the order of their ids, and a sentence about them."""
    shares = maps.probabilities
    order = shares.argsort(descending=True).tolist()
    sure = [class_id for class_id in order if shares[class_id] > 0.5]
    told = ", ".join(f"{names[class_id]} {percent(shares[class_id])}" for class_id in sure or order[:3])
    sentence = f"The model sees: {told}" if sure else f"The model is not sure: {told}"
    return [names[class_id] for class_id in sorted(sure or order[:1])], sentence


def percent(share: torch.Tensor) -> str:
    """Format a probability: "98 %", without a line break."""
    return f"{100 * float(share):.0f}\N{NO-BREAK SPACE}%"


def without_path(sentence: str, path: str) -> str:
    """Return a message with the image's name instead of its path on the server."""
    sentence = sentence.replace(path, Path(path).name)
    return sentence[:1].upper() + sentence[1:]


def say(sentence: str, *, bad: bool = False) -> str:
    """Return the status line; screen readers announce its changes."""
    return f'<div role="status" aria-live="polite" class="{"bad" if bad else ""}">{html.escape(sentence)}</div>'


def legend_of(label_map: np.ndarray, class_ids: Sequence[int], names: Sequence[str]) -> str:
    """The colors of the mask with each class' share of the image."""
    colors = np.array(palette()).reshape(256, 3)
    chips = []
    for class_id in class_ids:
        color = "rgb({}, {}, {})".format(*colors[class_id + 1])
        share = (label_map == class_id + 1).mean()
        text = f"{html.escape(names[class_id])}, {100 * share:.0f} % of the image"
        chips.append(f'<span class="chip"><i style="background: {color}"></i>{text}</span>')
    return "".join(chips)


def draw_affinity(maps: PictureMaps, row: int, column: int) -> Image.Image:
    """Draw a patch's affinities over the image, with a frame around the patch."""
    h, w = maps.grid
    height, width = clickable_size(maps)
    heat = resized(maps.affinity_row(row, column)[None], (height, width))[0].clamp(0, 1)
    picture = heat_overlay(maps.image.resize((width, height), Image.Resampling.BICUBIC), heat.numpy())
    box = (column * width / w, row * height / h, (column + 1) * width / w, (row + 1) * height / h)
    ImageDraw.Draw(picture).rectangle(box, outline="white", width=max(1, round(width / 250)))
    return picture


def clickable_size(maps: PictureMaps) -> tuple[int, int]:
    """Return (H, W) of the clickable image. Gradio misplaces clicks on an image that is shown enlarged."""
    height, width = maps.image.height, maps.image.width
    factor = max(1.0, CLICKABLE_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


# ---- Running it.


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str | None = None,
    browser: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Load a model and serve the page; the page talks only to the machine that serves it.

    Args:
        model: Folder or repository, see `PseudoMaskPipeline.from_pretrained`.
        host: Address to listen at; "0.0.0.0" lets other machines in.
        port: Port to listen at; None: the variable GRADIO_SERVER_PORT, or the first free one from 7860.
        device: Of the model; None: a GPU if there is one.
        browser: Open the page in the browser.
        block: Serve until Ctrl-C, which raises `KeyboardInterrupt` here, instead of returning.
    """
    app = build_app(PseudoMaskPipeline.from_pretrained(model, device))
    # Fonts by name: gradio's own themes fetch theirs from the web.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        theme=theme,
        css=STYLE,
        footer_links=[],
        run_history=False,
        max_file_size="100mb",
        ssr_mode=False,
        share=False,
        prevent_thread_lock=True,  # gradio's own wait takes Ctrl-C for a success
        quiet=not block,
    )
    if block:
        if_stopped(lambda: "serving the page")
        try:
            while app.is_running:
                time.sleep(0.1)
        finally:
            app.close(verbose=False)
    return app


SPACE_CARD = """\
---
title: Masks from labels
emoji: 🎭
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
models:
- {model}
short_description: Image-level labels in, segmentation masks out
---

Drop an image, choose what it shows, and see the class maps, the refined seed and the mask of
[{model}](https://huggingface.co/{model}).
"""


def write_space(folder: str | Path, model: str) -> Path:
    """Write the folder of a Space that serves a model: `app.py`, `requirements.txt`, `README.md` and this package.

    The package is included as source, so that the Space behaves exactly as tested here.

    Args:
        folder: Created if necessary; files of an earlier call are replaced.
        model: Repository of the model on the Hub.

    Returns:
        The folder.

    Raises:
        InputError: `model` is not the name of a repository, or the folder holds other files.
    """
    if Path(model).exists() or model.count("/") != 1:
        raise InputError(
            f"a Space needs a model on the Hub such as 'org/bitrans-voc', got {model!r}; publish it first."
        )
    folder, package = Path(folder), Path(__file__).parent
    page = folder / "app.py"
    first_line = f"from {package.name}.app import serve\n"
    ours = page.is_file() and page.read_text(encoding="utf-8").startswith(first_line)
    if lies_in(package, folder) or (folder.is_dir() and any(folder.iterdir()) and not ours):
        raise InputError(f"{folder} holds files that are no Space of ours; name a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / package.name, ignore_errors=True)
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    page.write_text(f'{first_line}\nserve("{model}", host="0.0.0.0")\n', encoding="utf-8")
    needed = [line for line in importlib.metadata.requires("bitrans-hf") or [] if "extra" not in line]
    needed += [f"gradio=={gr.__version__}"]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(SPACE_CARD.format(gradio=gr.__version__, model=model), encoding="utf-8")
    return folder
