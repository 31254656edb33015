"""Run the benchmarks, print one line for each and write them to runs/bench/."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from bitrans_hf.commands import run_script

    run_script("benchmarks.__main__")

import argparse
import json
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
import transformers

from . import bench_data, bench_metrics, bench_model, bench_refine, bench_seeds, bench_segment
from .harness import Options

BENCHMARKS = {
    "forward": bench_model.forward_with_maps,
    "step": bench_model.bi_branch_step,
    "memory": bench_model.memory,
    "seeds": bench_seeds.seeds_of_a_set,
    "data": bench_data.data_of_cocos_size,
    "sweep": bench_metrics.sweep_of_thresholds,
    "miou": bench_metrics.mean_iou_of_a_stream,
    "pairs": bench_refine.pair_affinities,
    "walk": bench_refine.random_walk,
    "crf": bench_refine.crf_pool,
    "par": bench_refine.par_beside_crf,
    "miou-memory": bench_metrics.memory_of_a_stream,
    "segment-training": bench_segment.training_step,
    "segment-test": bench_segment.testing,
}


def main() -> None:
    """Parse the command line and run what it names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side; the median counts")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the JSON file")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device; leave it out to measure the CPU")
    options = Options(arguments.device, arguments.threads, arguments.repeats, arguments.clock)
    torch.set_num_threads(options.threads)

    rows = []
    for name in arguments.names or BENCHMARKS:
        for row in BENCHMARKS[name](options):
            print(row.line(), flush=True)
            rows.append(row)

    now = datetime.now(UTC)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{now:%Y-%m-%dT%H%M%S}-{platform.node()}-{options.device}.json"
    report = {
        "date": now.isoformat(timespec="seconds"),
        **environment(options),
        "rows": [row.as_json() for row in rows],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def environment(options: Options) -> dict[str, object]:
    """Say what the numbers were measured on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "options": asdict(options),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
    }
