"""Data sets, lists and labels that are wrong, as a user would give them, and what is said of them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from broken_series import directory_alone, series
from laid_out import AFFINE, bids, classes_of, decathlon, dumped, image_of, nnunet, split_folders, subjects, volume

Place = Callable[[Path], object]
FLIPPED = AFFINE @ np.array([[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@dataclass(frozen=True)
class Bad:
    """Arguments that cannot be used.

    Attributes:
        make: writes files into a folder.
        message: pattern of the error.
        data: what is given as the data, within the folder.
        labels: likewise, as the labels.
        named: what the error names, within the folder; "" for the data.
        more: further arguments.
        verb: that meets it.
    """

    make: Place
    message: str
    data: str = "."
    labels: str | None = None
    named: str = ""
    more: tuple[str, ...] = ()
    verb: str = "deploy"


def image(place: Path, seed: int = 1) -> Path:
    volume(place, image_of(classes_of(3, seed), seed))
    return place


def labelled(values: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Place:
    """An image and its labels in another file."""

    def make(root: Path) -> None:
        image(root / "a.nii")
        data = classes_of(3, 1).astype(np.uint8) if values is None else values
        nibabel.save(nibabel.Nifti1Image(data, affine, dtype=data.dtype), root / "l.nii")

    return make


def of_labels(message: str, values: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Bad:
    return Bad(labelled(values, affine), message, "a.nii", "l.nii", "l.nii")


def moved(axis: int) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += affine[:3, axis]
    return affine


def texts(**files: str | bytes) -> Place:
    """An image a.nii, and files by their names with "_" for the dot."""

    def make(root: Path) -> None:
        image(root / "a.nii")
        for name, content in files.items():
            path = root / name.replace("_", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def table(content: str | bytes, message: str) -> Bad:
    return Bad(texts(c_csv=content), message, "c.csv", named="c.csv")


def listing(content: str | bytes, message: str) -> Bad:
    return Bad(texts(c_json=content), message, "c.json", named="c.json")


def label_map(content: str, message: str) -> Bad:
    def make(root: Path) -> None:
        labelled()(root)
        (root / "m.json").write_text(content)

    return Bad(make, message, "a.nii", "l.nii", "m.json", ("--label-map", "m.json"))


def archive(*names: str) -> Place:
    def make(root: Path) -> None:
        with zipfile.ZipFile(root / "a.zip", "w") as file:
            for name in names:
                file.writestr(name, "text")

    return make


def described(make: Place, change: Callable[[dict], object]) -> Place:
    """A data set with another `dataset.json`."""

    def spoil(root: Path) -> None:
        make(root)
        content = json.loads((root / "dataset.json").read_text())
        change(content)
        dumped(root / "dataset.json", content)

    return spoil


def task(change: Callable[[dict], object], message: str) -> Bad:
    return Bad(described(decathlon, change), message, named="dataset.json")


def first_image(path: str) -> Callable[[dict], object]:
    return lambda content: content["training"][0].update(image=path)


def without(make: Place, name: str) -> Place:
    def spoil(root: Path) -> None:
        make(root)
        (root / name).unlink()

    return spoil


def with_text(make: Place, name: str, text: str) -> Place:
    def spoil(root: Path) -> None:
        make(root)
        (root / name).write_text(text)

    return spoil


ORGANS = ("background", "liver", "spleen")


def masks_apart(root: Path) -> None:
    subjects(ORGANS)(root)
    volume(root / "s0001/segmentations/spleen.nii.gz", np.zeros((3, 3, 3), np.uint8))


def circle(*names: str) -> Place:
    """Links in a circle."""

    def make(root: Path) -> None:
        for name, other in zip(names, (*names[1:], names[0]), strict=True):
            (root / name).symlink_to(root / other)

    return make


def folders(images: tuple[str, ...], labels: tuple[str, ...]) -> Place:
    def make(root: Path) -> None:
        for name in images:
            image(root / "images" / name)
        (root / "labels").mkdir()
        for name in labels:
            volume(root / "labels" / name, classes_of(3, 1).astype(np.uint8))

    return make


def patients_in_one_folder(root: Path) -> None:
    """Two patients' slices, their files side by side."""
    for patient in ("P1", "P2"):
        series(root / patient, lambda header, index, patient=patient: setattr(header, "PatientID", patient))
        for path in (root / patient).iterdir():
            path.rename(root / f"{patient}_{path.name}.dcm")
        (root / patient).rmdir()


