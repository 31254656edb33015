"""Export for other languages and runtimes: one graph from pixels to tag logits, seeds and affinity.

python -m bitrans_hf.publishing.export MODEL OUT

writes `model.onnx`, `model.pt2` (`torch.export`) and `export.json`, which describes inputs and outputs. Batch and
image size stay dynamic. Both graphs are compared with torch on three sizes before anything is written.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from ..commands import run_script

    run_script("bitrans_hf.publishing.export")

import argparse
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..files import atomic_write
from ..hub.configuration_bitrans import BiTransConfig
from ..hub.errors import InputError, MissingExtraError, ends_with_a_sentence
from ..hub.image_processing_bitrans import BiTransImageProcessor
from ..hub.maps import fused_maps
from ..hub.modeling_bitrans import BiTransModel
from ..hub.weight_files import load_trained
from ..hub_errors import hub_error_sentence
from ..progress import working

ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("logits", "seeds", "affinity")
TOLERANCE = 1e-4
"""Largest allowed difference of an exported graph's outputs from torch's."""

MAX_BATCH, MAX_SIDE_PX = 4096, 16384

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Runner = Callable[[torch.Tensor], Outputs]


class ExportError(InputError):
    """A graph that cannot be exported, or whose outputs differ from torch's."""


def cubic_weights(num_out: int, step: torch.Tensor, num_in: int) -> torch.Tensor:
    """Weights of bicubic resizing along one axis, in torch's convention (A = -0.75, half-pixel centers).

    Args:
        num_out: Length after resizing.
        step: Scalar, input samples for each output sample: 1 / scale_factor.
        num_in: Length before resizing.

    Returns:
        (num_out, num_in + 4), for an axis that was padded by its border values, two at each end: a sample's four
        neighbors reach that far.
    """
    source = (torch.arange(num_out, dtype=torch.float32) + 0.5) * step - 0.5
    distance = (source.unsqueeze(1) - torch.arange(-2, num_in + 2, dtype=torch.float32)).abs()
    near = (1.25 * distance - 2.25) * distance * distance + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


