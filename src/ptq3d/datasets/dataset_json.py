"""`dataset.json` and its kin: names of classes and channels, and lists of images and labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ptq3d.datasets.cases import Case
from ptq3d.datasets.contents import is_file, is_folder
from ptq3d.datasets.dataset import split_named
from ptq3d.datasets.dicom_series import source_of
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.pairing import case_name
from ptq3d.errors import FileError, LabelError, clipped, line_of
from ptq3d.volumes.source import Source

Table: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Listing:
    """A file that lists cases, and where its paths may lead.

    Attributes:
        path: of the file; its paths are relative to its folder.
        own: a list of the user's own, whose paths may lead anywhere, and to folders of DICOM; otherwise a data set's,
            whose paths are files in its folder.
    """

    path: Path
    own: bool = False

    def locate(self, text: str) -> Path:
        """The file that a path means.

        Raises:
            FileError: see `inside`.
        """
        root = self.path.parent
        return root / text if self.own else inside(root, text, where=self.path)


LISTS = ("training", "train", "validation", "val", "test", "testing")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is no readable JSON file ({type(error).__name__}: {line_of(error)}); mend it."
        ) from error


def read_table(root: Path, name: str = "dataset.json") -> Table | None:
    """The object in a JSON file of a folder; None without the file.

    Raises:
        FileError: it cannot be read, is no JSON, or no object.
    """
    path = root / name
    if not is_file(path):
        return None
    table = read_json(path)
    if not isinstance(table, dict):
        raise FileError(f'{path}: wanted an object such as {{"labels": ...}}, got a {type(table).__name__}; mend it.')
    return table


def inside(root: Path, text: object, *, where: Path) -> Path:
    """The path that a data set's own file names; it cannot leave the data set.

    Args:
        root: folder of the data set.
        text: relative path as written.
        where: the file it stands in, for the message.

    Raises:
        FileError: no text, an absolute path, or one that leads out of the folder.
    """
    if not isinstance(text, str) or not text.strip():
        raise FileError(f"{where}: wanted the path of a file, got {text!r:.200}; mend the list.")
    relative = Path(os.path.normpath(text))
    if relative.is_absolute() or os.pardir in relative.parts:
        raise FileError(
            f"{where}: the path {text!r:.200} leads out of the data set's folder; files must lie in {root} (links are "
            "fine), or be named in a list of your own."
        )
    return root / relative


def listed(table: Table, listing: Listing) -> Iterator[Case]:
    """The cases in lists named "training", "validation" and "test", as the Decathlon and MONAI write them.

    Args:
        table: list name -> items, see `case_of`.
        listing: the file that the table is from.

    Raises:
        FileError: a list of another shape, or a file that is not there.
    """
    for name in LISTS:
        items = table.get(name, [])
        if not isinstance(items, list):
            raise FileError(f'{listing.path}: wanted "{name}" as a list of images, got {items!r:.200}; mend the list.')
        for item in items:
            yield case_of(item, listing, split=split_named(name, where=listing.path))


def case_of(item: object, listing: Listing, *, split: str = "") -> Case:
    """One item of a list as a case.

    Args:
        item: the path of an image, or {"image": path or paths, "label": path, "name": text, "split": text}; or
            "image_0", "image_1", ... for channels.
        listing: the file that it is from.
        split: where the item does not name its own.

    Raises:
        FileError: another shape, or a file that is not there.
        UnavailableError: an image is DICOM, and there is nothing to read it with.
    """
    where = listing.path
    entry = {"image": item} if isinstance(item, str) else item
    if not isinstance(entry, dict):
        raise FileError(f'{where}: wanted an image, or {{"image": path, "label": path}}, got {item!r:.200}.')
    entry = {str(key).strip().lower(): value for key, value in entry.items() if not _is_empty(value)}
    if "labels" in entry and "label" not in entry:
        raise FileError(f"{where}: wanted a case's label map as 'label', got 'labels'; rename it.")
    images = [_present(path, listing, folders=listing.own) for path in _channels(entry, where)]
    labels = _present(entry["label"], listing) if "label" in entry else None
    name = entry.get("name", case_name(images[0]))
    if not isinstance(name, str | int):
        raise FileError(f"{where}: wanted a name as text, got {name!r:.200}; mend the item.")
    split = split_named(str(entry.get("split", split)), where=where)
    return Case(str(name), _sources(images, where) if listing.own else tuple(images), labels, split)


def _sources(images: Sequence[Path], where: Path) -> tuple[Source, ...]:
    """Files as they are, folders and zips as their only DICOM series."""
    try:
        return tuple(map(source_of, images))
    except FileError as error:
        raise FileError(f"{where}: {error}") from error


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _channels(entry: Mapping[str, Any], where: Path) -> list[object]:
    """The paths of an item's images, in order."""
    if "image" in entry:
        image = entry["image"]
        paths = image if isinstance(image, list) else [image]
    else:
        numbers = sorted(key for key in entry if key.startswith("image_"))
        count = len(numbers)
        if set(numbers) != {f"image_{index}" for index in range(count)}:
            raise FileError(f"{where}: wanted the images image_0, image_1, ... without gaps, got {clipped(numbers)}.")
        paths = [entry[f"image_{index}"] for index in range(count)]
    if not paths:
        raise FileError(f"{where}: an item has no image: {dict(entry)!r:.200}; add one, or remove the item.")
    return list(paths)


def _present(text: object, listing: Listing, *, folders: bool = False) -> Path:
    if not isinstance(text, str):
        raise FileError(f"{listing.path}: wanted the path of a file, got {text!r:.200}; mend the list.")
    path = listing.locate(text)
    if not is_file(path) and not (folders and is_folder(path)):
        raise FileError(
            f"{listing.path} lists {text!r:.300}, but there is no such file; add it, or remove it from the list."
        )
    return path


def label_map(labels: object, *, where: Path) -> LabelMap | None:
    """Classes from {"0": name, ...} (Decathlon) or {name: value} (nnU-Net); None where it is neither.

    Classes are in the order of their values, background first; what nnU-Net calls "ignore" is no class, so that a
    file that holds it is refused.

    Args:
        labels: the JSON value.
        where: the file, for messages.

    Raises:
        LabelError: two names for one value, or a value below 0 or above 65535.
    """
    if not isinstance(labels, dict) or not labels:
        return None
    pairs = [_named_value(key, value) for key, value in labels.items()]
    if any(pair is None for pair in pairs):
        return None
    names = {0: "background"} if all(pair and pair[0] != 0 for pair in pairs) else {}
    for pair in pairs:
        if pair is None or pair[1] == "ignore":
            continue
        if pair[0] in names or not 0 <= pair[0] <= 65535:
            raise LabelError(
                f"{where}: the label {pair[1]!r:.100} has the value {clipped(pair[0], 40)}, out of 0..65535 or given twice."
            )
        names[pair[0]] = pair[1]
    values = sorted(names)
    return LabelMap(tuple(names[value] for value in values), {value: index for index, value in enumerate(values)})


def _named_value(key: str, value: object) -> tuple[int, str] | None:
    """(value in the file, name), whichever of both is the key."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, key
    if isinstance(value, str) and key.strip().isdecimal():
        return int(key), value
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value), key
    return None


def channel_names(channels: object) -> tuple[str, ...]:
    """Names from {"0": name, ...}, in order; empty where there are none."""
    if not isinstance(channels, dict):
        return ()
    count = len(channels)
    return tuple(str(channels[str(index)]) for index in range(count)) if _numbered(channels, count) else ()


def _numbered(table: Mapping[str, object], count: int) -> bool:
    return set(table) == {str(index) for index in range(count)}
