"""Interleaved timing, memory peaks, and the lines that `make bench` prints."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        threads: Threads of torch on the CPU.
        repeats: Timed runs of each candidate; the median counts.
        clock: "wall", or "cpu" for the processor time of all threads, which a busy machine disturbs less.
    """

    device: str = "cpu"
    threads: int = 2
    repeats: int = 7
    clock: str = "wall"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: What is compared.
        ours: Median of our code, in `unit`.
        baseline: Median of what it is compared to, in `unit`.
        baseline_name: What that is.
        unit: "ms" or "MiB".
        target: Highest ratio ours / baseline that is good enough; None where no number was promised.
    """

    name: str
    ours: float
    baseline: float
    baseline_name: str
    unit: str
    target: float | None = None

    @property
    def ratio(self) -> float:
        """Ours / baseline; below 1 we are faster or smaller."""
        return self.ours / self.baseline

    @property
    def verdict(self) -> str:
        """Whether the target was met."""
        if self.target is None:
            return ""
        return "met" if self.ratio <= self.target else "MISSED"

    def line(self) -> str:
        """Return one line of text with both medians, the ratio and the target."""
        target = "" if self.target is None else f" (target <= {self.target:g}, {self.verdict})"
        return (
            f"{self.name}: {self.ours:.4g} {self.unit} against {self.baseline:.4g} {self.unit} of "
            f"{self.baseline_name}: ratio {self.ratio:.3g}{target}"
        )

    def as_json(self) -> dict[str, object]:
        """Return the fields, with ratio and verdict."""
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict}


def median_times(candidates: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Time candidates in turns, so that a busy spell of the machine hits all of them alike.

    Args:
        candidates: Name -> function without arguments. Each is called twice before the clock starts.
        options: Repeats, clock and device.

    Returns:
        Name -> median time of one call in milliseconds.
    """
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    for candidate in candidates.values():
        candidate()
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.repeats):
        for name, candidate in candidates.items():
            _synchronize(options)
            start = clock()
            candidate()
            _synchronize(options)
            times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def bytes_kept_for_backward(forward: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter]) -> int:
    """Count the bytes that autograd keeps between forward and backward, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph must live until the sum is taken: a freed storage's address may be given out again.
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    total = sum(storages.values())
    del loss
    return total


def extra_peak_memory(step: Callable[[], object], options: Options) -> int:
    """Return how many bytes a call needs at its peak beyond what was allocated before it.

    On the CPU this reads Linux's high-water mark of resident memory, so call it in a process of its own.
    """
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    before = resident_memory("VmRSS")
    step()
    return resident_memory("VmHWM") - before


def can_measure_memory(options: Options) -> bool:
    """Whether `extra_peak_memory` works here."""
    return options.device == "cuda" or sys.platform == "linux"


def resident_memory(field: str = "VmRSS") -> int:
    """Return this process' resident memory in bytes; "VmHWM" for its high-water mark. Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; memory can be measured on Linux only.")


def _synchronize(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()