class TraceableBiTrans(BiTransModel):
    """`BiTransModel` whose position embedding is one formula for every image size.

    `F.interpolate` with a scale factor fixes the size when it is traced, and the training size is a branch. Here both
    are the same two matrix products: at the training size the guard of 0.1 is left out, the sampling points fall on
    the samples, and the weights are exactly 0 and 1.
    """

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings (1, C + N, D) as `BiTransModel.position_embedding` gives them, within 1e-6."""
        patch_size, grid = self.config.patch_size, self.config.image_size // self.config.patch_size
        h, w = height // patch_size, width // patch_size
        is_trained = (as_scalar(height) == as_scalar(width)) & (as_scalar(h) == grid)
        guard = torch.where(is_trained, 0.0, 0.1)
        rows = cubic_weights(h, grid / (as_scalar(h) + guard), grid)
        columns = cubic_weights(w, grid / (as_scalar(w) + guard), grid)
        table = self.patch_position.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        table = F.pad(table, (2, 2, 2, 2), mode="replicate")[0].permute(1, 2, 0)  # (grid + 4, grid + 4, D)
        table = (columns @ table).reshape(grid + 4, -1)  # (grid + 4, w * D)
        table = (rows @ table).reshape(h * w, self.config.hidden_size)
        return torch.cat([self.class_position[0].float(), table]).unsqueeze(0)


def as_scalar(size: int) -> torch.Tensor:
    """Make a size a float32 scalar; comparing a traced size itself would fix it."""
    return torch.full((), size, dtype=torch.float32)


class SeedNetwork(nn.Module):
    """Maps pixels to tag logits, seeds of every class and the affinity, as plain tensors.

    Args:
        model: The trained model; it is copied, in float32 and evaluation mode.
        flip: Average logits and seeds over the horizontal flip, as `extract_seeds` does; doubles the work.
        traceable: Copy it as a `TraceableBiTrans`; False keeps the model's own position embedding, to compare with.
    """

    def __init__(self, model: BiTransModel, *, flip: bool = True, traceable: bool = True):
        super().__init__()
        self.flip = flip
        self.model = (TraceableBiTrans if traceable else BiTransModel)(cast(BiTransConfig, model.config))
        self.model.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
        self.requires_grad_(False).eval()

    def forward(self, pixel_values: torch.Tensor) -> Outputs:
        """Map normalized images (B, 3, H, W) to the three outputs.

        Returns:
            logits (B, C), whose sigmoid is the tag score; seeds (B, C, H, W) in [0, 1], for class c what
            `extract_seeds` gives at scale 1, meaningful where c is in the image (by the fusion "competing", classes
            share patches as probably as the model tags them); affinity (B, N, N) of the image
            itself (Eq. 9, or what `config.affinity_source` names).
        """
        views = torch.cat([pixel_values, pixel_values.flip(-1)]) if self.flip else pixel_values
        output = self.model(views)
        config = cast(BiTransConfig, self.model.config)
        maps = fused_maps(
            output,
            config.fusion,
            refine=True,
            flip=self.flip,
            refine_steps=config.refine_steps,
            normalize_affinity=config.normalize_affinity,
        )
        logits, affinity = output.logits, output.affinity
        if self.flip:
            batch = pixel_values.shape[0]
            logits, affinity = (logits[:batch] + logits[batch:]) / 2, affinity[:batch]
        maps = F.interpolate(maps, size=pixel_values.shape[2:], mode="bilinear")
        low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
        return logits, (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny), affinity


def to_exported_program(model: BiTransModel, *, flip: bool = True) -> torch.export.ExportedProgram:
    """Trace the network with dynamic batch and image size (`torch.export`).

    Args:
        model: A trained model.
        flip: See `SeedNetwork`.

    Returns:
        A program of `pixel_values` (B, 3, H, W) float32 for B in [1, 4096] and H, W from two patches to 16,384 pixels.
    """
    patch_size = model.config.patch_size
    sides = [torch.export.Dim(name, min=2 * patch_size, max=MAX_SIDE_PX) for name in ("height", "width")]
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    # Sizes of the example only must differ from each other and from 1, which would be taken for constants.
    example = torch.zeros(2, model.config.num_channels, 3 * patch_size, 4 * patch_size)
    with torch.no_grad():
        return torch.export.export(
            SeedNetwork(model, flip=flip),
            (example,),
            dynamic_shapes={"pixel_values": {0: batch, 2: sides[0], 3: sides[1]}},
            # The solver cannot prove that h * w patches are more than h, and would ask for the impossible.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def to_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Translate a program of `to_exported_program` to ONNX.

    Args:
        program: What to translate.
        metadata: Written into the file as its properties.
    """
    translated = torch.onnx.export(
        program, input_names=["pixel_values"], output_names=list(OUTPUTS), dynamo=True, verbose=False
    )
    assert translated is not None  # it is when no file name is given
    translated.model.metadata_props.update(metadata)
    return cast(bytes, translated.model_proto.SerializeToString())


