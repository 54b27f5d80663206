"""BIDS: every image is a case, every kind of segmentation a set to choose from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from placing import left_out, told, touch, volume

from ptq3d.datasets.cases import read_grid, read_image, read_labels, true_classes
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import FileError, LabelError

RAW = ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_run-1_T1w.nii.gz", "dataset_description.json")
MANUAL = (
    "derivatives/manual/sub-01/anat/sub-01_dseg.nii.gz",
    "derivatives/manual/sub-02/ses-a/anat/sub-02_ses-a_run-1_dseg.nii.gz",
)


def test_raw_images_and_one_derivative(tmp_path: Path) -> None:
    root = touch(tmp_path, *RAW, *MANUAL, "participants.tsv", "sub-01/anat/sub-01_T1w.json", "sub-01/func/x.nii.gz")
    (root / "derivatives/manual/dseg.tsv").write_text(
        "index\tname\tabbreviation\n0\tBackground\tbg\n1\tGray Matter\tGM\n7\tWhite Matter\tWM\n", encoding="utf-8"
    )
    found = open_dataset(root)
    assert found.layout == "BIDS"
    assert told(found) == [
        ("sub-01_T1w", "", RAW[0], MANUAL[0]),
        ("sub-02_ses-a_run-1_T1w", "", RAW[1], MANUAL[1]),
    ]
    assert found.label_map is not None
    assert found.label_map.names == ("Background", "Gray Matter", "White Matter")
    assert found.label_map.values == {0: 0, 1: 1, 7: 2}
    assert open_dataset(root, Path("dseg")).cases == found.cases
    assert found.ignored == ()


def test_values_become_the_classes_of_the_table(tmp_path: Path) -> None:
    volume(tmp_path / RAW[0], np.zeros(4, np.int16))
    volume(tmp_path / MANUAL[0], np.array([0, 1, 7, 7], np.uint8))
    (tmp_path / MANUAL[0].replace(".nii.gz", ".tsv")).write_text("index\tname\n1\tGM\n7\tWM\n", encoding="utf-8")
    found = open_dataset(tmp_path)
    assert found.label_map is not None
    classes = true_classes(found.cases[0], read_grid(found.cases[0]), found.label_map)
    assert classes is not None
    assert classes.ravel().tolist() == [0, 1, 2, 2]


def test_several_segmentations_are_offered_by_name(tmp_path: Path) -> None:
    pipeline = "derivatives/fmriprep/sub-01/anat/sub-01"
    root = touch(
        tmp_path,
        *RAW,
        *MANUAL,
        "derivatives/fmriprep/desc-aseg_dseg.tsv",
        f"{pipeline}_desc-aseg_dseg.nii.gz",
        f"{pipeline}_desc-brain_mask.nii.gz",
        f"{pipeline}_dseg.nii.gz",
        f"{pipeline}_label-GM_probseg.nii.gz",
        f"{pipeline}_desc-preproc_T1w.nii.gz",
        f"{pipeline}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz",
        "derivatives/fmriprep/sub-09/anat/sub-09_dseg.nii.gz",
    )
    (root / "derivatives/fmriprep/desc-aseg_dseg.tsv").write_text("index\tname\n2\tL-WM\n", encoding="utf-8")
    found = open_dataset(root)
    assert list(found.choices) == ["desc-aseg", "desc-brain", "fmriprep_dseg_dseg", "manual_dseg_dseg"]
    assert all(case.labels is None for case in found.cases)
    reasons = left_out(found)
    assert "one of several segmentations (desc-aseg, desc-brain," in reasons["sub-01_desc-aseg_dseg.nii.gz"]
    assert reasons["sub-01_label-GM_probseg.nii.gz"] == "'probseg' holds no labels"
    assert reasons["sub-01_desc-preproc_T1w.nii.gz"] == "an image among the derivatives"
    assert "MNI152NLin2009cAsym" in reasons["sub-01_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz"]
    assert reasons["sub-09_dseg.nii.gz"] == "no image has its entities"
    aseg = open_dataset(root, Path("desc-aseg"))
    assert [case.label_files for case in aseg.cases] == [(root / f"{pipeline}_desc-aseg_dseg.nii.gz",), ()]
    assert aseg.label_map is not None
    assert aseg.label_map.names == ("background", "L-WM")
    brain = open_dataset(root, Path("desc-brain"))
    assert brain.label_map is not None
    assert brain.label_map.names == ("background", "brain")
    with pytest.raises(FileError, match="desc-aseg, desc-brain, fmriprep_dseg_dseg, manual_dseg_dseg"):
        open_dataset(root, Path("aseg"))


def test_a_space_says_which_of_several_images(tmp_path: Path) -> None:
    names = (
        "sub-1_T1w.nii.gz",
        "sub-1_FLAIR.nii.gz",
        "sub-1_space-FLAIR_label-lesion_mask.nii.gz",
        "sub-1_dseg.nii.gz",
    )
    found = open_dataset(touch(tmp_path, *names))
    assert told(found) == [("sub-1_FLAIR", "", names[1], names[2]), ("sub-1_T1w", "", names[0], "")]
    assert found.label_map is not None
    assert found.label_map.names == ("background", "lesion")
    assert "['sub-1_FLAIR', 'sub-1_T1w']" in left_out(found)["sub-1_dseg.nii.gz"]


def test_the_real_spine_offers_both_its_sets(shared: Path) -> None:
    data = shared / "data/spine_small"
    found = open_dataset(data)
    assert found.layout == "BIDS"
    assert [(case.name, case.labels) for case in found.cases] == [
        ("sub-ct_label-22_ct", None),
        ("sub-mri_label-6_T2w", None),
    ]
    assert list(found.choices) == ["seg-subreg", "seg-vert"]
    for name in found.choices:
        chosen = open_dataset(data, Path(name))
        for case in chosen.cases:
            subject = case.name.split("_")[0]
            assert case.label_files[0].name.startswith(f"{subject}_{name}_")
            image, labels = read_image(case), read_labels(case)
            assert labels is not None
            np.testing.assert_array_equal(image.affine, labels.affine)
    with pytest.raises(FileError, match="has the segmentations seg-subreg, seg-vert"):
        open_dataset(data, Path("seg-none"))


def test_raw_data_in_a_folder_of_its_own(tmp_path: Path) -> None:
    root = touch(tmp_path, "rawdata/sub-1/sub-1_ct.nii.gz", "derivatives/sub-1/sub-1_seg-vert_msk.nii.gz")
    assert told(open_dataset(root)) == [
        ("sub-1_ct", "", "rawdata/sub-1/sub-1_ct.nii.gz", "derivatives/sub-1/sub-1_seg-vert_msk.nii.gz")
    ]


@pytest.mark.parametrize(
    "table", ["index,name\n1,a\n", "index\tname\nx\ta\n", "index\tname\n-1\ta\n", "index\tname\n1\n", ""]
)
def test_a_broken_table_is_named(tmp_path: Path, table: str) -> None:
    root = touch(tmp_path, RAW[0], MANUAL[0])
    (root / "derivatives/manual/dseg.tsv").write_text(table, encoding="utf-8")
    with pytest.raises(FileError, match=r"dseg\.tsv"):
        open_dataset(root)


def test_two_files_of_one_set_are_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, RAW[0], MANUAL[0], MANUAL[0].removesuffix(".gz"))
    with pytest.raises(LabelError, match="keep one"):
        open_dataset(root)


@pytest.mark.parametrize(
    "name", ["sub-01.nii.gz", "scan.nii.gz", "sub01_T1w.nii.gz", "sub-01_T1w_x-.nii.gz", "sub-01__T1w.nii"]
)
def test_other_names_are_a_plain_folder(tmp_path: Path, name: str) -> None:
    assert open_dataset(touch(tmp_path, name, "sub-02_T1w.nii.gz")).layout == "folder"


def test_the_image_with_most_of_its_entities_owns_a_label(tmp_path: Path) -> None:
    names = ("sub-1_T1w.nii.gz", "sub-1_run-2_T1w.nii.gz", "sub-1_run-2_dseg.nii.gz")
    assert told(open_dataset(touch(tmp_path, *names))) == [
        ("sub-1_T1w", "", names[0], ""),
        ("sub-1_run-2_T1w", "", names[1], names[2]),
    ]
