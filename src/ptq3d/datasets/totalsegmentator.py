"""TotalSegmentator's data sets: a folder a subject, one mask a class.

Source: Wasserthal et al. 2023, TotalSegmentator; doi:10.5281/zenodo.10047292 (version 2), 10.5281/zenodo.6802613
(version 1), 10.5281/zenodo.14710732 (MR); class tables "total", "total_v1" and "total_mr" of the tool.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ptq3d.datasets.cases import Case, Mask
from ptq3d.datasets.contents import Contents, contents, is_file, is_folder, stem
from ptq3d.datasets.dataset import Dataset, Ignored, arranged, split_named
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.rows import read_rows

IMAGES = ("ct.nii.gz", "mri.nii.gz")
META = "meta.csv"


def _sides(*names: str, order: str = "left right") -> tuple[str, ...]:
    return tuple(f"{name}_{side}" for name in names for side in order.split())


_RIBS = tuple(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13))
_VERTEBRAE = tuple(
    f"vertebrae_{part}{number}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for number in range(count, 0, -1)
)
_BELLY = ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach")
_ADRENALS = ("adrenal_gland_right", "adrenal_gland_left")
_LUNGS = (
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
)
_ILIAC = _sides("iliac_artery", "iliac_vena")
_LIMBS = _sides("humerus", "scapula", "clavicula", "femur", "hip")
_MUSCLES = _sides("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas")

V2_CLASSES: tuple[str, ...] = (
    *("background", *_BELLY, "pancreas", *_ADRENALS, *_LUNGS, "esophagus", "trachea", "thyroid_gland"),
    *("small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", *_sides("kidney_cyst")),
    *("sacrum", "vertebrae_S1", *_VERTEBRAE, "heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk"),
    *_sides("subclavian_artery", "common_carotid_artery", order="right left"),
    *_sides("brachiocephalic_vein"),
    *("atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein"),
    *(*_ILIAC, *_LIMBS, "spinal_cord", *_MUSCLES, "brain", "skull", *_RIBS, "sternum", "costal_cartilages"),
)
"""The 117 classes of version 2 in the order of their values, background first."""

V1_CLASSES: tuple[str, ...] = (
    *("background", *_BELLY, "aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas", *_ADRENALS),
    *(*_LUNGS, *_VERTEBRAE, "esophagus", "trachea", "heart_myocardium", "heart_atrium_left", "heart_ventricle_left"),
    *("heart_atrium_right", "heart_ventricle_right", "pulmonary_artery", "brain", *_ILIAC),
    *("small_bowel", "duodenum", "colon", *_RIBS, *_LIMBS, "sacrum", "face", *_MUSCLES, "urinary_bladder"),
)
"""The 104 classes of version 1 in the order of their values, background first."""

MR_CLASSES: tuple[str, ...] = (
    *("background", *_BELLY, "pancreas", *_ADRENALS, *_sides("lung"), "esophagus", "small_bowel", "duodenum", "colon"),
    *("urinary_bladder", "prostate", "sacrum", "vertebrae", "intervertebral_discs", "spinal_cord", "heart", "aorta"),
    *("inferior_vena_cava", "portal_vein_and_splenic_vein", *_ILIAC, *_LIMBS, *_MUSCLES, "brain"),
)
"""The 50 classes of the MR data set in the order of their values, background first."""

TABLES: dict[str, tuple[str, ...]] = {
    "TotalSegmentator V2": V2_CLASSES,
    "TotalSegmentator V1": V1_CLASSES,
    "TotalSegmentator MR": MR_CLASSES,
}


@dataclass(frozen=True)
class _Subject:
    name: str
    image: Path
    masks: Contents


def find(root: Path) -> Dataset | None:
    """Subjects `s0000/ct.nii.gz` (or `mri.nii.gz`) with `segmentations/*.nii.gz`, and the splits of `meta.csv`.

    The version is the one that knows most of the masks' names. A class without a mask is absent in its case; where
    masks overlap, the later class wins.

    Args:
        root: the folder of the subjects.

    Returns:
        None where no subfolder holds an image and `segmentations`.

    Raises:
        FileError: a folder cannot be listed, or a `meta.csv` without its columns.
    """
    if not is_folder(root):
        return None
    place = contents(root)
    subjects = [subject for folder in place.folders if (subject := _subject(folder)) is not None]
    if not any(subject.masks.volumes for subject in subjects):
        return None
    names = {stem(path) for subject in subjects for path in subject.masks.volumes}
    layout = max(TABLES, key=lambda table: (len(names & set(TABLES[table])), _suits(table, subjects)))
    values = {name: value for value, name in enumerate(TABLES[layout]) if value}
    splits = _splits(root / META)
    cases = [_case(subject, values, splits) for subject in subjects]
    known = {root / META, *(subject.image.parent for subject in subjects)}
    ignored = (*place.unused(known), *_unknown(subjects, values, layout))
    return Dataset(layout, root, arranged(cases), LabelMap.identity(TABLES[layout]), ignored=ignored)


def _subject(folder: Path) -> _Subject | None:
    image = next((folder / name for name in IMAGES if is_file(folder / name)), None)
    if image is None:
        return None
    masks = folder / "segmentations"
    return _Subject(folder.name, image, contents(masks) if is_folder(masks) else Contents())


def _suits(table: str, subjects: Iterable[_Subject]) -> bool:
    """Where names leave it open: whether the images are of the table's kind, CT before MR."""
    return table.endswith("MR") == any(subject.image.name.startswith("mri") for subject in subjects)


def _case(subject: _Subject, values: dict[str, int], splits: dict[str, str]) -> Case:
    found = [Mask(path, values[stem(path)]) for path in subject.masks.volumes if stem(path) in values]
    masks = tuple(sorted(found, key=lambda mask: mask.value))
    return Case(subject.name, (subject.image,), masks or None, splits.get(subject.name, ""))


def _unknown(subjects: Iterable[_Subject], values: dict[str, int], layout: str) -> list[Ignored]:
    reason = f"no class of {layout} has its name"
    left: list[Ignored] = []
    for subject in subjects:
        left += [Ignored(path, reason) for path in subject.masks.volumes if stem(path) not in values]
        left += subject.masks.unused(subject.masks.volumes)
    return left


def _splits(path: Path) -> dict[str, str]:
    """Subject -> split, of `meta.csv` (image_id;age;gender;...;split;...)."""
    if not is_file(path):
        return {}
    rows = read_rows(path, columns=("image_id", "split"), delimiter=";")
    return {row["image_id"]: split_named(row.get("split", ""), where=path) for row in rows}
