"""BIDS: `sub-01/[ses-01/]anat/sub-01_T1w.nii.gz`, segmentations under `derivatives`, or all of it in one flat folder.

Source: Brain Imaging Data Structure 1.10, "Entities" and "Imaging data types" of derivatives (`dseg`, `mask`, and the
table `dseg.tsv`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.datasets.contents import contents, is_file, is_folder, stem
from ptq3d.datasets.dataset import Dataset, Ignored, arranged
from ptq3d.datasets.folders import with_choices
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.rows import read_rows
from ptq3d.errors import FileError, LabelError, clipped, line_of

LAYOUT = "BIDS"
LABELS = ("dseg", "mask", "msk", "seg")
"""Suffixes of label files; "msk" and "seg" are common, though no BIDS."""

NEITHER = ("probseg", "defacemask")  # probabilities, and what was cut off a face
DATATYPES = ("anat", "ct")
NATIVE = ("orig", "individual")  # what "space" may say of a file on its image's own grid


@dataclass(frozen=True)
class _Named:
    """A file by the parts of its name: sub-01_desc-a_dseg is (sub-01, desc-a) and dseg."""

    path: Path
    entities: tuple[str, ...]
    suffix: str
    pipeline: str = ""

    @property
    def name(self) -> str:
        return "_".join((*self.entities, self.suffix))


@dataclass(frozen=True)
class _Found:
    """What a data set holds, before labels have found their images."""

    images: tuple[_Named, ...]
    labels: tuple[_Named, ...]
    tables: tuple[Path, ...]
    ignored: tuple[Ignored, ...]


def find(root: Path) -> Dataset | None:
    """Every image is a case; every kind of segmentation is a set to choose from.

    A label file belongs to the image all of whose entities it has. What it has beyond them names its set: "seg-vert"
    of sub-ct_seg-vert_label-22_msk.nii.gz, "desc-aseg", or, where there is nothing beyond them, its suffix "dseg";
    two sets of one such name are told apart by the names of their folder and suffix.

    Args:
        root: the data set; or a flat folder all of whose volumes have BIDS names.

    Returns:
        None for another layout.

    Raises:
        FileError: a folder cannot be listed, or a `dseg.tsv` cannot be read.
        LabelError: two files of one set belong to one image.
    """
    found = _found(root) if is_folder(root) else None
    if found is None or not found.images:
        return None
    cases = arranged(Case(image.name, (image.path,)) for image in found.images)
    owned, lost = _owned(found)
    names = _set_names(owned)
    sets: dict[str, dict[str, Path]] = {}
    for (label, image), name in zip(owned, names, strict=True):
        twin = sets.setdefault(name, {}).setdefault(image.name, label.path)
        if twin != label.path:
            raise LabelError(f"{label.path} and {twin} are both the segmentation '{name}' of one image; keep one.")
    dataset = with_choices(Dataset(LAYOUT, root, cases, ignored=(*found.ignored, *lost)), sets)
    first = {name: label for (label, _), name in zip(reversed(owned), reversed(names), strict=True)}
    choices = {name: replace(one, label_map=_classes(first[name], found)) for name, one in dataset.choices.items()}
    return replace(next(iter(choices.values())) if len(choices) == 1 else dataset, choices=choices)


def _found(root: Path) -> _Found | None:
    place = contents(root)
    raw = root / "rawdata" if is_folder(root / "rawdata") else root
    subjects = _subjects(raw)
    if not subjects:
        return _flat(root)
    files = list(_files(subjects))
    named = [item for path in files if (item := _named(path)) is not None]
    derived, tables = _derived(root / "derivatives")
    known = [*subjects, raw, root / "derivatives", *place.others]  # its own tables and readme are no strangers
    return _Found(
        tuple(item for item in named if item.suffix not in (*LABELS, *NEITHER)),
        tuple(item for item in (*named, *derived) if item.suffix in LABELS),
        tables,
        (*place.unused(known), *_strangers(files, named, derived)),
    )


def _flat(root: Path) -> _Found | None:
    place = contents(root)
    named = [item for path in place.volumes if (item := _named(path)) is not None]
    if len(named) < len(place.volumes):
        return None
    return _Found(
        tuple(item for item in named if item.suffix not in (*LABELS, *NEITHER)),
        tuple(item for item in named if item.suffix in LABELS),
        tuple(path for path in place.others if path.suffix == ".tsv"),
        (*place.unused(place.volumes), *_strangers([], named, [])),
    )


def _strangers(files: Sequence[Path], named: Sequence[_Named], derived: Sequence[_Named]) -> list[Ignored]:
    paths = {item.path for item in named}
    left = [Ignored(path, "not named by the rules of BIDS") for path in files if path not in paths]
    left += [
        Ignored(item.path, f"'{item.suffix}' holds no labels") for item in (*named, *derived) if item.suffix in NEITHER
    ]
    return left + [
        Ignored(item.path, "an image among the derivatives")
        for item in derived
        if item.suffix not in (*LABELS, *NEITHER)
    ]


def _named(path: Path, pipeline: str = "") -> _Named | None:
    """A file name as BIDS means it, None for other names."""
    *entities, suffix = stem(path).split("_")
    well = all("-" in part and not part.endswith("-") for part in entities)
    if not entities or not well or not entities[0].startswith("sub-") or not suffix or "-" in suffix:
        return None
    return _Named(path, tuple(entities), suffix, pipeline)


def _subjects(place: Path) -> list[Path]:
    return [folder for folder in contents(place).folders if folder.name.startswith("sub-")] if is_folder(place) else []


def _files(subjects: Iterable[Path]) -> Iterable[Path]:
    """The volumes of subjects, in their sessions and data types."""
    for subject in subjects:
        sessions = [folder for folder in contents(subject).folders if folder.name.startswith("ses-")]
        for session in (subject, *sessions):
            found = contents(session)
            yield from found.volumes
            for datatype in found.folders:
                if datatype.name in DATATYPES:
                    yield from contents(datatype).volumes


def _derived(place: Path) -> tuple[list[_Named], tuple[Path, ...]]:
    """Volumes of all pipelines, and their tables."""
    if not is_folder(place):
        return [], ()
    pipelines = [place, *(folder for folder in contents(place).folders if not folder.name.startswith("sub-"))]
    named: list[_Named] = []
    tables: list[Path] = []
    for pipeline in pipelines:
        named += [item for path in _files(_subjects(pipeline)) if (item := _named(path, pipeline.name)) is not None]
        tables += [path for path in contents(pipeline).others if path.suffix == ".tsv"]
    return named, tuple(tables)


def _owned(found: _Found) -> tuple[list[tuple[_Named, _Named]], list[Ignored]]:
    """(label, its image), and labels without one."""
    by_subject: dict[str, list[_Named]] = {}
    for image in found.images:
        by_subject.setdefault(image.entities[0], []).append(image)
    owned: list[tuple[_Named, _Named]] = []
    lost: list[Ignored] = []
    for label in found.labels:
        owner = _owner(label, by_subject.get(label.entities[0], []))
        if isinstance(owner, str):
            lost.append(Ignored(label.path, owner))
        else:
            owned.append((label, owner))
    return owned, lost


def _owner(label: _Named, images: Sequence[_Named]) -> _Named | str:
    """The image of a label file, or why there is none."""
    fitting = [image for image in images if set(image.entities) <= set(label.entities)]
    if not fitting:
        return "no image has its entities"
    most = max(len(image.entities) for image in fitting)
    closest = [image for image in fitting if len(image.entities) == most]
    space = _space(label, closest[0])
    if space and space.lower() not in NATIVE:
        closest = [image for image in closest if image.suffix.lower() == space.lower()]
        if not closest:
            return f"lies in the space '{space}', where no image lies"
    if len(closest) > 1:
        return f"may belong to any of {clipped([image.name for image in closest])}; its name needs 'space-' and one's suffix"
    return closest[0]


def _space(label: _Named, image: _Named) -> str:
    return next((part.split("-", 1)[1] for part in _beyond(label, image) if part.startswith("space-")), "")


def _beyond(label: _Named, image: _Named) -> list[str]:
    return [part for part in label.entities if part not in image.entities]


def _set_names(owned: Sequence[tuple[_Named, _Named]]) -> list[str]:
    """The name of the set that each label file belongs to; as short as still tells them apart."""
    short = [
        "_".join(part for part in _beyond(label, image) if not part.startswith("space-")) or label.suffix
        for label, image in owned
    ]
    full = [
        "_".join(filter(None, (label.pipeline, name, label.suffix)))
        for (label, _), name in zip(owned, short, strict=True)
    ]
    counts = Counter(name for name, _ in set(zip(short, full, strict=True)))
    return [name if counts[name] == 1 else long for name, long in zip(short, full, strict=True)]


def _classes(label: _Named, found: _Found) -> LabelMap | None:
    """What the values of a set mean, of its table; a mask has one class; otherwise None."""
    beside = label.path.with_name(f"{stem(label.path)}.tsv")
    tables = [path for path in found.tables if _describes(path, label)]
    table = beside if is_file(beside) else max(tables, key=lambda path: len(path.name), default=None)
    if table is not None:
        return _label_map(table)
    if label.suffix == "mask":
        names = [part.split("-", 1)[1] for part in label.entities if part.startswith(("label-", "desc-"))]
        return LabelMap.identity(("background", *(names[-1:] or ["mask"])))
    return None


def _describes(table: Path, label: _Named) -> bool:
    """Whether a table in the folder above is inherited: "desc-aseg_dseg.tsv" by every file with these parts."""
    return set(table.stem.split("_")) <= {*label.entities, label.suffix} and table.stem.endswith(label.suffix)


def _label_map(table: Path) -> LabelMap:
    """Classes of a table with the columns "index" and "name"; background where it names none."""
    rows = read_rows(table, columns=("index", "name"), delimiter="\t")
    try:
        names = {0: "background", **{int(row["index"]): row["name"] for row in rows}}
    except (KeyError, ValueError) as error:
        raise FileError(
            f"{table}: wanted a whole number and a name in each row ({line_of(error)}); mend the table."
        ) from error
    values = sorted(names)
    if values[0] < 0 or values[-1] > 65535:
        raise FileError(
            f"{table}: an index must be in 0..65535, got {clipped(values[0], 40)}..{clipped(values[-1], 40)}; mend the table."
        )
    return LabelMap(tuple(str(names[value]) for value in values), {value: index for index, value in enumerate(values)})
