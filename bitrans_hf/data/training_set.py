"""What all training data sets share: the epoch, and the replacement of unreadable images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from datasets import Dataset

from .common import DataError, UnreadableImageError

logger = logging.getLogger(__name__)

Opened = TypeVar("Opened")


Item: TypeAlias = dict[str, torch.Tensor | int | str]
"""Arguments of a network's forward pass by name, with `index` and `unreadable` of `TrainingSet`."""


class Origin(NamedTuple):
    """Where an item comes from: the position of its image, and the requested `image_id` if that cannot be read."""

    position: int
    unreadable: str


class TrainingSet(torch.utils.data.Dataset[Item], Generic[Opened]):
    """Base of data sets whose items get a new augmentation in every epoch.

    Item `index` of an epoch must be a function of (seed, epoch, index) alone: then the numbers of workers and
    processes and a resumed run change nothing. An unreadable image is replaced by the next readable one: `index` is
    then the replacement's, and `unreadable` the `image_id` that was requested, otherwise "". It is part of the item so
    that the training loop hears of it from any worker process.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str], *, seed: int, strict: bool) -> None:
        """Wrap a data set of this package.

        Args:
            dataset: Rows of `image_id` and `columns`; other columns are not read.
            columns: What `_open` needs of a row.
            seed: Of all random draws, 0 or greater.
            strict: Raise `UnreadableImageError` instead of replacing an image.

        Raises:
            DataError: the dataset is empty, or the seed is negative.
        """
        if len(dataset) == 0:
            raise DataError("the data set is empty, expected one image or more to train on.")
        if seed < 0:
            raise DataError(f"seed must be 0 or greater, got {seed}.")
        self.image_ids: list[str] = list(dataset["image_id"])
        self._rows = dataset.select_columns(list(columns))
        self._seed = seed
        self._strict = strict
        self._reported: set[int] = set()
        # In shared memory, so that worker processes that outlive an epoch see the next one.
        self._epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the augmentation of later items; call it before iterating over a loader."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.image_ids)

    def _open(self, row: Mapping[str, Any]) -> Opened:
        """Open what a row names; raise `UnreadableImageError` where that cannot be read."""
        raise NotImplementedError

    def _readable(self, asked: int) -> tuple[Opened, Origin]:
        """Return the first readable row from `asked` on, opened, and its origin."""
        for step in range(len(self)):
            index = (asked + step) % len(self)
            try:
                opened = self._open(self._rows[index])
            except UnreadableImageError as error:
                if self._strict:
                    raise
                if index not in self._reported:  # once in each process, not in every epoch
                    self._reported.add(index)
                    logger.warning("image %s is left out: %s", self.image_ids[index], error)
            else:
                return opened, Origin(index, "" if index == asked else self.image_ids[asked])
        raise UnreadableImageError(f"none of the {len(self)} images can be read; check the folder they are in.")
