"""Random walk against squaring a dense matrix; the CRF's pool, its labels on disk, and PAR beside it."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bitrans_hf.data import make_shapes, open_image, open_mask
from bitrans_hf.hub.affinity_pairs import affinity_matrix, pair_affinity, pair_indices
from bitrans_hf.hub.labels import IGNORE_INDEX
from bitrans_hf.hub.par import pixel_adaptive_refinement
from bitrans_hf.pool import ImagePool, available_cores
from bitrans_hf.refine.crf import CrfNotInstalledError, check_crf_installed, dense_crf
from bitrans_hf.refine.pseudo_labels import with_background
from bitrans_hf.refine.random_walk import propagate, transition_matrix

from .harness import (
    Options,
    Row,
    bytes_kept_for_backward,
    can_measure_memory,
    extra_peak_memory,
    median_times,
)

MEBIBYTE = 2**20
VOC_GRID = (47, 63)  # of a 375 x 500 image at stride 8
FOUR_GIGABYTES = 4e9


# ---- Random walk.


def make_walk(grid: tuple[int, int], options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Make pair affinities (1, P, M) of smooth random features, and scores (3, h, w) of background and two classes."""
    generator = torch.Generator().manual_seed(0)
    coarse = 2 * torch.randn(1, 16, 9, 11, generator=generator)
    pairs = pair_affinity(F.interpolate(coarse, size=grid, mode="bilinear"))
    return pairs.to(options.device), torch.rand(3, *grid, generator=generator).to(options.device)


def walk_by_squaring(scores: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Do as PSA does: a dense transition matrix, squared six times, then one product."""
    return (scores.flatten(1).to(dense.dtype) @ transition_matrix(dense, num_doublings=6)).reshape(scores.shape)


def random_walk(options: Options) -> list[Row]:
    """64 steps on VOC's grid, both ways starting from the affinity matrix."""
    pairs, scores = make_walk(VOC_GRID, options)
    sparse = affinity_matrix(pairs, VOC_GRID)[0]
    dense = sparse.to_dense()
    exact = walk_by_squaring(scores, dense.double())
    difference = float((propagate(scores, sparse) - exact).abs().max())
    if difference > 1e-5:
        raise RuntimeError(f"both walks must agree to 1e-5, they differ by {difference:.3g}.")
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: propagate(scores, sparse),
        "dense": lambda: walk_by_squaring(scores, dense),
    }
    times = median_times(candidates, replace(options, repeats=min(options.repeats, 3)))  # squaring takes seconds
    name = (
        f"random walk of 64 steps, {VOC_GRID[0]}x{VOC_GRID[1]} (max difference {difference:.1g} from float64 squaring)"
    )
    return [Row(name, times["ours"], times["dense"], "dense squaring in float32", "ms", 0.1), *walk_memory(options)]


def bytes_of_walk(grid: tuple[int, int], dense: bool, options: Options) -> int:
    """Return the extra bytes at the peak between pair affinities and walked scores."""
    torch.set_num_threads(options.threads)
    small_pairs, small_scores = make_walk((12, 12), options)
    propagate(small_scores, affinity_matrix(small_pairs, (12, 12))[0])  # libraries load what they need once
    pairs, scores = make_walk(grid, options)

    def walk() -> torch.Tensor:
        matrix = affinity_matrix(pairs, grid)[0]
        return walk_by_squaring(scores, matrix.to_dense()) if dense else propagate(scores, matrix)

    return extra_peak_memory(walk, options)


def walk_memory(options: Options) -> list[Row]:
    """Peak memory on VOC's grid, and the largest grid of 4 GB, computed from the bytes per cell of a larger one."""
    if not can_measure_memory(options):
        return []
    large_grid = (4 * VOC_GRID[0], 4 * VOC_GRID[1])
    measured = []
    for grid, dense in ((VOC_GRID, False), (VOC_GRID, True), (large_grid, False)):
        # A fresh process each: the CPU's high-water mark counts memory that an earlier run left with the allocator.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured.append(pool.submit(bytes_of_walk, grid, dense, options).result())
    ours, squaring, large = measured
    bytes_per_cell = large / math.prod(large_grid)
    cells_of_ours = FOUR_GIGABYTES / bytes_per_cell
    cells_of_squaring = math.sqrt(FOUR_GIGABYTES / (squaring / math.prod(VOC_GRID) ** 2))
    name = (
        f"largest random walk in 4 GB, computed from {bytes_per_cell:.0f} bytes per cell, as measured on "
        f"{large_grid[0]}x{large_grid[1]}: a grid of {three_by_four(cells_of_ours)} against "
        f"{three_by_four(cells_of_squaring)}, million cells (more is better)"
    )
    return [
        Row("random walk, peak memory", ours / MEBIBYTE, squaring / MEBIBYTE, "dense squaring", "MiB"),
        Row(name, cells_of_ours / 1e6, cells_of_squaring / 1e6, "dense squaring", "million"),
    ]


