"""Classes get the codes of medicine's dictionary, their side and a colour of their own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from ptq3d.datasets.phantoms import BTCV_ORGANS
from ptq3d.volumes.anatomy import CATEGORIES, COLOURS, PRIVATE_SCHEME, STRUCTURES, coded, plain_text

WORDS = {
    "small bowel": "intestine",
    "ivc": "vena",
    "postcava": "vena",
    "hepatic vessel": "hepatic",
    "autochthon": "erector spinae",
    "iliac vena": "vein",
    "clavicula": "clavicle",
    "accumbens": "accumbens",
    "csf": "cerebrospinal",
    "inf lat vent": "inferior horn",
    "pallidum": "pallidus",
    "cerebellum exterior": "cerebellar cortex",
    "cerebellum cortex": "cerebellar cortex",
    "cerebellum white matter": "cerebellar white",
    "3rd ventricle": "third",
    "4th ventricle": "fourth",
    "5th ventricle": "fifth",
    "atrial appendage left": "appendage",
    "costal cartilages": "costal cartilage",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "cancer": "neoplasm",
    "brainstem": "stem",
    "grey matter": "gray matter",
    "urinary bladder": "bladder",
    "ent entorhinal area": "entorhinal",
    "kidney cyst": "cyst",
    "thyroid gland": "thyroid",
    "accumbens area": "accumbens",
}
"""A word of the dictionary's meaning, where the class is called otherwise."""


@pytest.mark.parametrize("name", STRUCTURES)
def test_each_code_means_what_the_class_is_called(name: str) -> None:
    code = getattr(codes.SCT, STRUCTURES[name])
    meaning = code.meaning.lower()
    if name in WORDS:
        assert WORDS[name] in meaning
    elif name.startswith(("vertebrae", "rib", "lung ")):
        assert all(word in meaning for word in name.replace("vertebrae", "vertebra").split() if word.isalpha())
    else:
        assert name.removesuffix(" proper") in meaning
    assert code.scheme_designator == "SCT"


def test_categories_and_colours_are_of_structures_in_use() -> None:
    assert (CATEGORIES.keys() | COLOURS.keys()) <= set(STRUCTURES.values())
    assert all(getattr(codes.SCT, category) for category in CATEGORIES.values())


@pytest.mark.parametrize("name", ["kidney_left", "left kidney", "Left-Kidney", "KIDNEY LEFT"])
def test_a_side_is_a_modifier(name: str) -> None:
    found = coded(name)
    assert (found.type, found.modifiers) == (codes.SCT.Kidney, (codes.SCT.Left,))
    assert found.category == codes.SCT.AnatomicalStructure


def test_btcv_is_known_but_for_the_two_veins_in_one() -> None:
    private = [name for name in BTCV_ORGANS[1:] if coded(name).type.scheme_designator != "SCT"]
    assert private == ["portal and splenic veins"]


def test_totalsegmentator_is_known_but_for_what_the_dictionary_lacks(shared: Path) -> None:
    names = json.loads((shared / "data" / "abdomen_ct" / "class_map_total_v2.json").read_text())["total"].values()
    private = {name for name in names if coded(name).type.scheme_designator == PRIVATE_SCHEME}
    sides = ("left", "right")
    gluteal = {f"gluteus_{size}_{side}" for size in ("maximus", "medius", "minimus") for side in sides}
    psoas = {f"iliopsoas_{side}" for side in sides}
    assert private == {"portal_vein_and_splenic_vein", "vertebrae_S1", *gluteal, *psoas}
    assert len({coded(name).colour for name in names}) == len(names) == 117
    assert coded("kidney_cyst_left").category == codes.SCT.MorphologicallyAbnormalStructure
    for name in names:
        assert len(coded(name).modifiers) == (any(side in name for side in sides) and "atrial" not in name)


def test_the_brain_is_known_down_to_its_gyri(shared: Path) -> None:
    with (shared / "data" / "whole_brain" / "labels.csv").open() as file:
        names = [row["Label Name"] for row in csv.DictReader(file)]
    known = {name for name in names if coded(name).type.scheme_designator == "SCT"}
    for wanted in ("Hippocampus", "Thalamus Proper", "Caudate", "Putamen", "Pallidum", "Amygdala", "Lateral Ventricle"):
        assert {f"Left {wanted}", f"Right {wanted}"} <= known
    assert {"3rd Ventricle", "4th Ventricle", "Brain Stem", "CSF", "Left Cerebral White Matter"} <= known


@given(st.text(max_size=200))
def test_any_name_has_a_code_that_dicom_can_hold(name: str) -> None:
    found = coded(name)
    assert 1 <= len(found.type.value) <= 16
    assert 1 <= len(found.type.meaning) <= 64
    assert "\\" not in found.type.meaning
    assert all(0 <= value <= 255 for value in found.colour)
    assert coded(name) == found


@given(st.text(max_size=99), st.integers(1, 70))
def test_plain_text_is_one_line_of_a_length(text: str, longest: int) -> None:
    plain = plain_text(text, longest)
    assert len(plain.splitlines()) == 1
    assert plain == "unnamed" or len(plain) <= longest


def test_names_without_a_code_have_codes_of_their_own() -> None:
    assert coded("gyrus a").type != coded("gyrus b").type
    assert coded("gyrus a").type.meaning == "gyrus a"
