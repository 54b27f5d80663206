"""The Medical Segmentation Decathlon: `dataset.json` lists the images and labels.

Source: Antonelli et al. 2022, The Medical Segmentation Decathlon; the `dataset.json` of its ten tasks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ptq3d.datasets.contents import contents, is_folder
from ptq3d.datasets.dataset import Dataset, Ignored, arranged
from ptq3d.datasets.dataset_json import Listing, channel_names, label_map, listed, read_table

LAYOUT = "Medical Segmentation Decathlon"


def find(root: Path) -> Dataset | None:
    """A task as downloaded: `dataset.json`, `imagesTr`, `labelsTr`, `imagesTs`.

    Some tasks keep several modalities in one 4D file, which are the channels of its case.

    Args:
        root: the folder of one task, such as Task02_Heart.

    Returns:
        None without a `dataset.json` that lists training images.

    Raises:
        FileError: a `dataset.json` that is no JSON, of another shape, lists what is not there, or leaves the folder.
        LabelError: values of its labels that no label file can hold.
    """
    table = read_table(root) if is_folder(root) else None
    if table is None or "training" not in table:
        return None
    path = root / "dataset.json"
    channels = channel_names(table.get("modality"))
    cases = arranged(
        replace(case, stacked=max(1, len(channels)) if len(case.images) == 1 else 1)
        for case in listed(table, Listing(path))
    )
    used = {root / "dataset.json", *(file for case in cases for file in (*case.images, *case.label_files))}
    classes = label_map(table.get("labels"), where=path)
    unnamed = () if classes else (Ignored(path, "names no classes; its label values stay without names"),)
    return Dataset(
        LAYOUT,
        root,
        cases,
        label_map=classes,
        channels=channels,
        ignored=(*_unlisted(root, {Path(str(file)) for file in used}), *unnamed),
    )


def _unlisted(root: Path, used: set[Path]) -> list[Ignored]:
    """What lies in the folders that the list names files of, or beside them."""
    folders = {path.parent for path in used}
    left = list(contents(root).unused({*used, *folders}))
    for folder in sorted(folders - {root}):
        found = contents(folder)
        left += [Ignored(path, "not listed in dataset.json") for path in found.volumes if path not in used]
        left += found.unused({*found.volumes, *folders})
    return left
