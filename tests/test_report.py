from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from bitrans_hf.hub.seeds import Seeds
from bitrans_hf.metrics.scores import SeedScores
from bitrans_hf.report.charts import Chart, Curve, charts_from_log, confusion_picture
from bitrans_hf.report.drawing import GalleryRow, figure_grid, gallery_row, heat_overlay, label_overlay
from bitrans_hf.report.page import write_report
from bitrans_hf.report.tables import Table, recipe_table, score_table

NAMES = ("cat", "dog", "<i>cow</i>")


def make_row(image_id="2007_000032", size=(12, 16), class_ids=(0, 2), *, known=True, variants=("sc_cam", "refined")):
    rng = np.random.default_rng(len(image_id))
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    maps = rng.random((len(class_ids), *size), dtype=np.float32)
    label_map = rng.choice([0, *(c + 1 for c in class_ids)], size).astype(np.uint8)
    seeds = Seeds(np.array(class_ids, dtype=np.int64), maps)
    target = label_map.copy() if known else None
    return GalleryRow(image_id, image, target, dict.fromkeys(variants, seeds), label_map, NAMES)


class Page(HTMLParser):
    """Collects text and addresses, and checks that every element is closed in order."""

    VOID = frozenset({"meta", "img", "source"})

    def __init__(self, path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in {"src", "srcset", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


# --- images -------------------------------------------------------------------------------------------------------


def test_heat_is_blended_over_the_grey_photo():
    image = Image.new("RGB", (2, 1), (90, 90, 90))
    overlay = np.asarray(heat_overlay(image, np.array([[0.0, 1.0]]), strength=0.25))
    cold, hot = (np.array(matplotlib.colormaps["jet"](value)[:3]) * 255 for value in (0.0, 1.0))
    np.testing.assert_allclose(overlay[0, 0], 0.75 * 90 + 0.25 * cold, atol=0.51)
    np.testing.assert_allclose(overlay[0, 1], 0.75 * 90 + 0.25 * hot, atol=0.51)


def test_labels_are_painted_in_voc_colors_and_ignored_pixels_white():
    image = Image.new("L", (3, 1), 100)
    overlay = np.asarray(label_overlay(image, np.array([[0, 1, 255]], dtype=np.uint8), strength=0.5))
    # Label 1 is (128, 0, 0) in the VOC palette; background moves 40 % of the way to white.
    np.testing.assert_array_equal(overlay[0], [[162, 162, 162], [114, 50, 50], [255, 255, 255]])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "RGB"])
def test_photos_of_any_mode_are_shown(mode):
    image = Image.new(mode, (4, 3))
    assert heat_overlay(image, np.zeros((3, 4))).mode == "RGB"
    assert label_overlay(image, np.zeros((3, 4), dtype=np.uint8)).size == (4, 3)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda image: heat_overlay(image, np.zeros((4, 3))), r"class map has shape \(4, 3\) .* 3 x 4"),
        (lambda image: heat_overlay(image, np.full((3, 4), 2.0)), r"values in \[2, 2\]; normalize"),
        (lambda image: heat_overlay(image, np.full((3, 4), np.nan)), "normalize it to"),
        (lambda image: label_overlay(image, np.zeros((1, 4), np.uint8)), r"label map has shape \(1, 4\)"),
        (lambda image: figure_grid([]), "no rows"),
    ],
)
def test_pictures_that_do_not_fit_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(Image.new("RGB", (4, 3)))


def test_each_present_class_has_its_line_and_the_first_holds_photo_and_masks():
    row = make_row(class_ids=(0, 2), variants=("refined", "sc_cam"))
    first, second = gallery_row(row)
    assert (first.class_name, second.class_name) == ("cat", "<i>cow</i>")
    assert set(first.cells) == {"Photo", "Ground truth", "SC-CAM", "Refined seed", "Mask"}
    assert set(second.cells) == {"SC-CAM", "Refined seed"}
    expected = heat_overlay(row.image, row.maps["sc_cam"].maps[1])
    np.testing.assert_array_equal(np.asarray(second.cells["SC-CAM"]), np.asarray(expected))


def test_an_image_without_classes_still_has_a_line():
    (line,) = gallery_row(make_row(class_ids=()))
    assert set(line.cells) == {"Photo", "Ground truth", "Mask"}


