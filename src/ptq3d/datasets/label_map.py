"""From the values in a label file to the classes of a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, LabelError, ShapeError, clipped

UNKNOWN = -1
CHUNK = 1 << 22  # indexing widens labels to 8 bytes; in pieces that stays small


@dataclass(frozen=True)
class LabelMap:
    """Names of the classes, and which values of a label file belong to which.

    Attributes:
        names: the class is the index; 0 is background.
        values: value in the file -> class.
        others: class of the values that `values` leaves out; None refuses them.

    Raises:
        LabelError: no names, or a class without a name.
    """

    names: tuple[str, ...]
    values: Mapping[int, int]
    others: int | None = None

    def __post_init__(self) -> None:
        classes = [*self.values.values(), *([] if self.others is None else [self.others])]
        if not self.names or any(not 0 <= index < len(self.names) for index in classes):
            raise LabelError(f"label map with classes {sorted(set(classes))} but names for {len(self.names)}.")

    @classmethod
    def identity(cls, names: Sequence[str]) -> LabelMap:
        """The map of a data set whose label files hold the classes themselves.

        Args:
            names: of all classes, background first.
        """
        return cls(tuple(names), {index: index for index in range(len(names))})

    @classmethod
    def load(cls, path: Path) -> LabelMap:
        """From a JSON file {"labels": {"0": name, "1": name, ...}}.

        A second table whose key ends in "_ids", {name: [values in the file]}, says which values belong to each class;
        all others are then background. Without it the values are the classes, and others are refused.

        Raises:
            FileError: missing, or no JSON.
            LabelError: no "labels", classes that are not 0, 1, 2, ..., or an "_ids" table that does not fit them.
        """
        table = _read(Path(path))
        names = _names(table.get("labels"), path)
        ids = [key for key in table if key.endswith("_ids")]
        if not ids:
            return cls.identity(names)
        if len(ids) > 1:
            raise LabelError(f"{path} has several tables of ids, {clipped(ids)}; keep the one of your data set.")
        return cls(names, _values(table[ids[0]], names, where=f"{path}, {ids[0]}"), others=0)

    def apply(self, labels: NDArray[Any], *, where: Path | None = None) -> NDArray[Any]:
        """The class of each voxel.

        Args:
            labels: any shape, unsigned integers as in the file.
            where: the file, named in errors.

        Returns:
            The same shape; uint8, or uint16 for more than 256 classes.

        Raises:
            LabelError: values that belong to no class.
            ShapeError: `labels` are not unsigned integers.
        """
        if labels.dtype.kind != "u":
            raise ShapeError(f"labels must be unsigned integers, got {labels.dtype}.")
        table = self._table(int(labels.max(initial=0)))
        dtype = np.uint8 if len(self.names) <= 256 else np.uint16
        source = np.ascontiguousarray(labels).reshape(-1)
        result = np.empty(source.shape, dtype)
        unknown: set[int] = set()
        for start in range(0, source.size, CHUNK):
            classes = table[source[start : start + CHUNK]]
            if self.others is None and (classes == UNKNOWN).any():
                unknown.update(np.unique(source[start : start + CHUNK][classes == UNKNOWN]).tolist())
            result[start : start + CHUNK] = classes
        if unknown:
            raise LabelError(self._refusal(unknown, where))
        return result.reshape(labels.shape)

    def _table(self, high: int) -> NDArray[np.int32]:
        """The class of each value up to `high`, `UNKNOWN` where it has none."""
        table = np.full(high + 1, UNKNOWN if self.others is None else self.others, np.int32)
        for value, index in self.values.items():
            if value <= high:
                table[value] = index
        return table

    def _refusal(self, unknown: set[int], where: Path | None) -> str:
        shown = ", ".join(str(value) for value in sorted(unknown)[:10]) + (", ..." if len(unknown) > 10 else "")
        return (
            f"{'the label map' if where is None else where} holds values that belong to none of the "
            f"{len(self.names)} classes: {shown}; say what they are with --label-map FILE.json, or mend the labels."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{path} is no readable JSON file of labels ({why}); check the path, or mend it.") from error
    if not isinstance(table, dict):
        raise LabelError(f"{path} must hold a table with 'labels', got {type(table).__name__}.")
    return table


def _names(labels: object, path: Path) -> tuple[str, ...]:
    if (
        not isinstance(labels, dict)
        or sorted(labels) != sorted(str(index) for index in range(len(labels)))
        or not labels
    ):
        raise LabelError(f'{path}: wanted "labels" as {{"0": name, "1": name, ...}} without gaps, got {labels!r:.200}.')
    return tuple(str(labels[str(index)]) for index in range(len(labels)))


def _values(ids: object, names: tuple[str, ...], *, where: str) -> dict[int, int]:
    """Value in the file -> class, from {name: [values]}."""
    if not isinstance(ids, dict) or set(ids) - set(names):
        raise LabelError(
            f"{where}: wanted {{name: [values]}} with names of the classes {clipped(list(names))}, got {ids!r:.200}."
        )
    values: dict[int, int] = {}
    for name, listed in ids.items():
        for value in listed if isinstance(listed, list) else [listed]:
            if not isinstance(value, int) or value < 0 or value in values:
                raise LabelError(
                    f"{where}: {value!r:.40} of '{name:.100}' is no whole number, or belongs to two classes."
                )
            values[value] = names.index(name)
    return values
