from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from hub_server import HubServer
from PIL import Image
from tiny_models import picture, tiny_model

from bitrans_hf import BiTransImageProcessor, PseudoMaskPipeline, extract_seeds
from bitrans_hf.cli import main
from bitrans_hf.hub.labels import palette
from bitrans_hf.hub.views import VIEWS, invert_affinity

gradio = pytest.importorskip("gradio", reason="the app's extra is not installed")

from bitrans_hf.app import (  # noqa: E402
    MAX_SIDE,
    SCALES,
    Page,
    PictureMaps,
    clickable_size,
    lay_out_affinity,
    lay_out_question,
    lay_out_result,
    write_space,
)

PATIENCE_MS = 60_000  # a page that answers at once on a quiet machine may take long on one that runs other tests
CLASSES = ["cat", "dog", "horse"]
REPOSITORY = Path(__file__).resolve().parents[1]
CHROMIUM = "/usr/bin/chromium"


def pipe_of(**overrides: Any) -> PseudoMaskPipeline:
    return PseudoMaskPipeline(
        model=tiny_model(**overrides), image_processor=BiTransImageProcessor(), task="", device="cpu"
    )


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture(40, 56).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# ---- What the sliders combine.


@pytest.mark.parametrize(("num_scales", "num_layers"), [(1, 2), (1, 3), (3, 1)])
def test_kept_maps_give_the_seeds_of_a_model_with_so_many_layers(photo: Path, num_scales: int, num_layers: int):
    maps = PictureMaps(pipe_of(num_seed_layers=2), photo)
    ours = maps.seeds([0, 2], num_scales, num_layers)
    for variant, (mode, refine) in {
        "sc_cam": ("sc_cam", False),
        "coarse_cam": ("coarse_cam", False),
        "fused": ("fused", False),
        "refined": ("fused", True),
    }.items():
        seeds = extract_seeds(
            tiny_model(num_seed_layers=num_layers), picture(40, 56), ["cat", "horse"],
            processor=BiTransImageProcessor(), scales=SCALES[:num_scales], mode=mode, refine=refine,
        )  # fmt: skip
        np.testing.assert_allclose(ours[variant].numpy(), seeds.maps, atol=1e-4)


def test_the_mask_is_the_pipelines(photo: Path):
    pipe = pipe_of()
    maps = PictureMaps(pipe, photo)
    label_map = maps.label_map([0, 1], maps.seeds([0, 1], 2, 2)["refined"], 0.55, maps.size)
    for entry in pipe(photo, candidate_labels=["cat", "dog"], threshold=0.55, scales=SCALES[:2]):
        assert ((np.asarray(entry["mask"]) == 255) != (label_map == CLASSES.index(entry["label"]) + 1)).mean() < 0.002


def test_an_affinity_row_is_the_patchs_attention_to_the_others(photo: Path):
    maps = PictureMaps(pipe_of(), photo)
    with torch.no_grad():
        output = tiny_model()(torch.cat(BiTransImageProcessor().scaled_views(picture(40, 56))))
    assert maps.grid == (5, 7)
    row = output.affinity[0, 2 * 7 + 3].numpy()
    others = np.delete(row, 2 * 7 + 3)
    expected = (row - others.min()) / (others.max() - others.min())
    expected[2 * 7 + 3] = 1
    np.testing.assert_allclose(maps.affinity_row(2, 3).numpy(), expected.reshape(5, 7), atol=1e-4)


def test_a_picture_of_one_patch_attends_to_itself(tmp_path: Path):
    picture(14, 14).save(tmp_path / "patch.png")
    assert PictureMaps(pipe_of(), tmp_path / "patch.png").affinity_row(0, 0).tolist() == [[1.0]]


def test_the_flip_of_the_affinity_is_that_of_the_views(photo: Path):
    kept = PictureMaps(pipe_of(), photo).at_scale(1.0)
    with torch.no_grad():
        view = torch.cat(BiTransImageProcessor().scaled_views(picture(40, 56)))
        mirrored = tiny_model()(view.flip(-1)).affinity
    torch.testing.assert_close(kept.affinity[1:], mirrored)
    assert not torch.allclose(invert_affinity(VIEWS["hflip"], mirrored, (5, 7)), mirrored, atol=1e-3)


