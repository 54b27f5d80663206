"""What classes are called in medicine's own dictionary, and the colours they are shown in."""

from __future__ import annotations

import colorsys
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

Colour: TypeAlias = tuple[int, int, int]
"""Red, green, blue, 0..255."""

PRIVATE_SCHEME = "99PTQ3D"
LONGEST_MEANING = 64  # characters that DICOM allows
LONGEST_CODE = 16
LIGHTER = 0.3  # how far the left of a pair goes towards white


@dataclass(frozen=True)
class Coded:
    """A class in codes and colour.

    Attributes:
        category: what kind of thing it is, as DICOM's CID 7150 has it.
        type: what it is: SNOMED CT where pydicom's dictionary has it, else a code of our own from its name.
        modifiers: its side of the body.
        colour: the same for the same name everywhere.
    """

    category: Code
    type: Code
    modifiers: tuple[Code, ...]
    colour: Colour


STRUCTURES: dict[str, str] = {
    # abdomen and pelvis
    "spleen": "Spleen",
    "kidney": "Kidney",
    "gallbladder": "Gallbladder",
    "esophagus": "Esophagus",
    "liver": "Liver",
    "stomach": "Stomach",
    "pancreas": "Pancreas",
    "adrenal gland": "AdrenalGland",
    "small bowel": "SmallIntestine",
    "duodenum": "Duodenum",
    "colon": "Colon",
    "urinary bladder": "Bladder",
    "bladder": "Bladder",
    "prostate": "Prostate",
    # vessels
    "aorta": "Aorta",
    "inferior vena cava": "InferiorVenaCava",
    "ivc": "InferiorVenaCava",
    "postcava": "InferiorVenaCava",
    "superior vena cava": "SuperiorVenaCava",
    "portal vein": "PortalVein",
    "splenic vein": "SplenicVein",
    "hepatic vessel": "HepaticVein",
    "pulmonary vein": "PulmonaryVein",
    "brachiocephalic trunk": "BrachiocephalicTrunk",
    "brachiocephalic vein": "BrachiocephalicVein",
    "subclavian artery": "SubclavianArtery",
    "common carotid artery": "CommonCarotidArtery",
    "iliac artery": "IliacArtery",
    "iliac vena": "IliacVein",
    "iliac vein": "IliacVein",
    # chest
    "lung": "Lung",
    "lung upper lobe": "UpperLobeOfLung",
    "lung middle lobe": "MiddleLobeOfRightLung",
    "lung lower lobe": "LowerLobeOfLung",
    "trachea": "Trachea",
    "thyroid gland": "Thyroid",
    "heart": "Heart",
    "atrial appendage left": "LeftAuricularAppendage",
    # bones and muscles
    "sacrum": "Sacrum",
    "skull": "Skull",
    "sternum": "Sternum",
    "costal cartilages": "CostalCartilage",
    "humerus": "Humerus",
    "scapula": "Scapula",
    "clavicula": "Clavicle",
    "clavicle": "Clavicle",
    "femur": "Femur",
    "hip": "Hip",
    "autochthon": "ErectorSpinaeMuscle",
    **{f"vertebrae {level}": f"{level.upper()}Vertebra" for level in ("l1", "l2", "l3", "l4", "l5")},
    **{f"vertebrae t{level}": f"T{level}Vertebra" for level in range(1, 13)},
    **{f"vertebrae c{level}": f"C{level}Vertebra" for level in range(1, 8)},
    **{f"rib {number}": "Rib" for number in range(1, 13)},
    # brain
    "brain": "Brain",
    "spinal cord": "SpinalCord",
    "accumbens area": "NucleusAccumbens",
    "accumbens": "NucleusAccumbens",
    "amygdala": "Amygdala",
    "brain stem": "BrainStem",
    "brainstem": "BrainStem",
    "caudate": "CaudateNucleus",
    "cerebellum": "Cerebellum",
    "cerebellum exterior": "CerebellarCortex",
    "cerebellum cortex": "CerebellarCortex",
    "cerebellum white matter": "CerebellarWhiteMatter",
    "cerebral white matter": "CerebralWhiteMatter",
    "cerebral cortex": "CerebralCortex",
    "white matter": "WhiteMatter",
    "gray matter": "GrayMatter",
    "grey matter": "GrayMatter",
    "csf": "CerebrospinalFluid",
    "cerebrospinal fluid": "CerebrospinalFluid",
    "hippocampus": "Hippocampus",
    "lateral ventricle": "LateralVentricle",
    "inf lat vent": "InferiorHornOfLateralVentricle",
    "3rd ventricle": "ThirdVentricle",
    "4th ventricle": "FourthVentricle",
    "5th ventricle": "FifthVentricle",
    "pallidum": "GlobusPallidus",
    "putamen": "Putamen",
    "thalamus": "Thalamus",
    "thalamus proper": "Thalamus",
    "insula": "Insula",
    "optic chiasm": "OpticChiasm",
    "ent entorhinal area": "EntorhinalCortex",
    # disease
    "kidney cyst": "Cyst",
    "cyst": "Cyst",
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
    "cancer": "Neoplasm",
    "edema": "Edema",
    "lesion": "Lesion",
}
"""Class names, lower case and without their side -> the keyword of their SNOMED CT code in pydicom's dictionary.

No code stands here, so none can be wrong. Where the dictionary has no entry for just that structure, there is no row."""

