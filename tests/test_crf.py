from __future__ import annotations

import builtins
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopping import stop

from bitrans_hf.files import DiskFullError
from bitrans_hf.hub.errors import InputError
from bitrans_hf.pool import ImageFailedError, ImagePool, Outcome
from bitrans_hf.refine.crf import CRF_PRESETS, CrfJob, CrfNotInstalledError, check_crf_installed, crf_pool, dense_crf

try:
    check_crf_installed()
    NO_CRF = ""
except CrfNotInstalledError as absent:
    NO_CRF = str(absent)
needs_crf = pytest.mark.skipif(bool(NO_CRF), reason=NO_CRF)


def picture(h: int = 20, w: int = 24, seed: int = 0) -> np.ndarray:
    """A bright square on a dark ground, with noise."""
    image = np.random.default_rng(seed).integers(0, 40, (h, w, 3), dtype=np.uint8)
    image[h // 4 : h // 2, w // 4 : w // 2] += 180
    return image


def rough_scores(num_labels: int = 3, h: int = 20, w: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((num_labels, h, w), dtype=np.float32)


# ---- One image.


def mean_field_by_loops(image: np.ndarray, unary: np.ndarray, settings: dict[str, float], steps: int) -> np.ndarray:
    """Mean-field inference with exact kernels, symmetric normalization and Potts compatibility, pair by pair.

    pydensecrf approximates the kernels on a lattice, so both agree roughly only.
    """
    h, w, _ = image.shape
    place = np.array([(y, x) for y in range(h) for x in range(w)], dtype=np.float64)
    color = image.reshape(-1, 3).astype(np.float64)

    def kernel(*parts: tuple[np.ndarray, float]) -> np.ndarray:
        distance = sum(((f[:, None] - f[None]) ** 2).sum(-1) / s**2 for f, s in parts)
        weights: np.ndarray = np.exp(-0.5 * distance)
        scale = 1 / np.sqrt(weights.sum(axis=1))
        return scale[:, None] * weights * scale[None]

    smooth = kernel((place, settings["sxy"]))
    alike = kernel((place, settings["bilateral_sxy"]), (color, settings["srgb"]))
    marginals = np.exp(-unary) / np.exp(-unary).sum(axis=0)
    for _ in range(steps):
        energy = unary - settings["compat"] * marginals @ smooth - settings["bilateral_compat"] * marginals @ alike
        marginals = np.exp(-(energy - energy.min(axis=0)))
        marginals = marginals / marginals.sum(axis=0)
    return marginals


@needs_crf
@pytest.mark.parametrize("hard", [None, 0.7])
def test_marginals_are_those_of_exact_mean_field_inference_up_to_the_lattice(hard: float | None):
    square = np.zeros((20, 24), dtype=bool)
    square[6:11, 7:13] = True  # known one pixel off
    scores = np.stack([np.where(square, 0.35, 0.7), np.where(square, 0.7, 0.3)]).astype(np.float32)
    # Two steps: with more, an error of the lattice at one pixel decides over its region.
    preset = replace(CRF_PRESETS["psa"], iterations=2, bilateral_sxy=40, hard_label_probability=hard)
    ours = dense_crf(picture(), scores, preset=preset).reshape(2, -1)
    given = scores.reshape(2, -1)
    if hard is not None:
        given = np.where(given == given.max(axis=0), hard, 1 - hard)
    settings = {"sxy": 3, "compat": 3, "bilateral_sxy": 40, "srgb": 13, "bilateral_compat": 10}
    exact = mean_field_by_loops(picture(), -np.log(given), settings, 2)
    assert np.abs(ours - exact).mean() < 0.005
    assert np.abs(ours - given / given.sum(axis=0)).mean() > 0.2  # where it started from


@needs_crf
@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_every_preset_gives_marginals_that_follow_the_picture(preset: str):
    image = picture(60, 72)
    inside = np.zeros((60, 72), dtype=bool)
    inside[15:30, 18:36] = True
    noise = np.random.default_rng(0).random((60, 72)) < 0.12  # wrong pixels, which scores can not tell from right ones
    square = inside ^ noise
    scores = np.stack([np.where(square, 0.3, 0.7), np.where(square, 0.7, 0.3)])
    marginals = dense_crf(image, scores, preset=preset)
    assert marginals.dtype == np.float32
    np.testing.assert_allclose(marginals.sum(axis=0), 1.0, atol=1e-5)
    wrong = ((marginals[1] > marginals[0]) != inside).mean()
    assert wrong < 0.2 * (square != inside).mean()


def test_the_presets_are_the_ten_rows_of_the_systems_that_use_them():
    def row(name: str) -> tuple[float | None, ...]:
        p = CRF_PRESETS[name]
        kernels = (p.gaussian_sxy, p.gaussian_compat, p.bilateral_sxy, p.bilateral_srgb, p.bilateral_compat)
        return (p.hard_label_probability, p.iterations, *kernels)

    assert {name: row(name) for name in CRF_PRESETS} == {
        "psa": (None, 10, 3, 3, 80, 13, 10),
        "irn": (0.7, 10, 3, 3, 50, 5, 10),
        "mctformer": (None, 10, 4, 3, 83, 5, 3),
        "weaktr": (0.7, 10, 4, 3, 83, 5, 3),
        "seam": (None, 1, 3, 3, 80, 13, 10),
        "seam-retrain": (None, 1, 3, 3, 32, 13, 10),
        "afa": (None, 10, 3, 3, 64, 5, 4),
        "toco": (None, 10, 1, 1, 121, 5, 4),
        "toco-cam": (None, 10, 3, 3, 36, 3, 4),
        "deeplab-v2": (None, 10, 1, 3, 67, 3, 4),
    }


@needs_crf
def test_hard_labels_look_at_the_best_label_only():
    scores = rough_scores()
    one_hot = np.eye(3, dtype=np.float32)[scores.argmax(axis=0)].transpose(2, 0, 1)
    np.testing.assert_array_equal(
        dense_crf(picture(), scores, preset="irn"), dense_crf(picture(), 0.5 * one_hot, preset="irn")
    )


@needs_crf
@pytest.mark.parametrize("kind", ["read-only", "strided", "float64", "float16", "fortran"])
def test_arrays_of_any_layout_and_float_type_are_taken(kind: str):
    image, scores = picture(), rough_scores().astype(np.float16).astype(np.float32)
    expected = dense_crf(image, scores)
    if kind == "read-only":
        image.setflags(write=False)
        scores.setflags(write=False)
    elif kind == "strided":
        image = image.transpose(1, 0, 2).copy().transpose(1, 0, 2)[:, :, ::-1].copy()[:, :, ::-1]
        scores = scores.transpose(1, 2, 0).copy().transpose(2, 0, 1)
        assert not image.flags.c_contiguous
        assert not scores.flags.c_contiguous
    elif kind == "fortran":
        image, scores = np.asfortranarray(image), np.asfortranarray(scores)
    else:
        scores = scores.astype(kind)
    np.testing.assert_array_equal(dense_crf(image, scores), expected)


@needs_crf
def test_inputs_come_back_unchanged_and_the_result_can_be_written_to():
    image, scores = picture(), rough_scores()
    marginals = dense_crf(image, scores)
    marginals[:] = 0.0
    np.testing.assert_array_equal(image, picture())
    np.testing.assert_array_equal(scores, rough_scores())


@needs_crf
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_tiny_pictures(size: tuple[int, int]):
    marginals = dense_crf(np.full((*size, 3), 128, dtype=np.uint8), rough_scores(2, *size))
    assert np.isfinite(marginals).all()
    np.testing.assert_allclose(marginals.sum(axis=0), 1.0, atol=1e-5)


@needs_crf
@pytest.mark.parametrize("preset", ["psa", "irn"])
def test_background_alone_is_certain(preset: str):
    np.testing.assert_array_equal(dense_crf(picture(), rough_scores(1), preset=preset), np.ones((1, 20, 24)))


@needs_crf
def test_scores_of_zero_are_no_infinity():
    scores = np.stack([np.zeros((20, 24)), np.ones((20, 24))])
    assert np.isfinite(dense_crf(picture(), scores)).all()


def filled(value: float) -> np.ndarray:
    scores = rough_scores()
    scores[1, 2, 3] = value
    return scores


@pytest.mark.parametrize(
    ("image", "scores", "preset", "words"),
    [
        (picture(), rough_scores(), "PSA", "unknown CRF preset 'PSA'; there are psa, irn, "),
        (picture(), rough_scores(h=21), "psa", r"must be \(L, 20, 24\) .* got \(3, 21, 24\); seeds and image"),
        (picture(), rough_scores()[0], "psa", r"must be \(L, 20, 24\) .* got \(20, 24\)"),
        (picture(), rough_scores(0), "psa", r"background as row 0, got \(0, 20, 24\)"),
        (picture()[..., 0], rough_scores(), "psa", r"image must be \(H, W, 3\) uint8, got \(20, 24\) uint8"),
        (picture() / 255.0, rough_scores(), "psa", r"image must be \(H, W, 3\) uint8, got \(20, 24, 3\) float64"),
        (picture(), filled(float("nan")), "psa", "scores hold NaN or infinity"),
        (picture(), filled(float("-inf")), "psa", "scores hold NaN or infinity"),
        (picture(), filled(3.5), "psa", r"scores must be in \[0, 1\], got values from .* to 3.5"),
        (picture(), filled(-0.5), "psa", r"scores must be in \[0, 1\], got values from -0.5"),
        (picture(), rough_scores().astype(np.int64), "psa", r"floats in \[0, 1\], got int64"),
    ],
)
def test_bad_input_is_refused_by_message(image: np.ndarray, scores: np.ndarray, preset: str, words: str):
    with pytest.raises(ValueError, match=words):
        dense_crf(image, scores, preset=preset)


def test_without_the_package_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def without_pydensecrf(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "pydensecrf":
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_pydensecrf)
    for call in (
        check_crf_installed,
        lambda: dense_crf(picture(), rough_scores()),
        lambda: crf_pool([], processes=1),
    ):
        with pytest.raises(CrfNotInstalledError, match=r"pip install 'bitrans-hf\[crf\]'.*\"par\""):
            call()


# ---- A set of images.


@pytest.fixture(scope="module")
def pool() -> Iterator[ImagePool]:
    with ImagePool(2) as pool:
        yield pool


def slow_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


def fails_on_three(number: int) -> int:
    if number == 3:
        raise InputError("three is not allowed")
    return number


def finds_no_room(number: int) -> int:
    raise DiskFullError("no room")


def dies_on_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def process_id(number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def jobs(count: int) -> list[tuple[str, int]]:
    return [(f"image{number}", number) for number in range(count)]


def test_results_come_in_the_order_of_the_jobs(pool: ImagePool):
    outcomes = list(pool.run(slow_first, jobs(7)))
    assert outcomes == [Outcome(f"image{n}", n * n) for n in range(7)]


def test_the_work_is_done_by_several_other_processes(pool: ImagePool):
    workers = {outcome.result for outcome in pool.run(process_id, jobs(12))}
    assert len(workers) == 2
    assert os.getpid() not in workers


@pytest.mark.slow
def test_windows_has_no_server_to_fork_from_and_starts_each_process_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with ImagePool(2) as pool:
        outcomes = list(pool.run(fails_on_three, jobs(5)))
        assert pool._executor is not None
        assert pool._executor._mp_context.get_start_method() == "spawn"
    assert [outcome.result for outcome in outcomes] == [0, 1, 2, None, 4]
    assert outcomes[3].error == "three is not allowed"


def test_jobs_are_taken_only_as_the_work_proceeds(pool: ImagePool):
    taken = []

    def endless() -> Iterator[tuple[str, int]]:
        for number in itertools.count():
            taken.append(number)
            yield f"image{number}", number

    outcomes = pool.run(slow_first, endless())
    for number in range(10):
        assert next(outcomes).result == number**2
        assert len(taken) <= number + 1 + 2 * pool.processes
    outcomes.close()  # type: ignore[attr-defined]
    assert next(pool.run(slow_first, jobs(1))).result == 0  # the pool is as good as new


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_image_is_named_and_the_others_go_on(pool: ImagePool, processes: int):
    workers = pool if processes == 2 else ImagePool(1)
    outcomes = list(workers.run(fails_on_three, jobs(8)))
    assert [o.image_id for o in outcomes if o.error] == ["image3"]
    assert outcomes[3] == Outcome("image3", None, "three is not allowed")
    assert [o.result for o in outcomes if not o.error] == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_the_set(pool: ImagePool, processes: int):
    workers = pool if processes == 2 else ImagePool(1)
    with pytest.raises(DiskFullError, match="no room"):
        list(workers.run(finds_no_room, jobs(8)))


@pytest.mark.parametrize("processes", [1, 2])
def test_strict_stops_at_the_first_failing_image_by_name(pool: ImagePool, processes: int):
    workers = pool if processes == 2 else ImagePool(1)
    outcomes = workers.run(fails_on_three, jobs(8), strict=True)
    assert [next(outcomes).result for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ImageFailedError, match="image image3: three is not allowed"):
        next(outcomes)


def test_an_image_that_kills_its_process_is_named_and_the_others_go_on(pool: ImagePool):
    outcomes = list(pool.run(dies_on_three, jobs(8)))
    assert [o.image_id for o in outcomes if o.error] == ["image3"]
    assert "the process that worked on it died" in str(outcomes[3].error)
    assert [o.result for o in outcomes if not o.error] == [0, 1, 2, 4, 5, 6, 7]


def test_no_jobs_give_no_outcomes(pool: ImagePool):
    assert list(pool.run(slow_first, [])) == []


def test_a_pool_needs_a_process():
    with pytest.raises(ValueError, match="processes must be 1 or more, got 0"):
        ImagePool(0)


def test_one_process_stays_in_this_one():
    assert [o.result for o in ImagePool(1).run(process_id, jobs(2))] == [os.getpid()] * 2


@needs_crf
@pytest.mark.parametrize("processes", [1, 2])
def test_a_set_is_refined_as_its_images_are_one_by_one(processes: int):
    pictures = {f"image{n}": (picture(seed=n), rough_scores(2 + n % 2, seed=n)) for n in range(5)}
    pictures["broken"] = (picture(), filled(float("nan")))
    pictures["last"] = (picture(), rough_scores())
    given = [(name, CrfJob(*arrays)) for name, arrays in pictures.items()]
    outcomes = list(crf_pool(given, preset="seam", processes=processes))
    assert [o.image_id for o in outcomes] == list(pictures)
    for outcome in outcomes:
        if outcome.image_id == "broken":
            assert outcome.error == "the scores hold NaN or infinity; look at the network that made them."
        else:
            expected = dense_crf(*pictures[outcome.image_id], preset="seam")
            np.testing.assert_array_equal(outcome.result, expected)


@needs_crf
def test_an_unknown_preset_is_refused_before_any_work():
    with pytest.raises(ValueError, match="unknown CRF preset 'x'"):
        crf_pool(iter(()), preset="x")


KILLED_PARENT = """
import os, sys, time
from bitrans_hf.refine.crf import ImagePool
if __name__ == "__main__":
    pool = ImagePool(2)
    first = next(pool.run(int, (("a", n) for n in range(1))))
    workers = [p for p in os.listdir("/proc") if p.isdigit()]
    print(*(p for p in workers if is_descendant(int(p), os.getpid())), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's process table")
def test_no_worker_outlives_a_parent_that_was_killed(tmp_path: Path):
    script = tmp_path / "parent.py"
    helper = (
        "def is_descendant(pid, of):\n"
        "    while pid > 1:\n"
        "        try:\n"
        "            pid = int(open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[1])\n"
        "        except OSError:\n"
        "            return False\n"
        "        if pid == of:\n"
        "            return True\n"
        "    return False\n"
    )
    script.write_text(helper + KILLED_PARENT, encoding="utf-8")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) >= 3  # the fork server, the resource tracker or two, the workers
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(is_running(pid) for pid in workers):
        time.sleep(0.1)
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


# ---- Stopped.

STOPPED_POOL = """
import sys, time
from bitrans_hf.commands import run_command
from bitrans_hf.refine.crf import ImagePool

def work(seconds):
    print("working", file=sys.stderr, flush=True)
    time.sleep(seconds)

def main():
    with ImagePool(2) as pool:
        print("starting", file=sys.stderr, flush=True)
        list(pool.run(work, [(str(number), 600) for number in range(8)]))

if __name__ == "__main__":
    run_command(main)
"""


@pytest.mark.parametrize(
    ("word", "count", "times"),
    [
        ("working", 2, 1),
        pytest.param("starting", 1, 1, marks=pytest.mark.slow),
        pytest.param("working", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_pool_that_is_stopped_ends_at_once_with_its_processes(word: str, count: int, times: int, tmp_path: Path):
    (tmp_path / "program.py").write_text(STOPPED_POOL)
    ended = stop([str(tmp_path / "program.py")], lambda said: said.count(word) == count, tmp_path, times=times)
    lines = [line for line in ended.err.splitlines() if line not in ("starting", "working")]
    assert (ended.status, lines) == (130, ["stopped; to go on, rerun the same command."])
