"""A page to judge a run by: images, curves and scores in one HTML file, and the same images as PNGs beside it."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_write
from ..hub.errors import InputError
from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette
from ..hub.seeds import Seeds
from ..metrics.scores import SeedScores, StepScores

VARIANT_TITLES = {"sc_cam": "SC-CAM", "coarse_cam": "Coarse-CAM", "fused": "Product", "refined": "Refined seed"}
"""Heading of each seed variant, in the order of the columns."""

STEP_TITLES = {
    "seed": "Seed, cut at its background score",
    "low": "Refined seed, much background",
    "high": "Refined seed, little background",
    "confident": "What both agree upon",
    "walk": "After the random walk",
    "refined": "After the refiner",
    "single_scale": "Segmentation network, the image as it is",
    "multi_scale": "Several scales or flips",
    "crf": "After the dense CRF",
    "par": "After pixel-adaptive refinement",
}
"""Names of the steps from seeds to pseudo labels, and of those of the segmentation network's test, in a table."""

_PHOTO, _TARGET, _MASK = "Photo", "Ground truth", "Mask"
_MAX_EMBEDDED_PNG_BYTES = 40_000
_NUM_ROWS_IN_GRID = 8


@dataclass(frozen=True)
class GalleryRow:
    """One image and what the method made of it.

    Attributes:
        image_id: Name of the image.
        image: The photo, RGB.
        target: True label map (H, W) uint8 of the photo's size; None where it is not known.
        maps: Variant name -> seeds at the photo's size; the variants of `VARIANT_TITLES` come first, others follow.
        label_map: Predicted label map (H, W) uint8, or None.
        class_names: Names of all object classes, indexed by class id.
        caption: A short remark to stand beside the name.
        steps: Label maps (H, W) of later stages by their headings, shown after `label_map`.
    """

    image_id: str
    image: Image.Image
    target: npt.NDArray[np.uint8] | None
    maps: Mapping[str, Seeds]
    label_map: npt.NDArray[np.uint8] | None
    class_names: Sequence[str]
    caption: str = ""
    steps: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class GalleryLine:
    """One line of images: the maps of one class; photo, ground truth and mask stand in an image's first line only.

    Attributes:
        class_name: The class whose maps are shown, "" in an image without classes.
        cells: Column heading -> image at the photo's size.
    """

    class_name: str
    cells: Mapping[str, Image.Image]