def test_a_scale_is_computed_once(photo: Path):
    pipe, calls = pipe_of(), []
    pipe.model.register_forward_hook(lambda *arguments: calls.append(1))
    maps = PictureMaps(pipe, photo)
    for num_scales, num_layers in ((1, 2), (1, 1), (2, 2), (2, 3), (1, 3)):
        maps.seeds([0], num_scales, num_layers)
    maps.affinity_row(0, 0)
    assert len(calls) == 2


def test_a_large_picture_is_looked_at_small_and_cut_at_its_size(tmp_path: Path):
    picture(900, 1200).save(tmp_path / "large.png")
    maps = PictureMaps(pipe_of(patch_size=16, image_size=32), tmp_path / "large.png")
    assert (maps.size, maps.image.size) == ((900, 1200), (MAX_SIDE, 384))
    assert maps.label_map([1], maps.seeds([1], 1, 2)["refined"], 0.4, maps.size).shape == (900, 1200)


@pytest.mark.parametrize(
    ("size", "words"), [((1, 1), "The image is 1 x 1 pixels .* needs 11 on each side"), ((900, 9), "900 x 9")]
)
def test_a_picture_that_is_too_small_is_refused(tmp_path: Path, size: tuple[int, int], words: str):
    Image.new("RGB", size[::-1]).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=words):
        PictureMaps(pipe_of(), tmp_path / "small.png")


# ---- What the controls do.


@pytest.fixture
def page() -> Iterator[Page]:
    async def laid_out() -> Page:  # within a loop, or gradio opens loops of its own and leaves them open
        pipe = pipe_of()
        with gradio.Blocks():
            return Page(pipe, gradio.State(None), lay_out_question(pipe), lay_out_result(0.4), lay_out_affinity())

    made = asyncio.run(laid_out())
    yield made
    made.masks_folder.cleanup()


@pytest.mark.filterwarnings("ignore:The value passed into gr.Dropdown:UserWarning")  # a change is no menu of its own
def test_a_new_image_is_guessed_and_its_middle_patch_is_asked(page: Page, photo: Path):
    changes = page.read_picture(str(photo))
    assert changes[page.current] == str(photo)
    shares = dict(zip(CLASSES, PictureMaps(pipe_of(), photo).probabilities.tolist(), strict=True))
    guessed = [name for name in CLASSES if shares[name] > 0.5] or [max(shares, key=shares.__getitem__)]
    assert changes[page.question.labels].value == guessed
    assert changes[page.result.shown_class].value == guessed[0]
    row, column = changes[page.affinity.row], changes[page.affinity.column]
    assert (row.value, row.maximum, column.value, column.maximum) == (3, 5, 4, 7)


@pytest.mark.filterwarnings("ignore:The value passed into gr.Dropdown:UserWarning")  # a change is no menu of its own
def test_an_image_that_cannot_be_used_clears_the_page_and_says_why(page: Page, tmp_path: Path):
    Image.new("RGB", (9, 900)).save(tmp_path / "narrow.png")
    changes = page.read_picture(str(tmp_path / "narrow.png"))
    assert changes[page.current] is changes[page.result.plain] is changes[page.affinity.image] is None
    assert "900 x 9" in changes[page.question.status]
    assert str(tmp_path) not in changes[page.question.status]


def test_labels_that_are_chosen_keep_the_shown_class_if_they_can(page: Page, photo: Path):
    shown = page.result.shown_class
    assert page.choose_labels(str(photo), ["horse", "cat"], "horse")[shown].value == "horse"
    assert page.choose_labels(str(photo), ["dog", "cat"], "horse")[shown].value == "cat"
    assert page.choose_labels(str(photo), [], "horse")[shown].value is None


