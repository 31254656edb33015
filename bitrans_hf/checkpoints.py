"""Tensors by name from checkpoint files, however they are wrapped. Only tensors are unpickled.

Tensors may be nested in dictionaries and lists, beside an optimizer's, under prefixes such as "module." (of
DataParallel), "_orig_mod." (of torch.compile), "backbone." or "teacher."; the wanted ones are found by name.
"""

import argparse
import math
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .hub.errors import InputError, MissingFileError
from .hub.weight_files import MXNET_START, WeightFileError, format_of

StateDict = Mapping[str, torch.Tensor]

# What torch.load raises for a file that was cut or changed.
_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)

# What trainers call the average of a network over its training, which is the better copy; timm takes it too.
_AVERAGED = {"ema", "teacher"}
_WRAPPERS = ("state_dict.", "model.")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name.

    Attributes:
        tensors: The tensors of one network; all tensors if no network was recognized.
        name: Its name in messages: the file, or "the weights".
    """

    tensors: dict[str, torch.Tensor]
    name: str


def read_checkpoint(weights: StateDict | str | Path, names: Collection[str]) -> Checkpoint:
    """Read the weights of one network.

    Args:
        weights: A state dict, alone or wrapped, or a file of one: safetensors, torch.save's or MXNet's `.params`. The
            content decides, not the file name.
        names: Names of tensors that identify the network: what precedes them is a prefix and is removed, and tensors
            without it are left out. Of several networks, the one with the most of these names is chosen, then the one
            that is a running average ("ema", "teacher").

    Raises:
        InputError: the file cannot be read, holds other objects than tensors, or holds two equally good networks; the
            message names it.
        MissingFileError: there is no such file.
    """
    if isinstance(weights, Mapping):
        return Checkpoint(_network(dict(_tensors_in(weights)), names, "the weights"), "the weights")
    path = Path(weights)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise MissingFileError(f"{path} is a folder, expected a file of weights; it holds {inside or 'none'}.")
    if not path.is_file():
        raise MissingFileError(f"no weights file at {path}; expected a .safetensors or .pth file.")
    return Checkpoint(_network(_read_file(path), names, str(path)), str(path))


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    kind = format_of(path)
    if kind == "mxnet":
        return read_mxnet_params(path)
    if kind == "safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightFileError(f"{path} is damaged ({error}); download or copy it again.") from error
    # Trainers save their parsed arguments and best scores beside the weights: those are admitted, nothing else is.
    scalars = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), type(np.dtype(np.int64))]
    scalar: Any = np.float64(0).__reduce__()[0]
    admitted = [argparse.Namespace, scalar, *scalars]
    try:
        # Open: by its name, torch would take a file for safetensors.
        with path.open("rb") as file, torch.serialization.safe_globals(admitted):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        refused = re.search(r"(?:GLOBAL|class) `?([\w.]+\.\w+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused is not None:
            raise WeightFileError(
                f"{path} holds more than tensors ({refused[1]}), which is not opened because it could run code; where "
                "it comes from, save the tensors alone: torch.save(model.state_dict(), 'weights.pth')."
            ) from error
        raise WeightFileError(f"{path} is cut short or damaged; download or copy it again.") from error
    return dict(_tensors_in(loaded))


def _tensors_in(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested dictionaries and lists with its path, such as "model.blocks.0.norm1.bias"."""
    if isinstance(content, torch.Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping | list | tuple):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from _tensors_in(value, f"{prefix}{key}.")


def _network(tensors: dict[str, torch.Tensor], names: Collection[str], source: str) -> dict[str, torch.Tensor]:
    if not tensors:
        raise InputError(f"{source} holds no tensors; expected the state dict of a network.")
    prefixes = {key.removesuffix(name) for key in tensors for name in names if key == name or key.endswith(f".{name}")}
    found = {prefix: sum(prefix + name in tensors for name in names) for prefix in prefixes}
    best = [prefix for prefix in found if found[prefix] == max(found.values())]
    if len(best) > 1:
        averaged = [prefix for prefix in best if _AVERAGED & set(re.split(r"[._]", prefix))]
        best = sorted(averaged or best)
        if not all(_equal(tensors, best[0], other) for other in best[1:]):
            raise InputError(
                f"{source} holds {len(best)} networks, {' and '.join(map(repr, best))}; save "
                "the state dict of the one that you want."
            )
    if best:
        prefix = best[0]
    else:  # names that the caller may know to translate
        prefix = next((word for word in _WRAPPERS if any(key.startswith(word) for key in tensors)), "")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _equal(tensors: StateDict, prefix: str, other: str) -> bool:
    """Return whether the tensors under two prefixes are one network under two names."""
    pairs = ((tensors[key], other + key.removeprefix(prefix)) for key in tensors if key.startswith(prefix))
    return all(torch.equal(value, tensors[name]) for value, name in pairs if name in tensors)


