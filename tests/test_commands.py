from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stopping import stop

from bitrans_hf.commands import asks_for_quiet, run_command
from bitrans_hf.hub.errors import InputError

PROGRAM = """
import multiprocessing, sys, time
from bitrans_hf.commands import children_without_signals, if_stopped, run_command

def ready():
    print("ready", file=sys.stderr, flush=True)

{body}

if __name__ == "__main__":
    run_command(main)
"""

WAITING = """
def main():
    if_stopped(lambda: "in stage seeds; its finished files are kept")
    ready()
    time.sleep(600)
"""
CLEANING_UP = """
def main():
    try:
        ready()
        time.sleep(600)
    finally:
        time.sleep(600)
"""
IN_A_DESTRUCTOR = """
class Slow:
    def __del__(self):
        ready()
        for _ in range(20):
            time.sleep(0.05)

def main():
    Slow()
    time.sleep(600)
"""
OTHER_ERROR = """
def main():
    try:
        ready()
        time.sleep(600)
    except KeyboardInterrupt:
        raise RuntimeError("the other end has gone")
"""
CHILD = """
def work(queue):
    queue.put("there")
    time.sleep(600)

def main():
    queue = multiprocessing.SimpleQueue()
    with children_without_signals():
        multiprocessing.Process(target=work, args=(queue,), daemon=True).start()
    queue.get()
    ready()
    time.sleep(600)
"""


def is_ready(said: str) -> bool:
    return "ready" in said


def program(folder: Path, body: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(PROGRAM.format(body=body))
    return [str(path)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_ends_a_command_with_one_sentence(number: int, status: int, tmp_path: Path):
    ended = stop(program(tmp_path, WAITING), is_ready, tmp_path, number=number)
    assert ended.status == status
    assert ended.err == (
        "ready\nstopped in stage seeds; its finished files are kept; to go on, rerun the same command.\n"
    )
    assert ended.out == ""


def test_a_second_stop_ends_the_cleaning_up(tmp_path: Path):
    ended = stop(program(tmp_path, CLEANING_UP), is_ready, tmp_path, times=2)
    assert (ended.status, ended.err) == (130, "ready\nstopped; to go on, rerun the same command.\n")


@pytest.mark.parametrize("body", [IN_A_DESTRUCTOR, OTHER_ERROR, CHILD], ids=["destructor", "other error", "child"])
def test_a_stop_is_one_sentence_wherever_it_comes(body: str, tmp_path: Path):
    ended = stop(program(tmp_path, body), is_ready, tmp_path)
    assert (ended.status, ended.err) == (130, "ready\nstopped; to go on, rerun the same command.\n")


def test_a_stop_is_heeded_while_the_imports_take_their_time(tmp_path: Path):
    (tmp_path / "slow_stage.py").write_text("import time\n\ntime.sleep(600)\n\n\ndef main(): ...\n")
    (tmp_path / "script.py").write_text("from bitrans_hf.commands import run_script\n\nrun_script('slow_stage')\n")
    ended = stop([str(tmp_path / "script.py")], lambda said: "loading" in said, tmp_path)
    assert ended.status == 130
    assert ended.err.splitlines() == [
        "slow_stage: loading PyTorch and its libraries ...",
        "stopped before it began; to go on, rerun the same command.",
    ]


@pytest.mark.parametrize(
    ("words", "quiet"),
    [
        ("", False), ("--name a", False), ("--quiet", True), ("--quiet true", True), ("--quiet=true", True),
        ("--quiet false", False), ("--quiet true --quiet false", False), ("--quiet --name a", True),
    ],
)  # fmt: skip
def test_quiet_is_known_before_there_is_a_parser(words: str, quiet: bool):
    assert asks_for_quiet(words.split()) is quiet


def test_what_a_background_job_ignores_stays_ignored(tmp_path: Path):
    body = """
import os, signal
def main():
    signal.raise_signal(signal.SIGINT)
    print("went on")
"""
    ignoring = subprocess.run(
        [sys.executable, *program(tmp_path, body)],
        capture_output=True, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert (ignoring.returncode, ignoring.stdout, ignoring.stderr) == (0, "went on\n", "")


def test_an_error_that_a_person_can_mend_is_one_sentence_and_a_bug_keeps_its_traceback():
    def mendable() -> None:
        raise InputError("there are no images in photos.")

    def bug() -> None:
        raise TypeError("unsupported operand")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run_command(mendable)
    assert ended.value.code == "error: there are no images in photos."
    with pytest.raises(TypeError):
        run_command(bug)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_name_that_the_code_page_of_a_pipe_lacks_is_written_in_escapes(tmp_path: Path):
    (tmp_path / "program.py").write_text(
        PROGRAM.format(body='def main():\n    print("Katze, \\u732b")'), encoding="utf-8"
    )
    ended = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=True,
    )
    assert ended.stdout.split() == [b"Katze,", rb"\u732b"]


def ended_without_reader(folder: Path, body: str, unbuffered: str = "") -> tuple[int, str]:
    """Run a program whose stdout is a pipe that nobody reads any more; return its status and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, *program(folder, body)],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    return ended.returncode, ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe otherwise")
@pytest.mark.parametrize(
    "body",
    [
        'def main():\n    print("short")',  # written when the process ends
        'def main():\n    print("long " * 100_000)',  # fails in main
        'def main():\n    print("short")\n    sys.exit(1)',  # as `bitrans check` where something is wrong
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ended_first_ends_the_command_in_silence(body: str, unbuffered: str, tmp_path: Path):
    assert ended_without_reader(tmp_path, body, unbuffered) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe otherwise")
def test_a_stage_whose_reader_ended_says_what_is_kept(tmp_path: Path):
    body = 'def main():\n    if_stopped(lambda: "in stage seeds; all is kept")\n    print("x", flush=True)'
    sentence = "stopped in stage seeds; all is kept; to go on, rerun the same command.\n"
    assert ended_without_reader(tmp_path, body) == (141, sentence)


def test_another_broken_pipe_keeps_its_traceback(tmp_path: Path):
    body = 'def main():\n    raise BrokenPipeError("of a worker")'
    ended = subprocess.run([sys.executable, *program(tmp_path, body)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "BrokenPipeError: of a worker" in ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports a closed pipe otherwise")
def test_a_bug_keeps_its_traceback_when_the_reader_ended_too(tmp_path: Path):
    _, said = ended_without_reader(tmp_path, 'def main():\n    print("short")\n    raise KeyError("a bug")')
    assert "KeyError: 'a bug'" in said
