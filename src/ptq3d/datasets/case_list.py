"""A list of one's own: a CSV table or a JSON file that names images, labels, cases and splits."""

from __future__ import annotations

from pathlib import Path

from ptq3d.datasets.contents import is_file
from ptq3d.datasets.dataset import Dataset, arranged
from ptq3d.datasets.dataset_json import LISTS, Listing, case_of, channel_names, label_map, listed, read_json
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.rows import read_rows
from ptq3d.errors import FileError, clipped

LAYOUT = "list of cases"
SUFFIXES = (".csv", ".tsv", ".json")


def find(root: Path) -> Dataset | None:
    """The cases of a list; paths are relative to its folder, or absolute.

    CSV (set apart by comma, semicolon or tab) has a header with "image", or "image_0", "image_1", ... for channels,
    and may have "label", "name", "split" (in upper or lower case) and others that are not read. JSON is a list of
    objects with these keys, or {"training": [...], "validation": [...], "test": [...]} as MONAI writes it, which may
    name its classes in "labels".

    Args:
        root: the list.

    Returns:
        None where it is no file that ends in `SUFFIXES`.

    Raises:
        FileError: no such table, a file that is not there, or names that are not unique.
        LabelError: classes with values that no label file can hold.
    """
    if root.suffix.lower() not in SUFFIXES or not is_file(root):
        return None
    if root.suffix.lower() != ".json":
        rows = read_rows(root)
        if not rows or not {"image", "image_0"} & set(rows[0]):
            wanted = "a header with a column 'image' (or image_0, image_1, ...) and a row for each case"
            raise FileError(f"{root}: wanted {wanted}, got {clipped(list(rows[0])) if rows else 'no row'}; add it.")
        return Dataset(LAYOUT, root, arranged(case_of(row, Listing(root, own=True)) for row in rows))
    return _of_json(root)


def _of_json(root: Path) -> Dataset:
    table = read_json(root)
    classes: LabelMap | None = None
    channels: tuple[str, ...] = ()
    if isinstance(table, list):
        cases = [case_of(item, Listing(root, own=True)) for item in table]
    elif isinstance(table, dict) and any(name in table for name in LISTS):
        cases = list(listed(table, Listing(root, own=True)))
        classes = label_map(table.get("labels"), where=root)
        channels = channel_names(table.get("modality"))
    else:
        wanted = 'a list of {"image": path, "label": path}, or {"training": [...]}'
        raise FileError(f"{root}: wanted {wanted}, got {table!r:.200}; mend the list.")
    return Dataset(LAYOUT, root, arranged(cases), label_map=classes, channels=channels)