@dataclass(frozen=True)
class Curve:
    """Values (n,) over steps (n,)."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves in one frame. A noisy curve is drawn with its running mean."""

    title: str
    curves: Sequence[Curve]
    log_scale: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text; columns after the first are set flush right. `best_row` is printed bold."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best_row: int | None = None
    folded: bool = field(default=False, kw_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def heat_overlay(image: Image.Image, cam: npt.NDArray[np.floating], strength: float = 0.5) -> Image.Image:
    """Blend a class map over its photo: blue is 0, red is 1.

    Args:
        image: Photo of any mode, W x H.
        cam: Map (H, W) in [0, 1].
        strength: Weight of the colors in [0, 1].

    Returns:
        An RGB image of the photo's size. The photo beneath is gray, so that its colors are not taken for heat.

    Raises:
        ValueError: the sizes differ or the map leaves [0, 1].
    """
    _check_size(image, cam, "class map")
    # Written so that nan fails too.
    if cam.size and not (cam.min() >= 0 and cam.max() <= 1):
        raise InputError(f"class map has values in [{cam.min():g}, {cam.max():g}]; normalize it to [0, 1] first.")
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    heat = matplotlib.colormaps["jet"](cam)[..., :3] * 255
    return _to_image((1 - strength) * grey + strength * heat)


def label_overlay(image: Image.Image, label_map: npt.NDArray[np.uint8], strength: float = 0.7) -> Image.Image:
    """Paint a label map over its photo in the VOC colors.

    Args:
        image: Photo of any mode, W x H.
        label_map: Label ids (H, W): background leaves a paler photo, ignored pixels become white.
        strength: Weight of the colors in [0, 1].

    Returns:
        An RGB image of the photo's size.

    Raises:
        ValueError: the sizes differ.
    """
    _check_size(image, label_map, "label map")
    colors = np.array(palette(), dtype=np.float32).reshape(256, 3)
    # Most palette colors are dark, so that they stand out on a pale photo.
    colors[[BACKGROUND, IGNORE_INDEX]] = 255
    weights = np.full(256, strength, dtype=np.float32)
    weights[[BACKGROUND, IGNORE_INDEX]] = (0.4, 1.0)
    weight = weights[label_map][..., None]
    return _to_image((1 - weight) * np.asarray(image.convert("RGB")) + weight * colors[label_map])


def gallery_row(row: GalleryRow) -> list[GalleryLine]:
    """Draw the gallery's lines of one image, one for each present class.

    Raises:
        ValueError: a map or label map does not have the photo's size (the image id is named).
    """
    try:
        whole = {_PHOTO: row.image.convert("RGB")}
        if row.target is not None:
            whole[_TARGET] = label_overlay(row.image, row.target)
        masks = {} if row.label_map is None else {_MASK: label_overlay(row.image, row.label_map)}
        masks |= {heading: label_overlay(row.image, label_map) for heading, label_map in row.steps.items()}
        class_ids = sorted({int(class_id) for seeds in row.maps.values() for class_id in seeds.class_ids})
        lines = [
            GalleryLine(
                row.class_names[class_id],
                {
                    _variant_title(variant): heat_overlay(row.image, seeds.maps[position])
                    for variant, seeds in row.maps.items()
                    for position in np.flatnonzero(seeds.class_ids == class_id)
                },
            )
            for class_id in class_ids
        ] or [GalleryLine("", {})]
    except InputError as error:
        raise InputError(f"{row.image_id}: {error}") from error
    return [GalleryLine(lines[0].class_name, {**whole, **lines[0].cells, **masks}), *lines[1:]]


def figure_grid(rows: Sequence[GalleryRow], height: int = 160) -> Image.Image:
    """Set a grid of images with column headings, as Figure 3 of the paper.

    Args:
        rows: Images to show, top to bottom.
        height: Largest height of one image in pixels.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise InputError("figure_grid got no rows; give at least one image.")
    return _draw_grid([gallery_row(row) for row in rows], _columns(rows), height)


# ---------------------------------------------------------------------------------------------------------------------
# Curves and tables


def charts_from_log(path: str | Path) -> list[Chart]:
    """Read the curves of a training log.

    Args:
        path: `log.jsonl`, one JSON object for each line with "step" and any of "loss", "class", "patch", "scc",
            "pac", "background", "foreground", "negative", "lr" (training) or "map_class", "map_patch", "map",
            "miou" (validation, in percent). Where a step is there twice, as after a resume, the later line counts. A
            half-written last line is left out.

    Returns:
        The charts for which there are numbers.
    """
    series: dict[str, dict[float, float]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.get("step", record.get("epoch"))
        for name, value in record.items():
            if step is not None and isinstance(value, int | float):
                series.setdefault(name, {})[float(step)] = float(value)

    def curves(names: Mapping[str, str]) -> list[Curve]:
        found = [(title, sorted(series[name].items())) for name, title in names.items() if name in series]
        return [Curve(title, [s for s, _ in points], [v for _, v in points]) for title, points in found]

    branches = {"class": "class tokens", "patch": "patch tokens"}
    pairs = {"background": "background pairs", "foreground": "object pairs", "negative": "unlike pairs"}
    terms = {**branches, "scc": "SCC", "pac": "PAC", **pairs}
    charts = [
        Chart("Loss", curves({"loss": "total"}), smooth=True),
        Chart("Terms of the loss", curves(terms), log_scale=True, smooth=True),
        Chart("Validation mAP (%)", curves({**{f"map_{key}": name for key, name in branches.items()}, "map": "tags"})),
        Chart("Validation mIoU (%)", curves({"miou": "one scale"})),
        Chart("Learning rate", curves({"lr": "learning rate"})),
    ]
    return [chart for chart in charts if chart.curves]


def score_table(scores: SeedScores, title: str = "Scores") -> Table | None:
    """Make the table of the seed variants of one split, the best one marked; None if nothing was scored."""
    if not scores.miou:
        return None
    names = _ordered_variants(scores.miou)
    rows = [
        [
            _variant_title(name),
            f"{scores.miou[name]:.1f}",
            f"{scores.threshold[name]:.2f}" if name in scores.threshold else "-",
        ]
        for name in names
    ]
    best = max(range(len(names)), key=lambda index: scores.miou[names[index]])
    return Table(title, ["Seed", "mIoU (%)", "best threshold"], rows, best)


def step_table(scores: StepScores, title: str = "Steps") -> Table | None:
    """Make the table of the steps of a stage: from seeds to pseudo labels, or of the segmentation network's test.

    Returns:
        The table with the best step marked, or None if nothing was scored. Steps that leave pixels out are not
        compared.
    """
    if not scores.steps:
        return None
    several = scores.several_classes.steps if scores.several_classes else {}
    rows = []
    for name, miou in scores.steps.items():
        share = f" ({scores.sure[name]:.0f} % of the pixels)" if name in scores.sure else ""
        rows.append(
            [STEP_TITLES.get(name, name) + share, f"{miou:.1f}", *([f"{several[name]:.1f}"] if several else [])]
        )
    whole = [index for index, name in enumerate(scores.steps) if name not in scores.sure]
    best = max(whole, key=lambda index: list(scores.steps.values())[index], default=None)
    columns = ["Step", "mIoU (%)", *(["several classes (%)"] if several else [])]
    return Table(title, columns, rows, best)


def recipe_table(recipe: Mapping[str, Any], title: str = "Recipe") -> Table:
    """Make a folded table of a recipe; keys of nested parts are joined by dots."""

    def flat(part: Mapping[str, Any], prefix: str) -> Iterable[list[str]]:
        for key, value in part.items():
            if isinstance(value, Mapping) and value:
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield [f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)]

    return Table(title, ["Setting", "Value"], list(flat(recipe, "")), folded=True)


def confusion_picture(counts: npt.NDArray[np.integer], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Draw confusion counts as shares of each true label: the diagonal is what was found.

    Args:
        counts: Pixel counts (R, C), rows are true labels.
        rows: Names of the R true labels.
        columns: Names of the C predicted labels.

    Returns:
        An RGB image. With up to 25 labels the shares stand in the cells, in percent; a label that is in no target
        has an empty row.

    Raises:
        ValueError: the numbers of names and of counts differ.
    """
    if counts.shape != (len(rows), len(columns)):
        raise InputError(f"counts have shape {counts.shape}, expected {(len(rows), len(columns))} for these names.")
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100.0 * counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    few = len(columns) <= 25
    side = max(3.5, 1.6 + 0.36 * len(columns)) if few else 2.0 + 0.17 * len(columns)
    figure = Figure(figsize=(side, side), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    # The root of a share, because most confusions are below ten percent and would all look like none.
    axes.imshow(np.sqrt(shares / 100.0), cmap="Blues", vmin=0, vmax=1)
    size = 8 if few else 6
    axes.set_xticks(range(len(columns)), [_plot_text(name) for name in columns], fontsize=size, rotation=90)
    axes.set_yticks(range(len(rows)), [_plot_text(name) for name in rows], fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=size + 1)
    axes.set_ylabel("true", fontsize=size + 1)
    axes.set_title("Share of each true label, %", loc="left", fontsize=size + 2, fontweight="bold")
    for (row, column), share in np.ndenumerate(shares):
        if few and share >= 0.5:
            color = "white" if share > 40 else "#1d2329"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color)
    for edge in axes.spines.values():
        edge.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_report(
    path: str | Path,
    *,
    title: str,
    rows: Sequence[GalleryRow],
    curves: Sequence[Chart] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    figures: Mapping[str, Image.Image] | None = None,
) -> Path:
    """Write one HTML page that needs no other file, and the images as PNGs in a folder beside it.

    The folder is called as the page, with `_pictures`: `gallery.png` (the first rows as one figure), one PNG for each
    image and one for each chart. The page says where ground truth is missing.

    Args:
        path: The page to write; its folder is made.
        title: Heading.
        rows: Images to show.
        curves: Charts, see `charts_from_log`.
        tables: Tables, see `score_table` and `recipe_table`.
        notes: Sentences to stand at the top, one paragraph each.
        figures: Heading -> a figure about all images, below the tables.

    Returns:
        `path`.

    Raises:
        ValueError: an image's maps do not fit it (see `gallery_row`); no page is written then.
    """
    path = Path(path)
    pictures = path.with_name(f"{path.stem}_pictures")
    columns = _columns(rows)
    images = [gallery_row(row) for row in rows]

    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in [*notes, *_ground_truth_notes(rows)]]
    parts += [_table_html(table) for table in tables if not table.folded]
    for heading, picture in (figures or {}).items():
        parts.append(
            f'<h2>{escape(heading)}</h2><figure style="max-width: {picture.width}px">'
            f'<img src="{_data_uri(picture)}" alt="{escape(heading)}"></figure>'
        )
    if rows:
        parts.append("<h2>Images</h2>")
        parts += [_picture_html(row, lines, columns) for row, lines in zip(rows, images, strict=True)]
        _save_png(_draw_grid(images[:_NUM_ROWS_IN_GRID], columns, 160), pictures / "gallery.png")
        for number, (row, lines) in enumerate(zip(rows, images, strict=True), start=1):
            name = f"{number:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', row.image_id)}.png"
            _save_png(_draw_grid([lines], columns, 240), pictures / name)
    if curves:
        parts.append('<h2>Training</h2><div class="charts">')
        for chart in curves:
            light, dark = (_draw_chart(chart, dark=is_dark) for is_dark in (False, True))
            parts.append(
                f'<figure><picture><source srcset="{_data_uri(dark)}" media="(prefers-color-scheme: dark)">'
                f'<img src="{_data_uri(light)}" alt="{escape(chart.title)}"></picture></figure>'
            )
            _save_png(light, pictures / f"chart_{re.sub(r'[^a-z0-9]+', '_', chart.title.lower()).strip('_')}.png")
        parts.append("</div>")
    parts += [_table_html(table) for table in tables if table.folded]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

