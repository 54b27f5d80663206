"""A plain folder of volumes, its labels in another folder or beside the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.datasets.contents import Contents, contents, is_file, is_folder, stem
from ptq3d.datasets.dataset import Dataset, Ignored, arranged
from ptq3d.datasets.pairing import case_name, channels_of_cases, label_ending, partners, without_label_ending
from ptq3d.errors import FileError, LabelError
from ptq3d.volumes.files import FORMATS
from ptq3d.volumes.source import place_of

LAYOUT = "folder"
ONE_FILE = "file"


def find_cases(images: Path, labels: Path | None = None, *, required_labels: bool = False) -> list[Case]:
    """The cases of a folder, or of a single file, in the order of their names.

    An image belongs to the label file of the same name; failing that, of the same name without "_0000", without an
    ending such as "_seg"; failing that, with the same numbers in its name (BTCV's img0001 and label0001). One image
    belongs to one label FILE in any case.

    Args:
        images: a volume file, or a folder of them (its subfolders are not searched); see `find`.
        labels: likewise; None for labels beside the images, or none.
        required_labels: refuse to go on without labels.

    Returns:
        At least one case.

    Raises:
        FileError: a file or folder is missing, a folder holds no volume, or two images have the same name.
        LabelError: labels are required but not given, an image has none, or several files claim to be them.
    """
    found = list(paired(Path(images), None if labels is None else Path(labels)).cases)
    if required_labels and any(case.labels is None for case in found):
        raise LabelError(f"the images in {images} need labels; name their file or folder with --label-path.")
    return found


def find(root: Path) -> Dataset:
    """A folder of volumes as a data set; the last resort, so it is never None.

    "a_0000" and "a_0001" are channels of case "a" (see `channels_of_cases`). A volume whose name is that of another
    one and an ending such as "_seg" is that one's label map and no image. Where the endings differ, each is a set of
    segmentations to choose from.

    Args:
        root: a folder, or a single volume file.

    Raises:
        FileError: there is nothing, no volume in the folder, or two images have the same name.
        LabelError: two files of the same name beside an image.
    """
    if is_file(root):
        return Dataset(ONE_FILE, root, (Case(case_name(root), (root,)),))
    found = _contents(root, "images")
    images, beside = _apart(found.volumes)
    cases = _cases(images)
    sets: dict[str, dict[str, Path]] = {}
    for label in beside:
        ending = str(label_ending(stem(label)))
        twin = sets.setdefault(ending.lstrip("_"), {}).setdefault(without_label_ending(stem(label)), label)
        if twin != label:
            raise LabelError(f"{label} and {twin.name} are labels of the same image; keep one of them.")
    bare = Dataset(LAYOUT, root, arranged(cases), ignored=found.unused(found.volumes))
    return with_choices(bare, sets)


def with_choices(bare: Dataset, sets: dict[str, dict[str, Path]]) -> Dataset:
    """A data set with named sets of segmentations: labelled by the only one, or by none of several.

    Args:
        bare: without labels.
        sets: name of the set -> name of the case -> label file.
    """
    choices = {name: _labelled(bare, name, sets) for name in sorted(sets)}
    if len(choices) == 1:
        (only,) = choices.values()
        return replace(only, choices=choices)
    reason = f"one of several segmentations ({', '.join(choices)}); name the one you want as the labels"
    ignored = [Ignored(path, reason) for found in sets.values() for path in found.values()]
    return replace(bare, ignored=(*bare.ignored, *ignored), choices=choices)


def _labelled(bare: Dataset, wanted: str, sets: dict[str, dict[str, Path]]) -> Dataset:
    cases = tuple(replace(case, labels=sets[wanted].get(case.name)) for case in bare.cases)
    used = {label for case in cases for label in case.label_files}
    left = [
        Ignored(path, "no image has its name" if name == wanted else f"of the segmentations '{name}'")
        for name, found in sets.items()
        for path in found.values()
        if path not in used
    ]
    return replace(bare, cases=cases, ignored=(*bare.ignored, *left))


def paired(images: Path, labels: Path | None, *, split: str = "") -> Dataset:
    """Images and their labels in another folder, as `find_cases`; without labels as `find`.

    Args:
        images: a volume file, or a folder of them.
        labels: likewise, or None.
        split: of all cases.

    Raises:
        FileError, LabelError: see `find_cases`.
    """
    if labels is None:
        found = find(images)
        return replace(found, cases=tuple(replace(case, split=split) for case in found.cases))
    place = Contents((images,)) if is_file(images) else _contents(images, "images")
    chosen, beside = _apart(place.volumes)
    label_place = Contents((labels,)) if is_file(labels) else _contents(labels, "labels")
    cases = labelled(_cases(chosen, label_place.volumes), label_place.volumes, labels)
    used = {label for case in cases for label in case.label_files}
    ignored = (
        *place.unused(place.volumes),
        *(Ignored(path, "labels by its name, beside its image") for path in beside),
        *label_place.unused(label_place.volumes),
        *(Ignored(path, "no image has its name") for path in label_place.volumes if path not in used),
    )
    return Dataset(LAYOUT, images, arranged(replace(case, split=split) for case in cases), ignored=ignored)


def labelled(cases: Sequence[Case], labels: Sequence[Path], place: Path) -> list[Case]:
    """Cases with the label files that their names choose.

    Args:
        cases: without labels.
        labels: label files.
        place: where they lie, for messages.

    Raises:
        LabelError: see `find_cases`.
    """
    found = partners([place_of(case.images[0]) for case in cases], labels, place)
    return [replace(case, labels=label) for case, label in zip(cases, found, strict=True)]


def named(cases: Sequence[Case], labels: Sequence[Path]) -> list[Case]:
    """Cases with the label file of their name, or of the place that holds no other case; others without labels.

    Args:
        cases: of a data set or of DICOM, whose images' file names say nothing.
        labels: label files.

    Raises:
        LabelError: two label files of one name.
    """
    by_name: dict[str, Path] = {}
    for label in labels:
        for name in {stem(label), without_label_ending(stem(label))}:
            twin = by_name.setdefault(name, label)
            if twin != label and stem(twin) == stem(label):
                raise LabelError(f"{label} and {twin.name} are labels of one name; keep one of them.")
    places = Counter(place_of(case.images[0]).name for case in cases)
    found = []
    for case in cases:
        place = place_of(case.images[0]).name
        alone = [place, without_zip(place)] if places[place] == 1 else []
        chosen = next((by_name[name] for name in (case.name, *alone) if name in by_name), None)
        found.append(replace(case, labels=chosen))
    if len(cases) == 1 and len(labels) == 1:
        return [replace(cases[0], labels=labels[0])]
    return found


def without_zip(name: str) -> str:
    """The name of an archive without its ending."""
    return name[:-4] if name.lower().endswith(".zip") else name


def _contents(place: Path, what: str) -> Contents:
    """The contents of a folder that holds volumes."""
    if not is_folder(place):
        raise FileError(f"{place}: no such file or folder of {what}; check the path.")
    found = contents(place)
    if not found.volumes:
        inner = f"; name one of its folders, such as {found.folders[0].name}" if found.folders else ""
        raise FileError(f"{place}: no {what} in this folder (wanted files ending in {', '.join(FORMATS)}){inner}.")
    return found


def _apart(volumes: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Images, and the label maps beside them."""
    names = {name for path in volumes for name in (stem(path), case_name(path))}
    beside = [path for path in volumes if without_label_ending(stem(path)) in names - {stem(path)}]
    return [path for path in volumes if path not in set(beside)], beside


def _cases(images: Sequence[Path], labels: Sequence[Path] = ()) -> list[Case]:
    """Images as cases; numbers are channels, unless label files have the same numbers."""
    names = {stem(label) for label in labels}
    grouped = channels_of_cases(images)
    if any(len(channels) > 1 and names.issuperset(map(stem, channels)) for channels in grouped):
        grouped = [(image,) for image in images]
    return [Case(case_name(channels[0]), channels) for channels in grouped]