CATEGORIES: dict[str, str] = {
    "WhiteMatter": "Tissue",
    "GrayMatter": "Tissue",
    "CerebrospinalFluid": "BodySubstance",
    "Cyst": "MorphologicallyAbnormalStructure",
    "Neoplasm": "MorphologicallyAbnormalStructure",
    "Edema": "MorphologicallyAbnormalStructure",
    "Lesion": "MorphologicallyAbnormalStructure",
}
"""The category of what is no anatomical structure."""

COLOURS: dict[str, Colour] = {
    "Spleen": (157, 108, 162),
    "Kidney": (185, 102, 83),
    "Gallbladder": (139, 150, 98),
    "Esophagus": (211, 171, 143),
    "Liver": (150, 75, 45),
    "Stomach": (216, 132, 105),
    "Pancreas": (249, 180, 111),
    "AdrenalGland": (244, 186, 150),
    "SmallIntestine": (205, 167, 142),
    "Duodenum": (235, 160, 120),
    "Colon": (204, 168, 100),
    "Bladder": (222, 154, 60),
    "Prostate": (230, 158, 140),
    "Aorta": (224, 60, 50),
    "InferiorVenaCava": (0, 110, 190),
    "SuperiorVenaCava": (20, 130, 210),
    "PortalVein": (0, 150, 206),
    "SplenicVein": (30, 170, 220),
    "Lung": (197, 165, 145),
    "Trachea": (182, 228, 255),
    "Thyroid": (62, 162, 114),
    "Heart": (206, 110, 84),
    "Brain": (250, 250, 225),
    "SpinalCord": (244, 214, 49),
    "Skull": (241, 214, 145),
    "Cyst": (205, 205, 100),
    "Neoplasm": (144, 238, 80),
}
"""Colours that viewers and atlases use for organs; what has no row gets one from its name."""


def coded(name: str) -> Coded:
    """A class by its name, as data sets write it ("kidney_right", "right kidney", "Left-Putamen").

    Raises:
        UnavailableError: pydicom is not installed.
    """
    from ptq3d.volumes.dicom_files import require_pydicom

    require_pydicom()
    from pydicom.sr.codedict import codes

    words, sides = _words(name)
    keyword = STRUCTURES.get(" ".join([*words, *sides])) or STRUCTURES.get(" ".join(words))
    told = keyword is not None and keyword.startswith(("Left", "Right"))
    return Coded(
        category=getattr(codes.SCT, CATEGORIES.get(keyword or "", "AnatomicalStructure")),
        type=_private(name) if keyword is None else getattr(codes.SCT, keyword),
        modifiers=() if told else tuple(getattr(codes.SCT, side.capitalize()) for side in sides),
        colour=_colour(name, keyword, sides),
    )


def _words(name: str) -> tuple[list[str], list[str]]:
    """The words of a name without its side, and its side."""
    words = re.findall(r"[^\W_]+", name.lower())
    return [word for word in words if word not in ("left", "right")], [
        word for word in words if word in ("left", "right")
    ][:1]


def _private(name: str) -> Code:
    from pydicom.sr.coding import Code

    value = hashlib.sha256(name.encode()).hexdigest()[:LONGEST_CODE].upper()
    return Code(value, PRIVATE_SCHEME, plain_text(name, LONGEST_MEANING))


def plain_text(text: str, longest: int) -> str:
    """A text that DICOM can hold on one line: no backslash, which parts values, and no more characters than allowed."""
    return (
        " ".join("".join(" " if letter == "\\" or not letter.isprintable() else letter for letter in text).split())[
            :longest
        ].strip()
        or "unnamed"
    )


def _colour(name: str, keyword: str | None, sides: list[str]) -> Colour:
    known = COLOURS.get(keyword or "")
    if known is None:
        digest = hashlib.sha256(name.lower().encode()).digest()
        shares = [byte / 255 for byte in digest[:4]]
        hue = (shares[0] + shares[1] / 256) % 1
        red, green, blue = colorsys.hls_to_rgb(hue, 0.4 + 0.3 * shares[2], 0.45 + 0.5 * shares[3])
        return round(255 * red), round(255 * green), round(255 * blue)
    share = LIGHTER if sides == ["left"] else 0.0
    red, green, blue = (round(value + share * (255 - value)) for value in known)
    return red, green, blue