# On a wide screen every image stands in its column; on a narrow one they flow, two side by side.
_STYLE = """
:root { --ink: #1d2329; --soft: #66707a; --line: #e2e6ea; --paper: #ffffff; --card: #f6f8fa; --accent: #2f6fde; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #98a2ac; --line: #2d333a; --paper: #14171a; --card: #1c2126; --accent: #7aa7f5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 2rem clamp(1rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 1rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 1rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; font-weight: 600; overflow-wrap: anywhere; }
h3 small { font-weight: 400; color: var(--soft); margin-left: .5rem; }
.note { max-width: 75ch; margin: .5rem 0; padding: .4rem .9rem; border-left: 3px solid var(--accent);
  background: var(--card); }
.chip { display: inline-block; font-weight: 400; font-size: .85rem; margin-left: .7rem; white-space: nowrap; }
.chip i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .35em;
  outline: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.4rem .4rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
.right th:not(:first-child), .right td:not(:first-child) { text-align: right; padding: .4rem 0 .4rem 1.6rem; }
tr.best td { font-weight: 650; }
details { margin-top: 2.5rem; }
summary { font-size: 1.25rem; font-weight: 700; cursor: pointer; margin-bottom: .8rem; }
details td { font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
article { padding: 1rem 0 1.2rem; border-top: 1px solid var(--line); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .8rem; margin-top: .25rem; }
.strip { display: grid; gap: .8rem .6rem; grid-template-columns: repeat(2, minmax(0, 1fr)); align-items: start; }
.missing { display: grid; place-items: center; aspect-ratio: var(--shape); border: 1px dashed var(--line);
  border-radius: 4px; color: var(--soft); font-size: .8rem; text-align: center; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
@media (min-width: 560px) { .strip { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
@media (min-width: 960px) {
  .strip { grid-template-columns: repeat(var(--columns), minmax(0, 210px)); }
  .strip figure { grid-column: var(--column); }
}
"""


