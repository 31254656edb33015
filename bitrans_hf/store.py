"""Seeds and refined scores on disk: one small `.npz` for each image, no pickle, complete or absent."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch

from .errors import InputError, MissingFileError
from .seeds import Seeds, normalized_seeds


class DiskFullError(InputError, OSError):
    """There is no room for a file; the message names it and says what to do."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder and rename it to `path` at the end, so that readers see all or nothing.

    The temporary file is removed when the body raises. Its name keeps `path`'s suffix, which libraries look at, and
    carries the process id, so that two processes do not share it.

    Raises:
        DiskFullError: the disk, a quota or a limit on the size of files leaves no room.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"no room left to write {path} ({error.strerror}); make room and run the same command again: files that "
            "are there are whole and are not made twice."
        ) from error


class ImageStore:
    """A folder with one `.npz` for each image, named after it.

    Args:
        folder: Made when the first image is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, image_id: str) -> Path:
        """Return the file of an image; ids with "/" or other special characters are percent-encoded."""
        name = quote(image_id, safe=" ")
        if name.startswith("."):  # hidden files are those that are still being written
            name = f"%2E{name[1:]}"
        return self.folder / f"{name}.npz"

    def __contains__(self, image_id: str) -> bool:
        return self.path(image_id).is_file()

    def ids(self) -> list[str]:
        """Return the ids of all stored images, sorted."""
        return sorted(unquote(path.stem) for path in self.folder.glob("[!.]*.npz"))


class SeedStore(ImageStore):
    """A folder of seeds. What is kept are each variant's summed maps on their own small grid in float16.

    Resizing and min-max normalisation are done when reading: both are cheap, and the maps at the image's size are
    some hundred times larger. Each kept map is scaled to [0, 1] on its grid, which changes nothing, since min-max
    normalisation does not see a scale or an offset and bilinear resizing keeps both.
    """

    def write(
        self, image_id: str, class_ids: np.ndarray, maps: Mapping[str, torch.Tensor], size: tuple[int, int]
    ) -> None:
        """Write one image's seeds by atomic rename.

        Args:
            image_id: Name of the image.
            class_ids: (K,) ids of the present classes.
            maps: Variant name -> (K, h, w) summed maps, any range, of the present classes.
            size: (H, W) of the image in pixels.
        """
        arrays: dict[str, Any] = {"class_ids": np.asarray(class_ids, dtype=np.int64)}
        arrays["size"] = np.array(size, dtype=np.int32)
        for variant, values in maps.items():
            if values.shape[0] != len(class_ids):
                raise InputError(f"{image_id}: {values.shape[0]} maps of {variant!r} for {len(class_ids)} classes.")
            if not torch.isfinite(values).all():
                raise InputError(f"{image_id}: the maps of {variant!r} hold NaN or infinity; the model is broken.")
            scaled = normalized_seeds(class_ids, values, (values.shape[1], values.shape[2])).maps
            arrays[f"maps_{variant}"] = scaled.astype(np.float16)
        with atomic_write(self.path(image_id)) as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **arrays)

    def read(self, image_id: str, variant: str) -> Seeds:
        """Read one variant of an image's seeds at the image's size; raises what `read_variants` does."""
        return self.read_variants(image_id, [variant])[variant]

    def read_variants(self, image_id: str, variants: Iterable[str]) -> dict[str, Seeds]:
        """Read several variants of an image's seeds at the image's size: variant -> seeds.

        Raises:
            MissingFileError: the image has no seeds here.
            ValueError: a variant was not stored.
        """
        path = self.path(image_id)
        if not path.is_file():
            raise MissingFileError(
                f"no seeds of image {image_id!r} in {self.folder}; run training/make_seeds.py first."
            )
        with np.load(path, allow_pickle=False) as arrays:
            class_ids, (height, width) = arrays["class_ids"], arrays["size"].tolist()
            seeds = {}
            for variant in variants:
                if f"maps_{variant}" not in arrays:
                    stored = ", ".join(name.removeprefix("maps_") for name in arrays if name.startswith("maps_"))
                    raise InputError(f"{path} holds the variants {stored}, not {variant!r}.")
                maps = torch.from_numpy(arrays[f"maps_{variant}"].astype(np.float32))
                seeds[variant] = normalized_seeds(class_ids, maps, (height, width))
            return seeds


@dataclass(frozen=True)
class LabelScores:
    """Refined label scores of one image, such as the CRF's marginals for several background exponents.

    Attributes:
        class_ids: (K,) int64, 0-based ids of the present object classes, ascending.
        scores: Name -> (1 + K, H, W) float32 in [0, 1] at the image's size, background as row 0.
    """

    class_ids: np.ndarray
    scores: dict[str, np.ndarray]


class LabelScoreStore(ImageStore):
    """A folder of refined label scores, as bytes.

    Scores are rounded to multiples of 1/255. Most marginals of a CRF are close to 0 or 1, so that the compressed file
    is a small fraction of the reference's dictionary of (H, W) float32 arrays.
    """

    def write(self, image_id: str, class_ids: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        """Write one image's scores by atomic rename.

        Args:
            image_id: Name of the image.
            class_ids: (K,) ids of the present classes.
            scores: Name -> (1 + K, H, W) in [0, 1], background as row 0.

        Raises:
            ValueError: a wrong number of rows, NaN, or values outside [0, 1]; the message names the image.
            DiskFullError: there is no room.
        """
        arrays: dict[str, Any] = {"class_ids": np.asarray(class_ids, dtype=np.int64)}
        for name, values in scores.items():
            if values.ndim != 3 or len(values) != 1 + len(class_ids):
                raise InputError(
                    f"{image_id}: scores {name!r} of {len(class_ids)} classes and background must be "
                    f"({1 + len(class_ids)}, H, W), got {values.shape}."
                )
            # NaN fails every comparison.
            if not ((values >= -1e-3) & (values <= 1 + 1e-3)).all():
                raise InputError(f"{image_id}: scores {name!r} must be in [0, 1] without NaN; refine them again.")
            arrays[f"scores_{name}"] = np.rint(255 * np.clip(values, 0, 1).astype(np.float32)).astype(np.uint8)
        with atomic_write(self.path(image_id)) as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **arrays)

    def read(self, image_id: str) -> LabelScores:
        """Read an image's scores.

        Raises:
            MissingFileError: the image has no scores here.
        """
        path = self.path(image_id)
        if not path.is_file():
            raise MissingFileError(f"no label scores of image {image_id!r} in {self.folder}; refine its seeds first.")
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays if name.startswith("scores_")]
            scores = {name.removeprefix("scores_"): arrays[name].astype(np.float32) / 255 for name in names}
            return LabelScores(arrays["class_ids"], scores)
