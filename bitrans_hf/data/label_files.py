"""Image labels from the files that other projects publish, without executing anything in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from ..hub.errors import InputError
from .common import DataError

# Type codes of plain numbers, as numpy writes them: booleans, integers and floats of one to eight bytes.
_NUMBER_CODES = frozenset(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)) - {"f1"} | {"b1"}


def read_label_file(path: str | Path, num_classes: int) -> dict[str, list[int]]:
    """Read the object classes of each image from a `cls_labels.npy`, a pickled dict or a `.npz`.

    Args:
        path: A `.npy` with a pickled dict from image id to a 0/1 array (num_classes,), as PSA, SEAM and MCTformer ship
            it, or the same dict in a `.pkl`; both are read by an unpickler that accepts only numbers, text and arrays
            of numbers. Or a `.npz` with `ids` (n,) and `labels`, 0/1 of shape (n, num_classes) or such rows after
            `np.packbits`.
        num_classes: Number of object classes that each row must have.

    Returns:
        Image id -> ascending class ids.

    Raises:
        DataError: the file is missing, damaged, of another kind, or holds anything but numbers and text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"label file {path} is not there; give the path of a cls_labels.npy or .npz.")
    if path.suffix in (".npy", ".pkl", ".pickle"):
        rows = _read_pickled_dict(path)
    elif path.suffix == ".npz":
        rows = _read_npz(path, num_classes)
    else:
        raise DataError(f"label file {path} ends in {path.suffix!r}, expected .npy, .pkl or .npz; convert it.")
    labels = {}
    for image_id, row in rows.items():
        values = np.asarray(row)
        if values.shape != (num_classes,) or not ((values == 0) | (values == 1)).all():
            raise DataError(
                f"{path} holds {values.dtype} of shape {values.shape} for image {image_id!r}, expected "
                f"{num_classes} numbers that are 0 or 1; is it the label file of another data set?"
            )
        labels[str(image_id)] = np.flatnonzero(values).tolist()
    return labels


def _read_npz(path: Path, num_classes: int) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            ids, labels = archive["ids"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a .npz with 'ids' and 'labels'.") from error
    if labels.ndim == 2 and labels.dtype == np.uint8 and labels.shape[1] == -(-num_classes // 8) != num_classes:
        labels = np.unpackbits(labels, axis=1, count=num_classes)
    if len(ids) != len(labels):
        raise DataError(f"{path} has {len(ids)} ids for {len(labels)} rows of labels; write the file again.")
    return {str(image_id): row for image_id, row in zip(ids, labels, strict=True)}


# ---- A pickle that may come from anywhere.


def _read_pickled_dict(path: Path) -> Mapping[str, Any]:
    """Read a pickled dict; in a `.npy` it follows the header of a 0-dimensional array, as `np.save` writes it."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".npy":
                _skip_npy_header(file, path)
            content = _array(_NumbersOnlyUnpickler(file).load())
    # Damaged pickles fail in many ways; the unpickler itself can only reach the stand-ins below.
    except (
        OSError, EOFError, ValueError, pickle.UnpicklingError, TypeError, AttributeError, KeyError, IndexError,
        ImportError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} was refused ({error}); expected a pickled dict from image id to an array of numbers."
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dict from image id to labels.")
    try:
        return {image_id: _array(row) for image_id, row in content.items()}
    except ValueError as error:
        raise DataError(f"{path} was refused ({error}); expected arrays of numbers.") from error


def _skip_npy_header(file: BinaryIO, path: Path) -> None:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind != "O" or shape != ():
        raise DataError(
            f"{path} holds {dtype} of shape {shape}, expected one dict from image id to labels, as "
            "np.save(path, {...}) writes it."
        )


def _read_header_2_0(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    return np.lib.format.read_array_header_2_0(file)


class _StandIn:
    """Base of the stand-ins; `__setstate__` keeps a pickle from setting attributes of the classes themselves."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of something that has none")


class _Dtype(_StandIn):
    """Takes the parts of a pickled dtype and keeps its code, so that no C code of numpy sees untrusted values."""

    def __init__(self, code: str, align: object = False, copy: object = True) -> None:
        if code not in _NUMBER_CODES and code not in ("O8", "O"):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, which is not a number")
        self.code = code
        self.byte_order: Literal["<", ">", "|", "="] = "|"

    def __setstate__(self, state: Any) -> None:
        byte_order = state[1]
        if byte_order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds a dtype of byte order {byte_order!r}")
        self.byte_order = byte_order


class _Array(_StandIn):
    """Takes the parts of a pickled array."""

    def __init__(self, *reconstruct_arguments: object) -> None:
        self.shape: Any = ()
        self.dtype: _Dtype | None = None
        self.content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran_order, self.content = state


class _FromBuffer(_StandIn):
    """Stands for `numpy._core.numeric._frombuffer`, by which pickles of protocol 5 carry arrays."""

    def __new__(cls, content: Any, dtype: Any, shape: Any, order: Any) -> Any:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", content))
        return array


class _Latin1(_StandIn):
    """Stands for `_codecs.encode`, by which old pickles carry bytes as text."""

    def __new__(cls, text: str, encoding: str) -> Any:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
        return text.encode("latin1")


class _NumbersOnlyUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, text, numbers and arrays of numbers; any other name is refused before it is imported."""

    _KNOWN: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
        ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
        ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Latin1,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is not data")
        return self._KNOWN[module_name, global_name]


def _array(value: Any) -> Any:
    """Turn a stand-in into a numpy array, or into the one object of a 0-dimensional object array."""
    if not isinstance(value, _Array):
        return value
    if not isinstance(value.dtype, _Dtype):
        raise InputError("it holds an array without a dtype")
    if value.dtype.code in ("O8", "O"):
        if value.shape == () and isinstance(value.content, list) and len(value.content) == 1:
            return value.content[0]
        raise InputError("it holds an array of objects")
    if not isinstance(value.content, bytes | bytearray):
        raise InputError("it holds an array whose content is not bytes")
    flat = np.frombuffer(value.content, dtype=np.dtype(value.dtype.code).newbyteorder(value.dtype.byte_order))
    return flat.reshape(value.shape, order="F" if value.fortran_order else "C")
