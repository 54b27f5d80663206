"""nnU-Net's raw data sets: `imagesTr/case_0000.nii.gz`, one file a channel, and `dataset.json`.

Source: nnU-Net's documentation, "nnU-Net dataset format" (version 2), and the `dataset.json` of version 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.datasets.contents import Contents, contents, is_folder, stem
from ptq3d.datasets.dataset import Dataset, Ignored, arranged
from ptq3d.datasets.dataset_json import Listing, Table, case_of, channel_names, label_map, read_table
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import FileError, LabelError, clipped
from ptq3d.volumes.files import FORMATS, volume_suffix

LAYOUT = "nnU-Net raw"
FOLDERS = (("imagesTr", "labelsTr", "train"), ("imagesTs", "labelsTs", "test"))
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class _Naming:
    """What the files of a data set are called."""

    path: Path
    channels: tuple[str, ...]
    ending: str


def find(root: Path) -> Dataset | None:
    """A data set such as Dataset005_Prostate; classes that are regions of several values stay without names.

    Args:
        root: the folder that holds `dataset.json`.

    Returns:
        None without a `dataset.json` of nnU-Net: one with "channel_names" or, in version 1, one with "modality" whose
        images carry a channel's number and its labels none.

    Raises:
        FileError: a `dataset.json` of another shape, a case without one of its channels, or with one too many.
        LabelError: a training case without labels.
    """
    table = read_table(root) if is_folder(root) else None
    if table is None or not ("channel_names" in table or _is_version_1(table, root)):
        return None
    naming = _naming(table, root / "dataset.json")
    ignored: list[Ignored] = []
    if "dataset" in table:
        cases = list(_listed(table["dataset"], naming))
    else:
        cases = [case for folders in FOLDERS for case in _in_folders(root, folders, naming, ignored)]
    classes, reasons = _classes(table, naming)
    known = [naming.path, *(root / name for images, labels, _ in FOLDERS for name in (images, labels))]
    return Dataset(
        LAYOUT,
        root,
        arranged(cases),
        label_map=classes,
        channels=naming.channels,
        ignored=(*contents(root).unused(known), *ignored, *reasons),
    )


def _is_version_1(table: Table, root: Path) -> bool:
    """The Decathlon's own file, over images that nnU-Net renamed."""
    if "modality" not in table or not is_folder(root / "imagesTr") or not is_folder(root / "labelsTr"):
        return False
    images = [stem(path) for path in contents(root / "imagesTr").volumes]
    labels = {stem(path) for path in contents(root / "labelsTr").volumes}
    found = [_CHANNEL.fullmatch(name) for name in images]
    return bool(images) and all(match and match[1] in labels for match in found)


def _naming(table: Table, path: Path) -> _Naming:
    channels = channel_names(table.get("channel_names", table.get("modality")))
    ending = table.get("file_ending", ".nii.gz")
    if not channels:
        wanted = '"channel_names" as {"0": name, "1": name, ...} without gaps'
        raise FileError(f"{path}: wanted {wanted}, got {table.get('channel_names')!r:.200}; mend the file.")
    if not isinstance(ending, str) or volume_suffix(f"a{ending}") != ending:
        raise FileError(
            f'{path}: wanted a "file_ending" of volumes, one of {", ".join(FORMATS)}, got {ending!r:.100}; '
            "convert the images first."
        )
    return _Naming(path, channels, ending)


def _in_folders(root: Path, folders: tuple[str, str, str], naming: _Naming, ignored: list[Ignored]) -> Iterator[Case]:
    """The cases of one split; what is no part of it is added to `ignored`."""
    place, label_place, split = root / folders[0], root / folders[1], folders[2]
    images = contents(place) if is_folder(place) else Contents()
    labels = contents(label_place) if is_folder(label_place) else Contents()
    channels, odd = _channels(images.volumes, naming)
    if odd and not channels:
        raise FileError(
            f"{odd[0].path}: it is {odd[0].reason}, nor is any other image in its folder; rename the images, or mend "
            f'the "file_ending" of {naming.path}.'
        )
    by_name = {path.name: path for path in labels.volumes}
    for name, found in channels.items():
        label = by_name.pop(f"{name}{naming.ending}", None)
        if label is None and (labels.volumes or split == "train"):
            raise LabelError(f"{found[0]}: its labels {label_place / (name + naming.ending)} are missing; add them.")
        yield Case(name, found, label, split)
    ignored += [*odd, *images.unused(images.volumes), *labels.unused(labels.volumes)]
    ignored += [Ignored(path, "no image has its name") for path in by_name.values()]


def _channels(volumes: Sequence[Path], naming: _Naming) -> tuple[dict[str, tuple[Path, ...]], list[Ignored]]:
    """Case -> its channels in order, and volumes that are none."""
    cases: dict[str, dict[int, Path]] = {}
    odd: list[Ignored] = []
    for path in volumes:
        match = _CHANNEL.fullmatch(path.name.removesuffix(naming.ending)) if path.name.endswith(naming.ending) else None
        if match is None:
            odd.append(Ignored(path, f"not named case_0000{naming.ending}"))
        else:
            cases.setdefault(match[1], {})[int(match[2])] = path
    return {name: _complete(name, found, naming) for name, found in cases.items()}, odd


def _complete(name: str, found: dict[int, Path], naming: _Naming) -> tuple[Path, ...]:
    wanted = range(len(naming.channels))
    folder = next(iter(found.values())).parent
    for index in wanted:
        if index not in found:
            missing = folder / f"{name}_{index:04d}{naming.ending}"
            raise FileError(
                f"{missing}: channel {index} ({clipped(naming.channels[index], 40)}) of this case is missing; add it."
            )
    more = [found[index].name for index in sorted(found) if index not in wanted]
    if more:
        raise FileError(
            f"{folder / more[0]}: {naming.path} names only the channels {clipped(list(naming.channels))}; name it."
        )
    return tuple(found[index] for index in wanted)


def _listed(table: object, naming: _Naming) -> Iterator[Case]:
    """The cases of a "dataset" table {name: {"images": [...], "label": path}}; all are for training."""
    if not isinstance(table, dict):
        raise FileError(f'{naming.path}: wanted "dataset" as {{name: {{"images": [...]}}}}, got {table!r:.200}.')
    for name, entry in table.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or len(images) != len(naming.channels):
            raise FileError(
                f"{naming.path}: case {name!r:.100} needs one image for each of {clipped(list(naming.channels))}."
            )
        item = {"image": images, "label": entry.get("label"), "name": name}
        yield case_of(item, Listing(naming.path), split="train")


def _classes(table: Table, naming: _Naming) -> tuple[LabelMap | None, list[Ignored]]:
    """The label map, or why there is none."""
    labels = table.get("labels")
    if isinstance(labels, dict) and any(isinstance(value, list) for value in labels.values()):
        regions = [name for name, value in labels.items() if isinstance(value, list)]
        reason = f"its classes {clipped(regions)} are regions of several label values, which no label map can hold"
        return None, [Ignored(naming.path, reason)]
    classes = label_map(labels, where=naming.path)
    if classes is None:
        return None, [Ignored(naming.path, "names no classes; its label values stay without names")]
    if isinstance(labels, dict) and "ignore" in labels:
        reason = (
            f"its label 'ignore' ({clipped(labels['ignore'], 40)}) is no class; label files that hold it are refused"
        )
        return classes, [Ignored(naming.path, reason)]
    return classes, []