def _picture_html(row: GalleryRow, lines: Sequence[GalleryLine], columns: Sequence[str]) -> str:
    width, height = row.image.size
    figures = []
    for line_number, line in enumerate(lines):
        for column_number, column in enumerate(columns, start=1):
            place = f'style="--column: {column_number}"'
            is_whole = column in (_PHOTO, _TARGET, _MASK, *row.steps)
            of_class = f" · {line.class_name}" if len(lines) > 1 and not is_whole else ""
            caption = f"<figcaption>{escape(column + of_class)}</figcaption>"
            if column in line.cells:
                alt = escape(f"{column}{of_class} of {row.image_id}")
                picture = f'<img src="{_data_uri(_display(line.cells[column], 240))}" alt="{alt}" loading="lazy">'
            elif column == _TARGET and line_number == 0:
                picture = f'<div class="missing" style="--shape: {width} / {height}">not known</div>'
            else:
                continue
            figures.append(f"<figure {place}>{picture}{caption}</figure>")
    small = f"<small>{escape(row.caption)}</small>" if row.caption else ""
    return (
        f"<article><h3>{escape(row.image_id)}{_legend_html(row)}{small}</h3>"
        f'<div class="strip" style="--columns: {len(columns)}">{"".join(figures)}</div></article>'
    )