def test_small_pictures_grow_by_a_whole_factor_in_the_grid():
    row = make_row(size=(12, 16), class_ids=(0,), variants=("sc_cam",))
    grid = np.asarray(figure_grid([row], height=40))
    photo = np.asarray(row.image).repeat(3, axis=0).repeat(3, axis=1)  # 40 // 12 = 3
    windows = np.lib.stride_tricks.sliding_window_view(grid, photo.shape)[..., 0, :, :, :]
    assert sum((windows[y, x] == photo).all() for y, x in np.argwhere(windows[:, :, 0, 0, 0] == photo[0, 0, 0])) == 1


def test_large_pictures_shrink_to_the_height_of_the_grid():
    rows = [make_row(size=(300, 200)), make_row("b", size=(30, 60), class_ids=())]
    grid = figure_grid(rows, height=100)
    # Heading 30; two lines of 100 and one of 90, each with a gap of 6.
    assert grid.height == 30 + 2 * 106 + 96


# --- curves and tables ----------------------------------------------------------------------------------------------


def test_curves_come_from_the_log_with_the_last_word_on_each_step(tmp_path):
    records = [
        {"step": 2, "epoch": 0, "loss": 9.0, "class": 0.5, "patch": 0.4, "lr": 1e-4},
        {"step": 1, "epoch": 0, "loss": 3.0, "class": 0.7, "patch": 0.6, "lr": 1e-4, "image_ids": ["a"]},
        {"step": 2, "epoch": 0, "loss": 2.0, "class": 0.6, "patch": 0.5, "lr": 2e-4},  # after a resume
        {"step": 2, "epoch": 0, "map_class": 25.0, "map_patch": 50.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3, "los')
    loss, terms, validation, rate = charts_from_log(log)
    assert loss.curves == [Curve("total", [1.0, 2.0], [3.0, 2.0])]
    assert [curve.name for curve in terms.curves] == ["class tokens", "patch tokens"]
    assert [curve.values for curve in validation.curves] == [[25.0], [50.0]]
    assert rate.curves[0].values == [1e-4, 2e-4]


def test_a_segmentation_log_has_a_chart_of_its_mean_iou(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 4, "loss": 2.0}\n{"step": 4, "epoch": 1, "miou": 30.5}\n{"step": 8, "miou": 41.0}\n')
    _, miou = charts_from_log(log)
    assert miou.title == "Validation mIoU (%)"
    assert (miou.curves[0].steps, miou.curves[0].values) == ([4.0, 8.0], [30.5, 41.0])


def test_a_log_without_numbers_gives_no_charts(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    assert charts_from_log(tmp_path / "log.jsonl") == []


def test_score_table_marks_the_best_seed():
    miou = {"refined": 66.24, "fused": 66.1, "sc_cam": 65.6, "crf": 60.0}
    table = score_table(SeedScores(miou=miou, threshold={"refined": 0.4}))
    assert table is not None
    assert [row[0] for row in table.rows] == ["SC-CAM", "Product", "Refined seed", "crf"]
    assert table.rows[table.best_row] == ["Refined seed", "66.2", "0.40"]
    assert score_table(SeedScores(images=3)) is None


def test_recipe_table_joins_nested_keys():
    table = recipe_table({"name": "x", "model": {"view": "hflip", "sizes": [1, 2]}, "mask": None})
    assert table.rows == [["name", "x"], ["model.view", "hflip"], ["model.sizes", "[1, 2]"], ["mask", "null"]]


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_and_all_its_pictures_open(tmp_path):
    rows = [make_row(), make_row("photo of a/b", size=(300, 400), class_ids=(1,))]
    charts = [Chart("Loss", [Curve("total", range(100), np.linspace(2, 1, 100))], log_scale=True, smooth=True)]
    page = Page(write_report(tmp_path / "out" / "page.html", title="T", rows=rows, curves=charts))
    assert "script" not in page.tags
    # Row 1: photo, truth, mask and two variants of two classes; row 2: of one class; the chart, light and dark.
    assert len(page.addresses) == (3 + 4) + (3 + 2) + 2
    for address in page.addresses:
        kind, _, data = address.partition(";base64,")
        assert kind in {"data:image/png", "data:image/jpeg"}
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_pictures_lie_beside_the_page_and_nothing_half_written(tmp_path):
    rows = [make_row("../up/we go"), make_row("ünï")]
    write_report(tmp_path / "page.html", title="T", rows=rows, curves=[Chart("mAP (%)", [Curve("a", [1], [2])])])
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    folder = "page_pictures"
    assert written == [
        "page.html",
        f"{folder}/001_.._up_we_go.png",
        f"{folder}/002__n_.png",
        f"{folder}/chart_map.png",
        f"{folder}/gallery.png",
    ]
    gallery = Image.open(tmp_path / folder / "gallery.png")
    assert gallery.tobytes() == figure_grid(rows).tobytes()


def test_all_text_is_escaped(tmp_path):
    hostile = '<script>alert("1")</script>&'
    row = make_row(hostile, class_ids=(1, 2))
    tables = [Table(hostile, [hostile], [[hostile]]), Table(hostile, [hostile], [[hostile]], folded=True)]
    charts = [Chart(hostile, [Curve(hostile, [0, 1], [1, 2])])]
    path = write_report(
        tmp_path / "page.html", title=hostile, rows=[row], curves=charts, tables=tables, notes=[hostile]
    )
    page = Page(path)
    assert "script" not in page.tags
    assert page.tags.count("i") == 2  # the two color chips, none from the class name "<i>cow</i>"
    assert "<i>cow</i>" in page.words
    assert page.words.count(hostile) >= 9


@pytest.mark.parametrize(
    ("known", "note"),
    [
        ((True, True), None),
        ((True, False), "without a ground-truth mask: 1 of 2."),
        ((False, False), "without a ground-truth mask: all."),
    ],
)
def test_the_page_says_where_ground_truth_is_missing(tmp_path, known, note):
    rows = [make_row(str(index), known=is_known) for index, is_known in enumerate(known)]
    page = Page(write_report(tmp_path / "page.html", title="T", rows=rows))
    assert ("without a ground-truth mask" in page.text) == (note is not None)
    assert note is None or note in page.text
    # A column of unknowns only is not shown at all.
    assert page.words.count("not known") == (1 if known == (True, False) else 0)
    assert page.words.count("Ground truth") == (2 if any(known) else 0)


def test_the_color_of_every_shown_label_is_named(tmp_path):
    row = make_row(class_ids=(0,))
    row.target[0, 0] = 2  # another class in the truth alone
    row.target[0, 1] = 9  # a label that has no name here
    page = Page(write_report(tmp_path / "page.html", title="T", rows=[row]))
    assert [word for word in page.words if word in {*NAMES, "label 9"}] == ["cat", "dog", "label 9"]


def test_a_wrong_map_is_named_and_leaves_no_page(tmp_path):
    good, bad = make_row("good"), make_row("bad one")
    bad.maps["sc_cam"] = Seeds(np.array([0]), np.zeros((1, 3, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"bad one: class map has shape \(3, 3\)"):
        write_report(tmp_path / "page.html", title="T", rows=[good, bad])
    assert list(tmp_path.iterdir()) == []


def test_a_page_without_pictures_can_hold_tables_alone(tmp_path):
    page = Page(write_report(tmp_path / "page.html", title="T", rows=[], tables=[Table("S", ["a"], [["b"]])]))
    assert "b" in page.words
    assert "Images" not in page.words
    assert not (tmp_path / "page_pictures").exists()


# --- confusion ------------------------------------------------------------------------------------------------------


def test_a_confusion_picture_is_dark_where_most_pixels_are():
    names = ["background", "cat", "dog"]
    found, lost = np.diag([900, 50, 7]), np.full((3, 3), 100) - np.diag([100] * 3)
    for counts in (found, lost):
        counts[2] = counts[2] if counts is found else 0  # a label without pixels leaves its row empty
    bright, dark = (np.asarray(confusion_picture(counts, names, names).convert("L")) for counts in (lost, found))
    inside = (slice(40, 250), slice(180, 330))
    assert (dark[inside] < 100).sum() > 2 * (bright[inside] < 100).sum()
    many = [f"label {index}" for index in range(81)]
    assert confusion_picture(np.ones((81, 82), dtype=np.int64), many, [*many, "unsure"]).width < 2500
    with pytest.raises(ValueError, match=r"counts have shape \(3, 3\), expected \(3, 2\)"):
        confusion_picture(found, names, names[:2])


def test_a_figure_stands_on_the_page_under_its_heading(tmp_path):
    picture = Image.new("RGB", (30, 20), "red")
    path = write_report(tmp_path / "page.html", title="Scores", rows=[], figures={"Confusion & more": picture})
    assert "Confusion & more" in Page(path).words
