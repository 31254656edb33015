from __future__ import annotations

import io
import sys
import threading
import time

import pytest

from bitrans_hf.progress import ProgressLines, progress, working


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_after(*, every: float, wanted: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Wait for lines on stderr that come from a thread."""
    said, deadline = "", time.monotonic() + 20
    while said.count("\n") < wanted:
        assert time.monotonic() < deadline, said
        time.sleep(every)
        said += capsys.readouterr().err
    return said.splitlines()


@pytest.mark.parametrize(
    ("steps", "seconds", "expected"),
    [
        (0, 31, "train: step 0 of 800, 00:31 so far"),
        (120, 60, "train: step 120 of 800, 2.0/s, 01:00 so far, 05:40 left"),
        (2, 90, "train: step 2 of 800, 45.0 s each, 01:30 so far, 9:58:30 left"),
        (800, 4000, "train: step 800 of 800, 5.0 s each, 1:06:40 so far, 00:00 left"),
    ],
)
def test_a_line_says_how_far_how_fast_and_how_long(steps: int, seconds: float, expected: str):
    clock = Clock()
    with ProgressLines[int](desc="train", unit="step", total=800, clock=clock) as lines:
        lines.update(steps)
        clock.now = seconds
        assert lines.line() == expected


def test_steps_before_a_resume_do_not_count_as_speed():
    clock = Clock()
    with ProgressLines[int](desc="train", unit="step", total=800, initial=700, clock=clock) as lines:
        lines.update(10)
        lines.set_postfix(loss="0.693")
        clock.now = 20
        assert lines.line() == "train: step 710 of 800, 2.0 s each, 00:20 so far, 03:00 left, loss 0.693"


def test_without_a_total_a_line_says_what_it_can():
    clock = Clock()
    with ProgressLines(iter("ab"), desc="score", unit="image", clock=clock) as lines:
        lines.update(30)
        clock.now = 15
        assert lines.line() == "score: image 30, 2.0/s, 00:15 so far"


def test_a_line_comes_in_the_middle_of_an_item_that_takes_long(capsys: pytest.CaptureFixture[str]):
    loop = ProgressLines(["only"], desc="score", unit="image", every=0.02)
    for _ in loop:
        said = lines_after(every=0.02, wanted=2, capsys=capsys)
        assert set(said) == {"score: image 0 of 1, 00:00 so far"}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("score: image 1 of 1"), "a loop that spoke says that it is done"
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "a loop that ended says no more"


def test_a_loop_that_ends_soon_prints_nothing(capsys: pytest.CaptureFixture[str]):
    assert list(progress([1, 2, 3], desc="score", unit="image")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_loop_that_is_left_early_says_no_more(capsys: pytest.CaptureFixture[str]):
    before = set(threading.enumerate())
    loop = iter(ProgressLines([1, 2, 3], desc="score", unit="image", every=0.02))
    next(loop)
    lines_after(every=0.02, wanted=1, capsys=capsys)
    loop.close()  # type: ignore[attr-defined]
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert "3 of 3" not in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([1, 2], desc="seeds", unit="batch")) == [1, 2]
    assert "seeds: 100%" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "\r" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with working("reading", quiet=True):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([1, 2], desc="seeds", unit="batch", quiet=True)) == [1, 2]
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_work_without_items_is_named_before_it_is_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("bitrans_hf.progress.SECONDS_BETWEEN_LINES", 0.02)
    with working("loading the model"):
        said = lines_after(every=0.02, wanted=2, capsys=capsys)
    assert said[:2] == ["loading the model ...", "loading the model: 00:00 so far"]