def need(name: str) -> ModuleType:
    """Import a module of the extra `export`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} is needed for ONNX; install it with: pip install 'bitrans-hf[export]'"
        ) from error


def onnx_runner(content: bytes) -> Runner:
    """Return a function that runs an ONNX model by onnxruntime on the CPU."""
    session = need("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(pixel_values: torch.Tensor) -> Outputs:
        values = session.run(list(OUTPUTS), {"pixel_values": pixel_values.numpy()})
        return cast(Outputs, tuple(map(torch.from_numpy, values)))

    return run


def check_sizes(model: BiTransModel) -> tuple[tuple[int, int, int], ...]:
    """(batch, height, width) that graphs are compared on: the training size, a wide and a tall one off the grid."""
    side, patch_size = model.config.image_size, model.config.patch_size
    return (
        (1, side, side),
        (2, side, side + 2 * patch_size + 1),
        (3, side + patch_size + 3, max(side // 2, 2 * patch_size)),
    )


def compare(
    model: BiTransModel, run: Runner, *, flip: bool, sizes: Sequence[tuple[int, int, int]]
) -> dict[str, float]:
    """Largest difference of a graph's outputs from the model's, on random images of every size.

    Args:
        model: The model that was exported.
        run: The graph: (B, 3, H, W) -> the three outputs.
        flip: Whether the graph averages over the flip.
        sizes: (batch, height, width) to try.

    Returns:
        "BxHxW" -> difference.
    """
    reference = SeedNetwork(model, flip=flip, traceable=False)
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for batch, height, width in sizes:
        pixel_values = torch.randn(batch, model.config.num_channels, height, width, generator=generator)
        with torch.no_grad():
            pairs = zip(reference(pixel_values), run(pixel_values), strict=True)
            largest = torch.stack([(wanted - got).abs().max() for wanted, got in pairs]).max()  # NaN stays NaN
        differences[f"{batch}x{height}x{width}"] = float(largest)
    return differences


def export_model(
    model: BiTransModel, processor: BiTransImageProcessor, folder: str | Path, *, flip: bool = True
) -> Mapping[str, Any]:
    """Write `model.pt2`, `model.onnx` and `export.json` into a folder, once they agree with torch.

    Args:
        model: A trained model.
        processor: Its image processor; its mean and standard deviation go into `export.json`.
        folder: Output folder, created if necessary.
        flip: See `SeedNetwork`.

    Returns:
        What `export.json` holds: inputs, outputs, class names, pre-processing, and "difference_from_torch" of each
        graph at each size.

    Raises:
        ExportError: a graph differs from torch by more than `TOLERANCE`; nothing is written then.
        ImportError: the extra `export` is not installed.
    """
    for name in ONNX_LIBRARIES:
        need(name)
    config = model.config
    names = [name for _, name in sorted(cast("Mapping[int, str]", config.id2label).items())]
    program = to_exported_program(model, flip=flip)
    content = to_onnx(program, {"classes": json.dumps(names), "patch_size": str(config.patch_size)})
    differences = {
        "model.pt2": compare(model, cast("Runner", program.module()), flip=flip, sizes=check_sizes(model)),
        "model.onnx": compare(model, onnx_runner(content), flip=flip, sizes=check_sizes(model)),
    }
    for name, found in differences.items():
        size, largest = max(found.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
        if not largest <= TOLERANCE:
            raise ExportError(
                f"{name} differs from torch by {largest:.1e} at {size} (batch x height x width), at most "
                f"{TOLERANCE:.0e} is allowed; nothing was written. Try other versions of torch and onnxscript."
            )
    description = {
        "input": {
            "pixel_values": "float32 (batch, 3, height, width): RGB in [0, 1], minus mean, divided by std; "
            f"height and width from {2 * config.patch_size} to {MAX_SIDE_PX} pixels",
            "mean": list(map(float, processor.image_mean)),
            "std": list(map(float, processor.image_std)),
        },
        "outputs": {
            "logits": "(batch, classes): sigmoid gives the tag scores",
            "seeds": "(batch, classes, height, width) in [0, 1]: use the maps of the classes that are in the image; "
            "a pixel belongs to the class of the highest map, or to the background below the threshold "
            f"({config.threshold})",
            "affinity": "(batch, patches, patches): affinity of patches, row-major on the grid of "
            f"{config.patch_size}-pixel patches",
        },
        "classes": names,
        "flip": flip,
        "difference_from_torch": differences,
    }
    folder = Path(folder)
    with atomic_write(folder / "model.pt2") as temporary:
        torch.export.save(program, temporary)
    with atomic_write(folder / "model.onnx") as temporary:
        temporary.write_bytes(content)
    with atomic_write(folder / "export.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def main(arguments: Sequence[str] | None = None) -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bitrans_hf.publishing.export",
        description="Write a model as ONNX and as a torch.export program: pixels -> tag logits, seeds, affinity.",
    )
    parser.add_argument("model", help="folder or Hub repository of a BiTransModel, such as runs/shapes/train/model")
    parser.add_argument("out", type=Path, help="folder for model.onnx, model.pt2 and export.json")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--no-flip", action="store_true", help="half the work: seeds of the image without its flip")
    options = parser.parse_args(arguments)
    try:
        with working("export: loading the model"):
            model = load_trained(BiTransModel, options.model, revision=options.revision)
            processor = BiTransImageProcessor.from_pretrained(options.model, revision=options.revision)
    except (InputError, OSError) as error:  # transformers says with a bare OSError that there is no such model
        sentence = hub_error_sentence(error, options.model, options.revision)
        raise SystemExit(f"error: {error if sentence is None else sentence}") from error
    with ends_with_a_sentence(), working("export: tracing the model and comparing its graphs with torch"):
        description = export_model(model, processor, options.out, flip=not options.no_flip)
    for name, found in description["difference_from_torch"].items():
        shown = ", ".join(f"{difference:.0e} at {size}" for size, difference in found.items())
        print(f"{options.out / name}: differs from torch by {shown}")
    print(f"{options.out / 'export.json'}: what goes in and comes out")