def two_series(root: Path) -> None:
    for number in (3, 8):
        series(root / str(number), lambda header, index, number=number: setattr(header, "SeriesNumber", number))
        for path in (root / str(number)).iterdir():
            path.rename(root / f"{number}_{path.name}.dcm")
        (root / str(number)).rmdir()


def linked(target: str) -> Place:
    return lambda root: (root / "a.nii").symlink_to(target)


def images(*names: str) -> Place:
    def make(root: Path) -> None:
        for name in names:
            image(root / name)

    return make


def undecodable(root: Path) -> None:
    """A name that is no UTF-8, as from an old archive."""
    image(root / "a.nii").rename(Path(os.fsdecode(os.fsencode(root) + b"/a\xff.nii")))


CLASSES = classes_of(3, 1).astype(np.uint8)
PLAIN, CHOICE = ("a.nii",), "--output-type"
BAD_SETS: dict[str, Bad] = {
    # labels
    "labels of another shape": of_labels(r"\(23, 28, 10\) voxels but its image", CLASSES[1:]),
    "labels with axes exchanged": of_labels("voxels but its image", CLASSES.transpose(2, 1, 0).copy()),
    "labels moved by a voxel": of_labels("1 voxels beside", affine=moved(0)),
    "labels moved by a slice": of_labels("1 voxels beside", affine=moved(2)),
    "labels flipped": of_labels("voxels beside", affine=FLIPPED),
    "labels of another spacing": of_labels("voxels beside", affine=AFFINE @ np.diag([1, 1, 1.2, 1])),
    "labels of no class": of_labels("none of the 3 classes: 100, 200.*--label-map", CLASSES * np.uint8(100)),
    "labels with halves": of_labels("not whole numbers", CLASSES * np.float32(0.5)),
    "labels below zero": of_labels(r"0\.\.65535", CLASSES.astype(np.int16) - 1),
    "labels with NaN": of_labels("whole numbers|NaN", np.where(CLASSES == 1, np.nan, 1).astype(np.float32)),
    "labels in 4D": of_labels("one 3D volume", np.stack([CLASSES, CLASSES], -1)),
    "labels cut short": Bad(
        lambda root: (labelled()(root), os.truncate(root / "l.nii", 900)), "truncated", "a.nii", "l.nii", "l.nii"
    ),
    "labels with a typo in their path": Bad(
        images(*PLAIN), "no such file or folder of labels", "a.nii", "lables", "lables"
    ),
    "an empty folder of labels": Bad(folders(PLAIN, ()), "no labels in this folder", "images", "labels", "labels"),
    "an image without labels": Bad(
        folders(("a.nii", "b.nii"), PLAIN), "has no labels in", "images", "labels", "images/b.nii"
    ),
    "labels of another name": Bad(folders(PLAIN, ("b.nii",)), "has no labels in", "images", "labels", "images/a.nii"),
    "two label files for an image": Bad(
        folders(PLAIN, ("a.nii", "a.nii.gz")), "several label files", "images", "labels", "images/a.nii"
    ),
    "one label file for two images": Bad(
        folders(("scan1.nii", "image1.nii"), ("l1.nii",)), "would be the labels of", "images", "labels", "labels/l1.nii"
    ),
    "the image as labels": Bad(images(*PLAIN), r"0\.\.65535", "a.nii", "a.nii", "a.nii"),
    "a label map of JSON that is cut": label_map('{"labels": ', "no readable JSON"),
    "a label map without end": label_map("[" * 100_000, "no readable JSON"),
    "a label map with a gap": label_map('{"labels": {"0": "a", "2": "b"}}', "without gaps"),
    "a label map of other classes": label_map('{"labels": {"0": "a", "1": "b"}}', "names 2 classes"),
    "a value in two classes": label_map(
        '{"labels": {"0": "a", "1": "b", "2": "c"}, "my_ids": {"b": [1], "c": [1]}}', "two classes"
    ),
    # lists
    "a table without an image column": table("img,label\na.nii,\n", "wanted a header with a column 'image'"),
    "a table without a header": table("a.nii\n", "wanted a header with a column 'image'"),
    "a table with a plural": table("image,labels\na.nii,a.nii\n", "got 'labels'"),
    "a table with a column twice": table("image,image\na.nii,a.nii\n", "each column once"),
    "a table with too many cells": table("image\na.nii,b,c\n", "row 2 has 3 cells"),
    "a table without rows": table("image\n", "a row for each case, got no row"),
    "an empty table": table("", "a row for each case, got no row"),
    "a table in UTF-16": table("image\na.nii\n".encode("utf-16"), "no readable table"),
    "a table with a huge cell": table("image\n" + "a" * 200_000 + "\n", "no readable table"),
    "a table that names what is not there": table("image\nb.nii\n", "lists 'b.nii', but there is no such file"),
    "a table that names an image twice": table("image\na.nii\na.nii\n", "several images have the case name"),
    "a table with a NUL": table("image\na\0.nii\n", "no such file"),
    "a row without an image": table("image,label\na.nii,\n,a.nii\n", "has no image"),
    "a gap between channels": table("image_0,image_2\na.nii,a.nii\n", "without gaps"),
    "an unknown split": table("image,split\na.nii,fold 1\n", "wanted a split"),
    "a folder as label": Bad(
        lambda root: (texts(c_csv="image,label\na.nii,l\n")(root), (root / "l").mkdir()),
        "lists 'l'",
        "c.csv",
        named="c.csv",
    ),
    "labels beside a list": Bad(texts(c_csv="image\na.nii\n"), "names its labels itself", "c.csv", "a.nii", "c.csv"),
    "a JSON list that is cut": listing('[{"image": ', "no readable JSON"),
    "a JSON list without end": listing("[" * 100_000, "no readable JSON"),
    "a JSON list of numbers": listing("[3]", "wanted an image"),
    "a JSON number": listing("3", "wanted a list"),
    "a JSON list of nothing": listing("[]", "no case in it"),
    "a JSON list with a path without end": listing(json.dumps(["a" * 5000]), "no such file"),
    "a case name that climbs": listing('[{"image": "a.nii", "name": "../../x"}]', "cannot be the name of a file"),
    "a case name from the root": listing('[{"image": "a.nii", "name": "/etc/x"}]', "cannot be the name of a file"),
    # data sets
    "a dataset.json that is cut": Bad(
        with_text(decathlon, "dataset.json", "{"), "no readable JSON", named="dataset.json"
    ),
    "a dataset.json that is a list": Bad(
        with_text(decathlon, "dataset.json", "[]"), "wanted an object", named="dataset.json"
    ),
    "a dataset.json that climbs": task(first_image("../../x.nii.gz"), "leads out of the data set's folder"),
    "a dataset.json from the root": task(first_image("/etc/passwd"), "leads out of the data set's folder"),
    "a dataset.json with a number for a path": task(lambda content: content.update(test=[7]), "wanted an image"),
    "a dataset.json with a value twice": task(
        lambda content: content.update(labels={"0": "background", "1": "a", "01": "b"}), "given twice"
    ),
    "a dataset.json with values too large": task(
        lambda content: content.update(labels={"0": "background", "70000": "b"}), r"0\.\.65535"
    ),
    "a training image that is not there": Bad(
        without(decathlon, "imagesTr/spleen_2.nii.gz"), "no such file", named="dataset.json"
    ),
    "nnU-Net without labels": Bad(
        without(nnunet(".nii.gz"), "labelsTr/spleen_002.nii.gz"), "are missing", named="labelsTr/spleen_002.nii.gz"
    ),
    "nnU-Net without a channel": Bad(
        described(nnunet(".nii.gz"), lambda content: content.update(channel_names={"0": "T1", "1": "T2"})),
        "of this case is missing",
        named="imagesTr/spleen_002_0001.nii.gz",
    ),
    "nnU-Net of another ending": Bad(
        described(nnunet(".nii.gz"), lambda content: content.update(file_ending=".nrrd")),
        "not named case_0000.nrrd, nor is any other",
        named="imagesTr/spleen_002_0000.nii.gz",
    ),
    "nnU-Net of pictures": Bad(
        described(nnunet(".nii.gz"), lambda content: content.update(file_ending=".png")),
        "file_ending",
        named="dataset.json",
    ),
    "a meta.csv of commas": Bad(
        with_text(subjects(ORGANS), "meta.csv", "image_id,split\ns0000,train\n"), "set apart by ';'", named="meta.csv"
    ),
    "a meta.csv with another split": Bad(subjects(ORGANS, splits=("train", "5")), "wanted a split", named="meta.csv"),
    "masks on other grids": Bad(masks_apart, "1 error in s0001", verb="data check"),
    "a table of classes without numbers": Bad(
        with_text(bids, "derivatives/manual_masks/dseg.tsv", "index\tname\none\tliver\n"),
        "wanted a whole number",
        named="derivatives/manual_masks/dseg.tsv",
    ),
    "a set with a broken case": Bad(
        with_text(split_folders, "test/images/c3.nii.gz", "text"), "1 error in c3", verb="data check"
    ),
    "a broken header": Bad(
        with_text(split_folders, "test/images/c3.nii.gz", "text"), "1 of 3 cases failed", named="test/images/c3.nii.gz"
    ),
    # folders, files and links
    "a path with a typo": Bad(images(*PLAIN), "no such file or folder", "b.nii", named="b.nii"),
    "an empty folder": Bad(lambda root: None, "no images in this folder"),
    "a folder around folders": Bad(
        images("x/a.nii"), "no images in this folder .*; name one of its folders, such as x"
    ),
    "labels of a data set for all of it": Bad(
        split_folders, r"c1\.nii\.gz has no label map in test/labels", labels="test/labels"
    ),
    "a folder of texts": Bad(lambda root: (root / "a.txt").write_text("x"), "no images in this folder"),
    "a text": Bad(lambda root: (root / "a.txt").write_text("x"), "must end in one of", "a.txt", named="a.txt"),
    "a folder named like a volume": Bad(
        lambda root: (root / "a.nii.gz").mkdir(), "no images in", "a.nii.gz", named="a.nii.gz"
    ),
    "folders named like volumes": Bad(lambda root: (root / "a.nii.gz").mkdir(), "no images in this folder"),
    "links in a circle": Bad(circle("a.nii", "b.nii"), "no images in this folder"),
    "a link to itself": Bad(circle("a.nii"), "no such file or folder", "a.nii", named="a.nii"),
    "folders in a circle": Bad(circle("a", "b"), "no such file or folder", "a", named="a"),
    "a link to nothing": Bad(linked("nothing"), "no such file or folder", "a.nii", named="a.nii"),
    "a device": Bad(linked("/dev/zero"), "no such file or folder", "a.nii", named="a.nii"),
    "a pipe": Bad(lambda root: os.mkfifo(root / "a.nii"), "no such file or folder", "a.nii", named="a.nii"),
    "two images of one name": Bad(images("a.nii", "a.nii.gz"), "several images have the case name"),
    "a name too long for a result": Bad(images("x" * 220 + ".nii"), "at most 200 bytes"),
    "a line break in a name": Bad(images("a\nb.nii"), "cannot be the name of a file"),
    "a name in no encoding": Bad(undecodable, "cannot be the name of a file"),
    "two channels for one": Bad(
        texts(c_csv="image_0,image_1,name\na.nii,a.nii,a\n"), "takes 1 channels", "c.csv", named="a: "
    ),
    # DICOM and options
    "two patients in a folder": Bad(patients_in_one_folder, "2 patients"),
    "two series in a folder": Bad(two_series, "--series among"),
    "a series with a typo": Bad(two_series, "has no series 'nine'", more=("--series", "nine")),
    "only a DICOMDIR": Bad(
        lambda root: directory_alone(root / "x"), "images are elsewhere", "x", named="x", verb="data show"
    ),
    "an archive without DICOM": Bad(archive("a.txt"), "holds no DICOM images", "a.zip", named="a.zip"),
    "an empty archive": Bad(archive(), "holds no DICOM images", "a.zip", named="a.zip"),
    "an archive that climbs": Bad(archive("../../a.dcm"), "outside", "a.zip", named="a.zip"),
    "a series of NIfTI": Bad(images(*PLAIN), "holds no DICOM series", "a.nii", named="a.nii", more=("--series", "3")),
    "DICOM SEG of NIfTI": Bad(
        images(*PLAIN), "refers to the slices", "a.nii", named="a.nii", more=(CHOICE, "dicom_seg")
    ),
    "RTSTRUCT of NIfTI": Bad(images(*PLAIN), "refers to the slices", named="a.nii", more=(CHOICE, "dicom_rtstruct")),
    "a split with a typo": Bad(split_folders, "no split 'tets': train, val, test", more=("--split", "tets")),
    "segmentations with a typo": Bad(
        images("a.nii", "a_seg.nii"), "has the segmentations seg", labels="sgm", named="sgm"
    ),
    "threads below none": Bad(
        images(*PLAIN), "give a number of CPU threads", named="--threads -2", more=("--threads", "-2")
    ),
    "windows that lap over themselves": Bad(
        images(*PLAIN), "the overlap of windows", named="--overlap 1.5", more=("--overlap", "1.5")
    ),
    "results over the images": Bad(
        images("a.nii.gz"), "would be overwritten", named="a.nii.gz", more=("--output", ".")
    ),
}
"""What is wrong -> how it is made, and what is said."""
