"""BTCV: abdominal CT with thirteen organs, from the challenge "Beyond the Cranial Vault".

Source: Landman et al. 2015, MICCAI multi-atlas labeling beyond the cranial vault, doi:10.7303/syn3193805.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptq3d.datasets.contents import contents, stem
from ptq3d.datasets.dataset import Dataset
from ptq3d.datasets.dataset_json import Listing, label_map, listed, read_table
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.split_folders import Part, of_parts, parts, with_splits

LAYOUT = "BTCV"
BTCV_ORGANS: tuple[str, ...] = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
"""Names of the classes of the BTCV abdomen challenge in its own order; the index is the value in the label file."""

LISTS = ("dataset.json", "dataset_0.json")
"""Files that say which cases are for training and which for validation, the first of them that is there."""


def find(root: Path) -> Dataset | None:
    """BTCV as downloaded, or arranged anew, told by the names of its files: img0001.nii.gz and label0001.nii.gz.

    They lie in `Abdomen/RawData/{Training,Testing}/{img,label}`, in `imagesTr`, `labelsTr` and `imagesTs`, or in
    `{train,val,test}/{images,labels}`.

    Args:
        root: the folder of the data set, or one of those around RawData.

    Returns:
        None where a file has another name, or a list beside them names other classes.

    Raises:
        FileError, LabelError: see `folders.find_cases`; a list that is broken or names what is not there.
    """
    for place in (root, root / "RawData", root / "Abdomen" / "RawData"):
        found = parts(place)
        if found and all(_is_named_so(part) for part in found):
            return _with_list(of_parts(LAYOUT, place, found))
    return None


def _is_named_so(part: Part) -> bool:
    return _all_named("img", part.images) and (part.labels is None or _all_named("label", part.labels))


def _all_named(word: str, folder: Path) -> bool:
    names: Sequence[str] = [stem(path) for path in contents(folder).volumes]
    return bool(names) and all(re.fullmatch(rf"{word}\d{{4}}", name) for name in names)


def _with_list(found: Dataset) -> Dataset | None:
    """The data set with the splits of the list beside it; None where the list is of other classes."""
    found = replace(found, label_map=LabelMap.identity(BTCV_ORGANS))
    for name in LISTS:
        path = found.root / name
        table = read_table(found.root, name)
        if table is None:
            continue
        classes = label_map(table.get("labels"), where=path)
        if classes is not None and len(classes.names) != len(BTCV_ORGANS):
            return None
        cases = listed(table, Listing(path))
        ignored = tuple(item for item in found.ignored if item.path != path)
        return with_splits(replace(found, ignored=ignored), {Path(case.where): case.split for case in cases})
    return found
