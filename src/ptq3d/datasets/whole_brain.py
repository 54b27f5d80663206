"""Whole brains with manual labels by the BrainCOLOR protocol: 132 structures and background.

Label files hold either the ids of the protocol (4 .. 207) or the 133 classes themselves. The classes are those of
SLANT and UNesT: in the order of the ids, without cerebral exterior (42, 43), CSF (46), vessels (63, 64) and optic
chiasm (69), which become background, as everything does that only some brains have: 5th ventricle (15), the older
insula (65, 66), the vitamin E tablet (74).

Source: Neuromorphometrics' BrainCOLOR protocol (Klein et al. 2010); the list of classes in Huo et al. 2019, 3D whole
brain segmentation using spatially localized atlas network tiles, and in the metadata of MONAI's bundle
wholeBrainSeg_Large_UNEST_segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ptq3d.datasets import folders, split_folders
from ptq3d.datasets.contents import contents, is_folder
from ptq3d.datasets.dataset import Dataset
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import InputError
from ptq3d.volumes.files import load_labels

LAYOUT = "whole brain"

_STRUCTURES = {
    4: "3rd ventricle",
    11: "4th ventricle",
    23: "right accumbens area",
    30: "left accumbens area",
    31: "right amygdala",
    32: "left amygdala",
    35: "brain stem",
    36: "right caudate",
    37: "left caudate",
    38: "right cerebellum exterior",
    39: "left cerebellum exterior",
    40: "right cerebellum white matter",
    41: "left cerebellum white matter",
    44: "right cerebral white matter",
    45: "left cerebral white matter",
    47: "right hippocampus",
    48: "left hippocampus",
    49: "right inf lat vent",
    50: "left inf lat vent",
    51: "right lateral ventricle",
    52: "left lateral ventricle",
    55: "right pallidum",
    56: "left pallidum",
    57: "right putamen",
    58: "left putamen",
    59: "right thalamus proper",
    60: "left thalamus proper",
    61: "right ventral dc",
    62: "left ventral dc",
    71: "cerebellar vermal lobules i-v",
    72: "cerebellar vermal lobules vi-vii",
    73: "cerebellar vermal lobules viii-x",
    75: "left basal forebrain",
    76: "right basal forebrain",
}
_CORTEX = {  # the id of the right side; the left is one more
    100: "anterior cingulate gyrus",
    102: "anterior insula",
    104: "anterior orbital gyrus",
    106: "angular gyrus",
    108: "calcarine cortex",
    112: "central operculum",
    114: "cuneus",
    116: "entorhinal area",
    118: "frontal operculum",
    120: "frontal pole",
    122: "fusiform gyrus",
    124: "gyrus rectus",
    128: "inferior occipital gyrus",
    132: "inferior temporal gyrus",
    134: "lingual gyrus",
    136: "lateral orbital gyrus",
    138: "middle cingulate gyrus",
    140: "medial frontal cortex",
    142: "middle frontal gyrus",
    144: "middle occipital gyrus",
    146: "medial orbital gyrus",
    148: "postcentral gyrus medial segment",
    150: "precentral gyrus medial segment",
    152: "superior frontal gyrus medial segment",
    154: "middle temporal gyrus",
    156: "occipital pole",
    160: "occipital fusiform gyrus",
    162: "opercular part of the inferior frontal gyrus",
    164: "orbital part of the inferior frontal gyrus",
    166: "posterior cingulate gyrus",
    168: "precuneus",
    170: "parahippocampal gyrus",
    172: "posterior insula",
    174: "parietal operculum",
    176: "postcentral gyrus",
    178: "posterior orbital gyrus",
    180: "planum polare",
    182: "precentral gyrus",
    184: "planum temporale",
    186: "subcallosal area",
    190: "superior frontal gyrus",
    192: "supplementary motor cortex",
    194: "supramarginal gyrus",
    196: "superior occipital gyrus",
    198: "superior parietal lobule",
    200: "superior temporal gyrus",
    202: "temporal pole",
    204: "triangular part of the inferior frontal gyrus",
    206: "transverse temporal gyrus",
}

BRAINCOLOR_IDS: dict[int, str] = {
    **_STRUCTURES,
    **{
        right + side: f"{word} {name}" for right, name in _CORTEX.items() for side, word in enumerate(("right", "left"))
    },
}
"""Id in the label file -> structure, for the 132 structures that are classes, in the order of the classes 1 .. 132."""

LARGEST_ID = 207  # of the protocol
WHOLE_BRAIN_NAMES: tuple[str, ...] = ("background", *BRAINCOLOR_IDS.values())
"""The 133 classes, background first."""

BRAINCOLOR = LabelMap(
    WHOLE_BRAIN_NAMES,
    {
        **dict.fromkeys(range(LARGEST_ID + 1), 0),
        **{value: index for index, value in enumerate(BRAINCOLOR_IDS, start=1)},
    },
)
"""From the ids of the protocol to the 133 classes; ids that are no class are background, values above 207 refused."""

_FEWEST = 120  # of the 132 structures, that a brain is known by: none misses more, and nothing else has as many

_TRIES = 3  # label files that are opened to find one that can be read


def find(root: Path) -> Dataset | None:
    """Brains in `{train,val,test}/{images,labels}`, `images` and `labels`, or with the labels beside the images.

    Names do not tell them, so the first label file that can be read is looked at: see `label_map_of`.

    Args:
        root: a folder.

    Returns:
        None where there are no labels, or the values are others.

    Raises:
        FileError, LabelError: see `folders.find_cases`.
    """
    found = _labelled(root)
    values = _values([file for case in found.cases for file in case.label_files]) if found else None
    label_map = None if values is None else label_map_of(values)
    if found is None or label_map is None:
        return None
    choices = {name: replace(one, layout=LAYOUT, label_map=label_map) for name, one in found.choices.items()}
    return replace(found, layout=LAYOUT, label_map=label_map, choices=choices)


def _values(labels: Sequence[Path]) -> np.ndarray | None:
    """The distinct values of the first label file that can be read; None where its largest is no brain's."""
    for label in labels[:_TRIES]:
        try:
            found = load_labels(label).data
        except InputError:  # said by whoever reads its case
            continue
        # most label maps end here: to find the distinct values of a large one takes seconds
        return np.unique(found) if len(BRAINCOLOR_IDS) <= found.max() <= LARGEST_ID else None
    return None


def label_map_of(values: np.ndarray) -> LabelMap | None:
    """The label map that belongs to the values of one brain: ids of BrainCOLOR, the 133 classes, or None for neither.

    Args:
        values: the distinct values of a label file.
    """
    seen = {int(value) for value in values}
    largest = max(seen)
    if largest == len(WHOLE_BRAIN_NAMES) - 1 and len(seen) > _FEWEST:
        return LabelMap.identity(WHOLE_BRAIN_NAMES)
    if largest <= LARGEST_ID and len(seen & set(BRAINCOLOR_IDS)) >= _FEWEST:
        return BRAINCOLOR
    return None


def _labelled(root: Path) -> Dataset | None:
    """The folder's cases, by whichever plain layout has labels."""
    found = split_folders.find(root)
    if found is None and is_folder(root) and contents(root).volumes:
        found = folders.find(root)
    return found