# ---- MXNet's format.


def read_mxnet_params(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a `.params` file of MXNet, a list of dense arrays with names, without mxnet.

    The format is that of `NDArray::Save` in MXNet 0.5 to 1.9: a header, the arrays (each with its own version, shape,
    device and type), and their names, all little-endian.

    Args:
        path: The file; its arrays are copied into memory.

    Returns:
        Tensors by name, such as "arg:conv1a_weight" and "aux:bn7_moving_mean".

    Raises:
        ValueError: the file is not such a list, is truncated, or holds a sparse array or an unknown type.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no weights file at {path}; expected a .params file of MXNet.")
    reader = _MxnetReader(path)
    if reader.numbers("<u8", 1) != [int.from_bytes(MXNET_START, "little")]:
        raise InputError(f"{path.name} is no list of MXNet arrays: it does not start with 0x112.")
    reader.numbers("<u8", 1)  # reserved
    arrays = [reader.array() for _ in range(reader.numbers("<u8", 1)[0])]
    names = [reader.text() for _ in range(reader.numbers("<u8", 1)[0])]
    if len(names) != len(arrays) or reader.rest():
        raise InputError(
            f"{path.name} holds {len(arrays)} arrays, {len(names)} names and {reader.rest()} bytes more; expected a "
            "name for each array and nothing after."
        )
    return dict(zip(names, arrays, strict=True))


# First four bytes of an array. Before the first version they were the number of dimensions.
_MXNET_V1, _MXNET_V2, _MXNET_V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_MXNET_TYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8", 7: "?"}


class _MxnetReader:
    """Reads a file sequentially; missing bytes are an error that names the file."""

    def __init__(self, path: Path):
        self.name = path.name
        self.bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        self.position = 0

    def rest(self) -> int:
        return len(self.bytes) - self.position

    def values(self, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        if size > self.rest():
            raise InputError(
                f"{self.name} ends early: {size} bytes are missing after byte {self.position}, {self.rest()} are left."
            )
        part = self.bytes[self.position : self.position + size]
        self.position += size
        return np.array(part).view(dtype)

    def numbers(self, dtype: str, count: int) -> list[int]:
        return [int(number) for number in self.values(dtype, count)]

    def text(self) -> str:
        return self.values("u1", self.numbers("<u8", 1)[0]).tobytes().decode()

    def array(self) -> torch.Tensor:
        version = self.numbers("<u4", 1)[0]
        if version in (_MXNET_V2, _MXNET_V3) and self.numbers("<i4", 1) != [0]:
            raise InputError(f"{self.name} holds a sparse array; only dense ones are read.")
        if version in (_MXNET_V1, _MXNET_V2, _MXNET_V3):
            dimensions, size_type = self.numbers("<i4", 1)[0], "<i8"
        else:
            dimensions, size_type = version, "<u4"
        unset = -1 if version == _MXNET_V3 else 0  # a scalar has no dimensions in the third version
        if dimensions == unset:
            return torch.zeros(0)
        if not 0 <= dimensions <= 32:
            raise InputError(f"{self.name} holds an array of {dimensions} dimensions; expected at most 32.")
        shape = self.numbers(size_type, dimensions)
        self.numbers("<i4", 2)  # the device it was on
        kind = self.numbers("<i4", 1)[0]
        if kind not in _MXNET_TYPES:
            raise InputError(f"{self.name} holds an array of MXNet's type {kind}; expected 0 to 7.")
        return torch.from_numpy(self.values(_MXNET_TYPES[kind], math.prod(shape)).reshape(shape))
