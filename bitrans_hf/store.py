"""Seeds on disk: one small `.npz` for each image, no pickle, complete or absent."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .file_names import ID_KEY, ascii_name, image_id_of
from .files import atomic_write
from .hub.errors import InputError, MissingFileError
from .hub.image_processing_bitrans import bounded_size
from .hub.maps import min_max_normalized
from .hub.seeds import Seeds, normalized_seeds


class ImageStore:
    """A folder with one `.npz` per image, named after it.

    Args:
        folder: Created when the first image is written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, image_id: str) -> Path:
        """Return the file of an image; ids with "/" or other special characters are percent-encoded."""
        return self.folder / ascii_name(image_id, ".npz")

    def __contains__(self, image_id: str) -> bool:
        return self.path(image_id).is_file()

    def ids(self) -> list[str]:
        """Return the ids of all stored images, sorted."""
        # Hidden files are those that are still being written.
        return sorted(self._id_of(path) for path in self.folder.glob("[!.]*.npz"))

    def _id_of(self, path: Path) -> str:
        image_id = image_id_of(path.stem)
        if image_id is None:  # the name was too long to hold the id
            with np.load(path, allow_pickle=False) as arrays:
                image_id = str(arrays[ID_KEY])
        return image_id

    def _write(self, image_id: str, arrays: Mapping[str, Any]) -> None:
        with atomic_write(self.path(image_id)) as temporary:
            # Without allow_pickle=False, which NumPy 1.26 would store as one more array; ours hold no objects.
            content: dict[str, Any] = {ID_KEY: np.array(image_id), **arrays}
            np.savez_compressed(temporary, **content)

    def _check_id(self, image_id: str, arrays: Mapping[str, Any]) -> None:
        """Refuse another image's file, which a case-insensitive disk may return."""
        stored = str(arrays[ID_KEY]) if ID_KEY in arrays else image_id  # older files hold no id
        if stored != image_id:
            raise InputError(
                f"{self.folder} holds {stored!r} where {image_id!r} belongs: the names differ in case alone, and this "
                "disk keeps one file for both; rename one of the images."
            )


class SeedStore(ImageStore):
    """A folder of seeds. Each variant's summed maps are kept on their own small grid in float16.

    Resizing and min-max normalization happen when reading: both are cheap, and maps at the image's size are about a
    hundred times larger. Each map is stored scaled to [0, 1], which does not change the result: min-max normalization
    is invariant to scale and offset, and bilinear resizing preserves both.
    """

    def write(
        self,
        image_id: str,
        class_ids: np.ndarray,
        maps: Mapping[str, torch.Tensor],
        size: tuple[int, int],
        others: torch.Tensor | None = None,
    ) -> None:
        """Write one image's seeds by atomic rename.

        Args:
            image_id: Name of the image.
            class_ids: (K,) ids of the present classes.
            maps: Variant name -> (K, h, w) summed maps, any range, of the present classes.
            size: (H, W) of the image in pixels.
            others: (V, K, h, w) the maps made in other ways, any range; see `hub.confidence`.
        """
        arrays: dict[str, np.ndarray] = {"class_ids": np.asarray(class_ids, dtype=np.int64)}
        arrays["size"] = np.array(size, dtype=np.int32)
        for variant, values in maps.items():
            if values.shape[0] != len(class_ids):
                raise InputError(f"{image_id}: {values.shape[0]} maps of {variant!r} for {len(class_ids)} classes.")
            if not torch.isfinite(values).all():
                raise InputError(f"{image_id}: the maps of {variant!r} hold NaN or infinity; the model is broken.")
            scaled = normalized_seeds(class_ids, values, (values.shape[1], values.shape[2])).maps
            arrays[f"maps_{variant}"] = scaled.astype(np.float16)
        if others is not None:
            arrays["others"] = min_max_normalized(others.float()).cpu().numpy().astype(np.float16)
        self._write(image_id, arrays)

    def size(self, image_id: str) -> tuple[int, int]:
        """Return the (H, W) of an image with stored seeds."""
        with np.load(self.path(image_id), allow_pickle=False) as arrays:
            height, width = (int(side) for side in arrays["size"])
            return height, width

    def others(self, image_id: str) -> torch.Tensor | None:
        """Return the maps (V, K, h, w) float32 that were made in other ways; None if there are none, as of a CNN."""
        with np.load(self.path(image_id), allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["others"].astype(np.float32)) if "others" in arrays else None

    def read(self, image_id: str, variant: str, *, max_side: int | None = None) -> Seeds:
        """Read one variant of an image's seeds; arguments and errors as for `read_variants`."""
        return self.read_variants(image_id, [variant], max_side=max_side)[variant]

    def read_variants(
        self, image_id: str, variants: Iterable[str], *, max_side: int | None = None
    ) -> dict[str, Seeds]:
        """Read several variants of an image's seeds at the image's size: variant -> seeds.

        Args:
            image_id: Name of the image.
            variants: Names of the maps.
            max_side: Return the maps at the image's `bounded_size` instead, which takes less memory for large images;
                `enlarged_strips` enlarges them to the image's size.

        Raises:
            MissingFileError: the image has no stored seeds.
            ValueError: a variant was not stored.
        """
        path = self.path(image_id)
        if not path.is_file():
            raise MissingFileError(f"no seeds of image {image_id!r} in {self.folder}; make its seeds first.")
        with np.load(path, allow_pickle=False) as arrays:
            self._check_id(image_id, arrays)
            class_ids, (height, width) = arrays["class_ids"], arrays["size"].tolist()
            size = (height, width) if max_side is None else bounded_size((height, width), max_side)
            seeds = {}
            for variant in variants:
                if f"maps_{variant}" not in arrays:
                    stored = ", ".join(name.removeprefix("maps_") for name in arrays if name.startswith("maps_"))
                    raise InputError(f"{path} holds the variants {stored}, not {variant!r}.")
                maps = torch.from_numpy(arrays[f"maps_{variant}"].astype(np.float32))
                seeds[variant] = normalized_seeds(class_ids, maps, size)
            return seeds