def three_by_four(cells: float) -> str:
    """Return the sides of a grid of that many cells and an image's usual shape."""
    height = math.sqrt(0.75 * cells)
    return f"{height:.0f}x{4 * height / 3:.0f}"


# ---- Pair affinities.


def pair_affinity_as_psa(features: torch.Tensor, start: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
    """Do as PSA does: pick from-cells and partners, (B, D, P, M) at once, and let autograd keep what it needs."""
    flat = features.flatten(2)
    from_cells, to_cells = flat[:, :, start], flat[:, :, partners.flatten()].unflatten(2, partners.shape)
    return torch.exp(-(to_cells - from_cells.unsqueeze(2)).abs().mean(dim=1))


def pair_affinities(options: Options) -> list[Row]:
    """Forward and backward at the size that AffinityNet is trained with: 448 channels on a 56x56 grid."""
    batch_size, grid = (1 if options.device == "cpu" else 8), (56, 56)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch_size, 448, *grid, generator=generator).to(options.device).requires_grad_()
    start, partners = (index.to(options.device) for index in pair_indices(grid))
    weights = torch.rand(batch_size, *partners.shape, generator=generator).to(options.device)
    forward: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: (pair_affinity(features) * weights).sum(),
        "psa": lambda: (pair_affinity_as_psa(features, start, partners) * weights).sum(),
    }
    gradients = {name: torch.autograd.grad(loss(), features)[0] for name, loss in forward.items()}
    if not torch.allclose(gradients["ours"], gradients["psa"], atol=1e-5):
        raise RuntimeError("both ways must have one gradient, and differ.")
    steps: dict[str, Callable[[], object]] = {
        name: functools.partial(lambda loss: torch.autograd.grad(loss(), features), loss)
        for name, loss in forward.items()
    }
    times = median_times(steps, options)
    kept = {name: bytes_kept_for_backward(loss, []) / MEBIBYTE for name, loss in forward.items()}
    name = f"pair affinities, 448 channels on {grid[0]}x{grid[1]}, batch {batch_size}"
    return [
        Row(f"{name}, forward and backward", times["ours"], times["psa"], "PSA's indexing", "ms"),
        Row(f"{name}, kept for backward", kept["ours"], kept["psa"], "PSA's indexing", "MiB"),
    ]


# ---- Dense CRF.