def test_the_downloaded_mask_is_cut_at_the_threshold_of_the_page(page: Page, photo: Path):
    class Visit:
        session_hash = "visitor"

    mask, maps = page.result.mask, PictureMaps(pipe_of(), photo)
    seeds = maps.seeds([0, 1], 2, 2)["refined"]
    for cut in (0.3, 0.7):
        assert page.write_mask(str(photo), ["cat", "dog"], 2, 2, cut, Visit()).interactive
        wanted = maps.label_map([0, 1], seeds, cut, maps.size)
        (file,) = Path(page.masks_folder.name).rglob("*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(file)), wanted)
        drawn = page.draw_mask(str(photo), ["cat", "dog"], 2, 2, cut)
        panels = page.draw_panels(str(photo), ["cat", "dog"], "dog", 2, 2, cut)
        np.testing.assert_array_equal(np.asarray(drawn[mask]), np.asarray(panels[mask]))
    assert page.draw_mask(str(photo), [], 1, 1, 0.4)[mask] is None
    page.forget_visitor(Visit())
    assert not file.exists()


def test_a_click_moves_the_query_to_the_patch_under_the_pointer(page: Page, photo: Path):
    class Click:
        index = (0, 0)

    height, width = clickable_size(page.maps_of(str(photo)))
    for Click.index, patch in (
        ((0, 0), (1, 1)),
        ((width - 1, height - 1), (5, 7)),
        ((width // 2, height // 2), (3, 4)),
    ):
        changes = page.click_patch(str(photo), Click())
        assert (changes[page.affinity.row], changes[page.affinity.column]) == patch


# ---- A Space.


def test_a_space_has_its_program_its_needs_its_card_and_the_package(tmp_path: Path):
    folder = write_space(tmp_path / "space", "org/bitrans-voc")
    assert (folder / "app.py").read_text() == (
        'from bitrans_hf.app import serve\n\nserve("org/bitrans-voc", host="0.0.0.0")\n'
    )
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert f"gradio=={gradio.__version__}" in needed
    assert any(line.startswith("transformers") for line in needed)
    assert not any("extra" in line for line in needed)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntitle: Masks from labels\n")
    assert "sdk: gradio\n" in card
    assert "app_file: app.py\n" in card
    source = Path(__file__).resolve().parents[1] / "bitrans_hf"
    ours = {path.relative_to(source) for path in source.rglob("*.py")}
    assert {path.relative_to(folder / "bitrans_hf") for path in (folder / "bitrans_hf").rglob("*.py")} == ours
    assert not list(folder.rglob("__pycache__"))
    (folder / "bitrans_hf" / "old.py").touch()
    assert not (write_space(folder, "org/bitrans-voc") / "bitrans_hf" / "old.py").exists()


@pytest.mark.slow
def test_a_space_serves_the_published_model_with_the_package_that_it_carries(tmp_path: Path, hub: HubServer):
    tiny_model().save_pretrained(tmp_path / "model")
    BiTransImageProcessor().save_pretrained(tmp_path / "model")
    hub.add_folder("model", "me/tiny", tmp_path / "model")
    space, port = write_space(tmp_path / "space", "me/tiny"), free_port()
    environment = {**os.environ, **hub.env, "GRADIO_SERVER_PORT": str(port)}
    environment.pop("PYTHONPATH", None)
    with (space / "bitrans_hf" / "__init__.py").open("a") as file:
        file.write('\nopen("carried", "w").close()\n')
    with running([sys.executable, "app.py"], port, tmp_path / "log", cwd=space, env=environment):
        assert (space / "carried").exists()


def test_a_space_needs_a_published_model(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a Space needs a model on the Hub .* publish it first"):
        write_space(tmp_path / "space", "runs/shapes/train/model")


def test_the_command_writes_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["app", "--model", "org/bitrans-voc", "--space", str(tmp_path / "masks")])
    assert (tmp_path / "masks" / "app.py").is_file()
    assert f"hf upload spaces/YOUR_NAME/masks {tmp_path / 'masks'} ." in capsys.readouterr().out


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "bitrans_hf.app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        SystemExit, match=r'error: the app needs gradio; install it with pip install "bitrans-hf\[app\]"'
    ):
        main(["app", "--model", "anything"])


# ---- The page, in a browser.


@dataclass(frozen=True)
class Served:
    """A running app: its address, and a file with a byte for each time that the network was asked."""

    url: str
    calls: Path

    def asked(self) -> int:
        return self.calls.stat().st_size


# The command as it is, with a count of forward passes.
COUNTED = """
import sys
from pathlib import Path
from bitrans_hf import BiTransModel
from bitrans_hf.cli import main
forward, calls = BiTransModel.forward, Path(sys.argv[1])
def counted(*arguments, **options):
    with calls.open("ab") as file:
        file.write(b".")
    return forward(*arguments, **options)
BiTransModel.forward = counted
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("app")
    tiny_model().save_pretrained(folder / "model")
    BiTransImageProcessor().save_pretrained(folder / "model")
    port = free_port()
    (folder / "calls").touch()
    command = ["app", "--model", str(folder / "model"), "--port", str(port), "--device", "cpu", "--no-browser"]
    program = [sys.executable, "-c", COUNTED, str(folder / "calls"), *command]
    with running(program, port, folder / "log", cwd=REPOSITORY):
        yield Served(f"http://127.0.0.1:{port}", folder / "calls")
    assert "Traceback" not in (folder / "log").read_text()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, log: Path, **options: Any) -> Iterator[None]:
    """Start an app, wait until it serves its page, and stop it as Ctrl-C does."""
    with log.open("w") as stream:
        # A shell's background job ignores Ctrl-C, and so would all that is started from it.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, stdout=stream, stderr=stream, preexec_fn=heed, **options)
        try:
            deadline = time.monotonic() + 120
            while not answers(port):
                assert process.poll() is None, f"the app ended: {log.read_text()}"
                assert time.monotonic() < deadline, f"the app did not start: {log.read_text()}"
                time.sleep(0.1)
            yield
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
        finally:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    """Whether the page is served at this port."""
    try:
        with urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}; install Debian's chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@dataclass
class Visit:
    """A page in the browser with everything that it asked for and complained of."""

    page: Any
    requests: list[str]
    errors: list[str]

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.page.wait_for_function(expression, timeout=PATIENCE_MS)

    def wait_for_mask(self) -> None:
        """Until the mask is drawn and its file can be downloaded."""
        self.page.wait_for_selector("#download:not([disabled])", timeout=PATIENCE_MS)

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#image input[type=file]", str(path))


def visit(browser: Any, url: str, width: int = 1280) -> Visit:
    page = browser.new_page(viewport={"width": width, "height": 800})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#image input[type=file]", state="attached")
    return Visit(page, requests, errors)


SHARE = "parseInt(document.querySelector('#legend').innerText.match(/(\\d+) %/)[1])"


def test_a_visitor_gets_a_mask(served: Served, browser: Any, photo: Path, tmp_path: Path):
    seen = visit(browser, served.url)
    page = seen.page

    # Upload: the labels are guessed and everything is drawn.
    seen.upload(photo)
    seen.wait_for_mask()
    assert "The model" in seen.text("#status")
    assert page.locator("#panels img").count() == 6
    titles = page.locator("#panels label").all_inner_texts()
    assert [title.strip() for title in titles] == [
        "Image", "SC-CAM", "Coarse-CAM", "Product", "Refined seed", "Mask",
    ]  # fmt: skip

    # Choose labels by keyboard: take the guess out, type two names.
    box = page.locator("#labels input")
    box.focus()
    for _ in range(3):
        page.keyboard.press("Backspace")
    for name in ("dog", "horse"):
        page.keyboard.type(name)
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    seen.wait("document.querySelector('#legend').innerText.match(/dog.*horse/s) !== null")
    assert "cat" not in seen.text("#legend")
    seen.wait("[...document.querySelectorAll('#shown label')].map(e => e.innerText.trim()).join() === 'dog,horse'")
    seen.wait_for_mask()

    # Move the threshold by keyboard: smaller mask, and the network is not asked again.
    asked, before = served.asked(), page.evaluate(SHARE)
    page.locator("#threshold input[type=range]").focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    seen.wait(f"{SHARE} < {before}")
    seen.wait("document.querySelector('#threshold input[type=number]').value === '0.7'")
    page.wait_for_timeout(300)
    seen.wait_for_mask()
    assert served.asked() == asked

    # Another class, fewer layers: other maps, no network either. Another scale: once.
    def refined() -> str:
        return str(page.locator("#panels img").nth(4).get_attribute("src"))

    old = refined()
    page.locator("#shown label").last.click()
    seen.wait(f"document.querySelectorAll('#panels img')[4].src !== '{old}'")
    old = refined()
    page.locator("#layers input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    seen.wait(f"document.querySelectorAll('#panels img')[4].src !== '{old}'")
    assert served.asked() == asked
    page.locator("#scales input[type=range]").focus()
    for key in ("ArrowRight", "ArrowLeft", "ArrowRight"):
        old = refined()
        page.keyboard.press(key)
        seen.wait(f"document.querySelectorAll('#panels img')[4].src !== '{old}'")
    assert served.asked() == asked + 1

    # Click a patch: the sliders say which, and by keyboard they move it.
    image = page.locator("#affinity img")
    image.scroll_into_view_if_needed()
    area, old = image.bounding_box(), str(image.get_attribute("src"))
    image.click(position={"x": area["width"] * 1.5 / 7, "y": area["height"] * 3.5 / 5})
    seen.wait("document.querySelector('#row input[type=number]').value === '4'")
    assert page.locator("#column input[type=number]").input_value() == "2"
    seen.wait(f"document.querySelector('#affinity img').src !== '{old}'")
    old = str(image.get_attribute("src"))
    page.locator("#row input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    seen.wait(f"document.querySelector('#affinity img').src !== '{old}'")

    # Download: the mask that is shown, at the image's size.
    seen.wait_for_mask()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "photo_mask.png"
    download.value.save_as(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert (mask.mode, mask.size, mask.getpalette()) == ("P", (56, 40), palette())
        label_map = np.asarray(mask)
    maps = PictureMaps(pipe_of(), photo)
    layers = int(page.locator("#layers input[type=number]").input_value())
    assert layers == 1
    expected = maps.label_map([1, 2], maps.seeds([1, 2], 2, layers)["refined"], 0.7, maps.size)
    np.testing.assert_array_equal(label_map, expected)

    assert {urlsplit(url).netloc for url in seen.requests if url.startswith("http")} == {urlsplit(served.url).netloc}
    assert not seen.errors
    page.close()


def test_a_bad_file_is_explained_and_a_good_one_then_works(served: Served, browser: Any, photo: Path, tmp_path: Path):
    seen = visit(browser, served.url)
    (tmp_path / "letter.jpg").write_text("Dear reader")
    seen.upload(tmp_path / "letter.jpg")
    seen.page.wait_for_selector("#status .bad", timeout=PATIENCE_MS)
    assert seen.text("#status").startswith("Image letter.jpg cannot be read: it is no image file")
    assert str(tmp_path) not in seen.text("#status")
    assert seen.page.locator("#panels img").count() == 0
    assert seen.page.locator("#download").is_disabled()
    seen.page.locator("#image button[aria-label='Clear']").click()
    seen.wait("document.querySelector('#status').innerText.includes('Drop an image')")
    seen.upload(photo)
    seen.wait_for_mask()
    assert seen.page.locator("#status .bad").count() == 0
    seen.page.close()


def test_the_page_fits_a_phone(served: Served, browser: Any, photo: Path):
    seen = visit(browser, served.url, width=360)
    seen.upload(photo)
    seen.wait_for_mask()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    columns = {round(image.bounding_box()["x"]) for image in seen.page.locator("#panels img").all()}
    assert len(columns) == 2
    for selector in ("#threshold input[type=range]", "#download", "#affinity img", "#labels input"):
        box = seen.page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    seen.page.close()
