"""The page of a run: images, curves and scores in one HTML file, and the same images as PNGs beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import atomic_write
from ..hub.labels import BACKGROUND, IGNORE_INDEX, palette
from .charts import Chart, draw_chart
from .drawing import (
    MASK,
    NUM_ROWS_IN_GRID,
    PHOTO,
    TARGET,
    GalleryLine,
    GalleryRow,
    displayed,
    draw_grid,
    gallery_columns,
    gallery_row,
)
from .tables import Table

_MAX_EMBEDDED_PNG_BYTES = 40_000


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
    """Write one self-contained HTML page, and the images as PNGs in a folder beside it.

    The folder has the page's name plus `_pictures`: `gallery.png` (the first rows as one figure), one PNG for each
    image and one for each chart. The page says where ground truth is missing.

    Args:
        path: The page to write; its folder is created if necessary.
        title: Heading.
        rows: Images to show.
        curves: Charts, see `charts_from_log`.
        tables: Tables, see `score_table` and `recipe_table`.
        notes: Sentences for the top of the page, one paragraph each.
        figures: Heading -> a figure about all images, below the tables.

    Returns:
        `path`.

    Raises:
        ValueError: an image's maps do not fit it (see `gallery_row`); no page is written then.
    """
    path = Path(path)
    pictures = path.with_name(f"{path.stem}_pictures")
    columns = gallery_columns(rows)
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
        _save_png(draw_grid(images[:NUM_ROWS_IN_GRID], columns, 160), pictures / "gallery.png")
        for number, (row, lines) in enumerate(zip(rows, images, strict=True), start=1):
            name = f"{number:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', row.image_id)}.png"
            _save_png(draw_grid([lines], columns, 240), pictures / name)
    if curves:
        parts.append('<h2>Training</h2><div class="charts">')
        for chart in curves:
            light, dark = (draw_chart(chart, dark=is_dark) for is_dark in (False, True))
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
            is_whole = column in (PHOTO, TARGET, MASK, *row.steps)
            of_class = f" · {line.class_name}" if len(lines) > 1 and not is_whole else ""
            caption = f"<figcaption>{escape(column + of_class)}</figcaption>"
            if column in line.cells:
                alt = escape(f"{column}{of_class} of {row.image_id}")
                picture = f'<img src="{_data_uri(displayed(line.cells[column], 240))}" alt="{alt}" loading="lazy">'
            elif column == TARGET and line_number == 0:
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
    """Return a legend of the label colors in a row."""
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


def _data_uri(image: Image.Image) -> str:
    """Encode an image for the page: PNG, or JPEG if that would be large, as for photographs."""
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