def _legend_html(row: GalleryRow) -> str:
    """Name the color of every label id that the row shows."""
    labels = {int(class_id) + 1 for seeds in row.maps.values() for class_id in seeds.class_ids}
    for label_map in (row.target, row.label_map, *row.steps.values()):
        if label_map is not None:
            labels |= set(np.unique(label_map).tolist())
    colors = palette()
    chips = []
    for label in sorted(labels - {BACKGROUND, IGNORE_INDEX}):
        name = row.class_names[label - 1] if label <= len(row.class_names) else f"label {label}"
        rgb = ", ".join(map(str, colors[3 * label : 3 * label + 3]))
        chips.append(f'<span class="chip"><i style="background: rgb({rgb})"></i>{escape(name)}</span>')
    return "".join(chips)


def _table_html(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(
        ('<tr class="best">' if number == table.best_row else "<tr>")
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for number, cells in enumerate(table.rows)
    )
    kind = "" if table.folded else ' class="right"'
    html = f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    title = escape(table.title)
    if table.folded:
        return f"<details><summary>{title}</summary>{html}</details>"
    return f"<section><h2>{title}</h2>{html}</section>"


def _ground_truth_notes(rows: Sequence[GalleryRow]) -> list[str]:
    num_unknown = sum(row.target is None for row in rows)
    if num_unknown == 0:
        return []
    which = "all" if num_unknown == len(rows) else f"{num_unknown} of {len(rows)}"
    return [f"Images without a ground-truth mask: {which}. These can be judged by eye only."]


def _columns(rows: Sequence[GalleryRow]) -> list[str]:
    """Headings in the order of the method, of what at least one row has."""
    variants = _ordered_variants(variant for row in rows for variant in row.maps)
    has_target = any(row.target is not None for row in rows)
    has_mask = any(row.label_map is not None for row in rows)
    titles = [_variant_title(variant) for variant in variants]
    steps = dict.fromkeys(heading for row in rows for heading in row.steps)
    return [_PHOTO, *([_TARGET] if has_target else []), *titles, *([_MASK] if has_mask else []), *steps]


def _ordered_variants(variants: Iterable[str]) -> list[str]:
    """Known variants in the order of `VARIANT_TITLES`, then the others; each once."""
    found = dict.fromkeys(variants)
    return [
        *(name for name in VARIANT_TITLES if name in found),
        *(name for name in found if name not in VARIANT_TITLES),
    ]


def _variant_title(variant: str) -> str:
    return VARIANT_TITLES.get(variant, variant)


def _draw_grid(images: Sequence[Sequence[GalleryLine]], columns: Sequence[str], height: int) -> Image.Image:
    """Set the lines into one figure; the class name stands left of each line."""
    gap, head = 6, 30
    font = ImageFont.truetype(_font_file(), 14)
    lines = [
        (number, drawable(line.class_name), {column: _display(cell, height) for column, cell in line.cells.items()})
        for number, image in enumerate(images)
        for line in image
    ]
    photo_sizes = {number: cells[_PHOTO].size for number, _, cells in lines if _PHOTO in cells}
    cell_width = max(width for width, _ in photo_sizes.values())
    cell_width = max(cell_width, *(int(font.getlength(column)) for column in columns))
    margin = max(int(font.getlength(name)) for _, name, _ in lines) + 2 * gap
    total_height = head + sum(photo_sizes[number][1] + gap for number, _, _ in lines)
    grid = Image.new("RGB", (margin + len(columns) * (cell_width + gap), total_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, column in enumerate(columns):
        middle = margin + index * (cell_width + gap) + cell_width / 2
        draw.text((middle, head / 2), column, fill="#222222", font=font, anchor="mm")
    top = head
    for number, class_name, cells in lines:
        line_height = photo_sizes[number][1]
        draw.text((gap, top + line_height / 2), class_name, fill="#222222", font=font, anchor="lm")
        for index, column in enumerate(columns):
            left = margin + index * (cell_width + gap)
            if column in cells:
                grid.paste(cells[column], (left + (cell_width - cells[column].width) // 2, top))
            elif column == _TARGET and _PHOTO in cells:
                centre = (left + cell_width / 2, top + line_height / 2)
                draw.text(centre, "not known", fill="#888888", font=font, anchor="mm")
        top += line_height + gap
    return grid


def drawable(text: str) -> str:
    """Write characters that the font of images lacks by their numbers: names stay different, and are no boxes."""
    known = _font_characters()
    return "".join(
        sign if ord(sign) in known else sign.encode("ascii", "backslashreplace").decode("ascii") for sign in text
    )


def _plot_text(text: str) -> str:
    """Return a text that matplotlib sets as it is: it takes what stands between dollar signs for a formula."""
    return drawable(text).replace("$", r"\$")


def _font_file() -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _font_characters() -> frozenset[int]:
    return frozenset(FT2Font(str(_font_file())).get_charmap())


def _draw_chart(chart: Chart, *, dark: bool) -> Image.Image:
    """Draw a chart, 800 x 480 pixels, by the object interface: pyplot keeps global state and may want a display."""
    ink, soft, paper = ("#e6e9ec", "#3a424a", "#14171a") if dark else ("#1d2329", "#e2e6ea", "#ffffff")
    colors = ["#4c86f0", "#e8853a", "#2fa577", "#c05fb0"]
    figure = Figure(figsize=(5, 3), dpi=160, facecolor=paper, layout="constrained")
    axes = figure.add_subplot(facecolor=paper)
    for index, curve in enumerate(chart.curves):
        color = colors[index % len(colors)]
        steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
        window = max(1, values.size // 30)
        if chart.smooth and window > 1:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
            steps, values = (np.convolve(a, np.full(window, 1 / window), "valid") for a in (steps, values))
        marker = "o" if values.size <= 30 and not chart.smooth else ""
        axes.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=3.5, label=curve.name)
    if chart.log_scale and any(value > 0 for curve in chart.curves for value in curve.values):
        axes.set_yscale("log")
    axes.set_title(chart.title, loc="left", fontsize=10, fontweight="bold", color=ink)
    axes.set_xlabel("step", fontsize=8, color=ink)
    axes.tick_params(labelsize=8, colors=ink, length=0, which="both")
    axes.grid(color=soft, linewidth=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(chart.curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _display(image: Image.Image, height: int) -> Image.Image:
    """Bring an image near a height: large ones shrink, small ones grow by a whole factor, pixels visible."""
    if image.height > height:
        return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
    factor = height // image.height
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _data_uri(image: Image.Image) -> str:
    """Encode an image for the page: PNG, but JPEG where that would be heavy, as for photographs."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    kind = "png"
    if buffer.tell() > _MAX_EMBEDDED_PNG_BYTES:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _save_png(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def _check_size(image: Image.Image, array: npt.NDArray[Any], name: str) -> None:
    width, height = image.size
    if array.shape != (height, width):
        raise InputError(
            f"{name} has shape {array.shape} and the photo is {height} x {width} (height x width); bring the {name} "
            "to the photo's size first."
        )


def _to_image(pixels: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(pixels.round().astype(np.uint8))