def make_pictures(count: int) -> tuple[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Make (image, present class ids, blurred class maps) at VOC's size, and say what they are of.

    Real VOC images where they are at hand, drawn ones elsewhere. The maps stand for seeds: true masks, blurred over
    a grid of 16-pixel patches and cut down to what a seed is worth.
    """
    root = Path(os.environ.get("BITRANS_SHARED", "../shared")) / "data" / "voc12_animals"
    if root.is_dir():
        source, given = "VOC images", list(read_voc(root, count))
    else:
        scenes = make_shapes(count, seed=0, image_size=432)
        source, given = "drawn images", [(open_image(row["image"]), open_mask(row["mask"])) for row in scenes]
    pictures = []
    for number, (picture, mask) in enumerate(given):
        class_ids = np.setdiff1d(mask, [0, IGNORE_INDEX]).astype(np.int64) - 1
        truth = torch.from_numpy(np.stack([mask == class_id + 1 for class_id in class_ids]).astype(np.float32))
        grid = (picture.height // 16, picture.width // 16)
        coarse = F.avg_pool2d(F.interpolate(truth[None], size=grid, mode="area"), 3, stride=1, padding=1)
        noise = 0.15 * torch.rand(coarse.shape, generator=torch.Generator().manual_seed(number))
        maps = F.interpolate((coarse + noise).clamp(max=1.0), size=mask.shape, mode="bilinear")[0]
        pictures.append((np.array(picture), class_ids, maps.numpy()))
    return source, pictures


def read_voc(root: Path, count: int) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Yield the first images of a devkit folder that have masks, with these."""
    for path in sorted((root / "SegmentationClassAug").glob("*.png"))[:count]:
        with Image.open(path) as mask, Image.open(root / "JPEGImages" / f"{path.stem}.jpg") as picture:
            yield picture.convert("RGB"), np.array(mask)


def refine(job: tuple[np.ndarray, np.ndarray]) -> tuple[int, float]:
    """Run one CRF and say which process did it in how many seconds of its processor time."""
    start = time.process_time()
    dense_crf(*job, preset="psa")
    return os.getpid(), time.process_time() - start


def busiest_process(pool: ImagePool, jobs: list[tuple[str, tuple[np.ndarray, np.ndarray]]]) -> float:
    """Return the milliseconds of processor time of the busiest worker and of this process, which feeds it."""
    start, seconds = time.process_time(), defaultdict[int, float](float)
    for outcome in pool.run(refine, jobs):
        assert outcome.result is not None
        worker, spent = outcome.result
        seconds[worker] += spent
    own = time.process_time() - start
    return 1e3 * (own if pool.processes == 1 else own + max(seconds.values()))


def crf_pool(options: Options) -> list[Row]:
    """A set of images on two processes against one. By the processor's clock, the busiest process counts."""
    if not crf_is_there():
        return []
    source, pictures = make_pictures(16)  # enough that one last image alone does not matter
    jobs = [(str(n), (image, with_background(maps, alpha=1))) for n, (image, _, maps) in enumerate(pictures)]
    options = replace(options, repeats=min(options.repeats, 3))
    with ImagePool(2) as two, ImagePool(1) as one:
        start = time.perf_counter()
        list(two.run(len, [("a", "a"), ("b", "b")]))
        start_up = time.perf_counter() - start
        pools = {"two": two, "one": one}
        if options.clock == "cpu":
            runs = [
                {name: busiest_process(pool, jobs) for name, pool in pools.items()} for _ in range(options.repeats)
            ]
            times = {name: statistics.median(run[name] for run in runs) for name in pools}
        else:
            candidates: dict[str, Callable[[], object]] = {
                name: functools.partial(lambda pool: list(pool.run(refine, jobs)), pool)
                for name, pool in pools.items()
            }
            times = median_times(candidates, options)
    name = (
        f"dense CRF of {len(jobs)} {source}, 2 processes on {available_cores()} cores"
        f"{', processor time of the busiest' if options.clock == 'cpu' else ''} "
        f"(their start, {start_up:.1f} s once for a set, left out)"
    )
    return [Row(name, times["two"], times["one"], "one process", "ms", 0.55)]


def par_beside_crf(options: Options) -> list[Row]:
    """PAR on the device against the CRF, which knows the CPU only."""
    if not crf_is_there():
        return []
    source, pictures = make_pictures(1)
    image, _, maps = pictures[0]
    scores = with_background(maps, alpha=1)
    batch_size = 1 if options.device == "cpu" else 8
    images = torch.from_numpy(image.copy()).permute(2, 0, 1).repeat(batch_size, 1, 1, 1).to(options.device)
    stack = torch.from_numpy(scores).repeat(batch_size, 1, 1, 1).to(options.device)
    candidates: dict[str, Callable[[], object]] = {
        "par": lambda: pixel_adaptive_refinement(images, stack),
        "crf": lambda: dense_crf(image, scores),
    }
    times = median_times(candidates, replace(options, repeats=min(options.repeats, 3)))
    name = (
        f"PAR of {source[:-1]} of {image.shape[0]}x{image.shape[1]}, {len(scores)} labels, in batches of {batch_size}"
    )
    return [Row(name, times["par"] / batch_size, times["crf"], "the dense CRF", "ms")]


def crf_is_there() -> bool:
    """Whether the CRF can run; says so where it can not."""
    try:
        check_crf_installed()
    except CrfNotInstalledError as absent:
        print(f"not measured: {absent}")
        return False
    return True
