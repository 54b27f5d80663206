"""Small data sets with real voxels, named and laid out as those who share them do it.

The image of a case follows its labels, so that `follower` segments it without a fault: any voxel or class out of place
is seen in its Dice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import nrrd
import numpy as np
from onnx import numpy_helper

from dicoms import ORIENTATIONS, write_series
from networks import Builder
from ptq3d.datasets.btcv import BTCV_ORGANS
from ptq3d.datasets.totalsegmentator import MR_CLASSES, V1_CLASSES, V2_CLASSES
from ptq3d.datasets.whole_brain import BRAINCOLOR_IDS, WHOLE_BRAIN_NAMES
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.manifest import Manifest, embed
from ptq3d.volumes.preprocessing import Preprocessing

SHAPE = (24, 28, 10)  # a class of three fills 1000 voxels, and has a fidelity
WINDOW = (16, 24, 10)
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 1.5, 0, -30], [0, 0, 3.0, 11], [0, 0, 0, 1]])
STEP = 10  # of the image from class to class
NAMELESS = ("background", "first", "second")


def follower(path: Path, names: Sequence[str]) -> Path:
    """An ONNX network with its manifest that gives each voxel the class whose level is nearest."""
    levels, b = np.linspace(0, 1, len(names)), Builder()
    b.weights += [
        numpy_helper.from_array(values.astype(np.float32), name)
        for name, values in (
            ("same", np.ones((1, 1, 1, 1, 1))),
            ("slopes", 2 * levels[:, None, None, None, None]),  # the largest 2 c x - c^2 is that of the nearest c
            ("offsets", -(levels**2)),
        )
    ]
    b.add("Conv", b.add("Relu", b.add("Conv", "image", "same")), "slopes", "offsets")
    model = load_graph(b.save(path, "logits", len(names), WINDOW))
    rule = {"rule": "window", "low": 0.0, "high": float(STEP * (len(names) - 1))}
    embed(model, Manifest(tuple(names), WINDOW, Preprocessing(orientation="RAS", intensity=(rule,))))
    save_graph(model, path)
    return path


def classes_of(number: int, seed: int) -> np.ndarray:
    """(X, Y, Z) classes in blobs of 4 x 4 x 2 voxels, all of them present; other seeds, other places."""
    blobs = np.random.default_rng(seed).permutation(np.arange(6 * 7 * 5) % number)
    return np.kron(blobs.reshape(6, 7, 5), np.ones((4, 4, 2), np.int64))


def image_of(classes: np.ndarray, seed: int) -> np.ndarray:
    return (STEP * classes + np.random.default_rng(1000 + seed).integers(-3, 4, classes.shape)).astype(np.int16)


def volume(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".nrrd":
        header = {
            "space": "left-posterior-superior",
            "space directions": (np.diag([-1, -1, 1]) @ AFFINE[:3, :3]).T,
            "space origin": np.diag([-1, -1, 1]) @ AFFINE[:3, 3],
        }
        nrrd.write(str(path), data, header)
    else:
        nibabel.save(nibabel.Nifti1Image(data, AFFINE, dtype=data.dtype), path)


def case(root: Path, image: str, label: str | None, *, number: int, seed: int, ids: Sequence[int] = ()) -> None:
    """An image and its label map; `ids` are the values of the classes in the file."""
    classes = classes_of(number, seed)
    volume(root / image, image_of(classes, seed))
    if label is not None:
        values = np.asarray(ids or range(number))[classes]
        volume(root / label, values.astype(np.uint8))


def dumped(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def btcv_downloaded(root: Path) -> None:
    for seed in (1, 2):
        raw = "RawData/Training"
        case(root, f"{raw}/img/img{seed:04d}.nii.gz", f"{raw}/label/label{seed:04d}.nii.gz", number=14, seed=seed)
    case(root, "RawData/Testing/img/img0061.nii.gz", None, number=14, seed=61)


def btcv_listed(root: Path) -> None:
    """As MONAI's tutorials and the networks trained by them want it."""
    for seed in (1, 2, 35):
        case(root, f"imagesTr/img{seed:04d}.nii.gz", f"labelsTr/label{seed:04d}.nii.gz", number=14, seed=seed)
    items = [{"image": f"imagesTr/img{n:04d}.nii.gz", "label": f"labelsTr/label{n:04d}.nii.gz"} for n in (1, 2, 35)]
    labels = {str(index): name for index, name in enumerate(BTCV_ORGANS)}
    dumped(root / "dataset_0.json", {"name": "btcv", "labels": labels, "training": items[:2], "validation": items[2:]})


def btcv_seed(root: Path) -> None:
    for split, seed in (("train", 1), ("train", 2), ("test", 35)):
        image, label = f"{split}/images/img{seed:04d}.nii.gz", f"{split}/labels/label{seed:04d}.nii.gz"
        case(root, image, label, number=14, seed=seed)


def brains_beside(root: Path) -> None:
    """The ids of the protocol; with what it has and no class means."""
    for seed, name in enumerate(("1000_3", "1001_3")):
        ids = [0, *BRAINCOLOR_IDS]
        case(root, f"{name}.nii.gz", f"{name}_glm.nii.gz", number=133, seed=seed, ids=ids)


def brains_in_folders(root: Path) -> None:
    for seed, name in enumerate(("sub-02", "sub-03")):
        case(root, f"images/{name}.nii.gz", f"labels/{name}.nii.gz", number=133, seed=seed)


def subjects(names: Sequence[str], image: str = "ct.nii.gz", splits: Sequence[str] = ()) -> Callable[[Path], None]:
    """A folder a subject, a mask a class; the first subject has none of the last class."""

    def make(root: Path) -> None:
        for seed in (0, 1):
            present = names[: len(names) - 1 + seed]
            folder, classes = root / f"s{seed:04d}", classes_of(len(present), seed)
            volume(folder / image, image_of(classes, seed))
            for index, name in enumerate(present[1:], 1):
                volume(folder / "segmentations" / f"{name}.nii.gz", (classes == index).astype(np.uint8))
        if splits:
            rows = [f"s{seed:04d};60;f;S;CT ABDOMEN;{split};;" for seed, split in enumerate(splits)]
            header = "image_id;age;gender;institute;study_type;split;manufacturer;scanner_model"
            (root / "meta.csv").write_text("\n".join(["\ufeff" + header, *rows]) + "\n", encoding="utf-8")

    return make


SPLEEN = ("background", "spleen")


def decathlon(root: Path) -> None:
    for seed in (2, 3):
        case(root, f"imagesTr/spleen_{seed}.nii.gz", f"labelsTr/spleen_{seed}.nii.gz", number=2, seed=seed)
        (root / f"imagesTr/._spleen_{seed}.nii.gz").write_bytes(b"\0\5\x16\7")  # the archives hold these
    case(root, "imagesTs/spleen_1.nii.gz", None, number=2, seed=1)
    pairs = [{"image": f"./imagesTr/spleen_{n}.nii.gz", "label": f"./labelsTr/spleen_{n}.nii.gz"} for n in (2, 3)]
    dumped(
        root / "dataset.json",
        {
            "name": "Spleen",
            "description": "Spleen Segmentation",
            "reference": "Memorial Sloan Kettering Cancer Center",
            "licence": "CC-BY-SA 4.0",
            "release": "1.0 06/08/2018",
            "tensorImageSize": "3D",
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "spleen"},
            "numTraining": 2,
            "numTest": 1,
            "training": pairs,
            "test": ["./imagesTs/spleen_1.nii.gz"],
        },
    )


def nnunet(ending: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for part, seed in (("Tr", 2), ("Tr", 3), ("Ts", 1)):
            image, label = f"images{part}/spleen_{seed:03d}_0000{ending}", f"labels{part}/spleen_{seed:03d}{ending}"
            case(root, image, label, number=2, seed=seed)
        content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1}, "numTraining": 2}
        dumped(root / "dataset.json", {**content, "file_ending": ending})

    return make


TISSUES = ("background", "Gray Matter", "White Matter")


def bids(root: Path) -> None:
    for seed in (1, 2):
        name = f"sub-{seed:02d}"
        label = f"derivatives/manual_masks/{name}/anat/{name}_space-orig_dseg.nii.gz"
        case(root, f"{name}/anat/{name}_T1w.nii.gz", label, number=3, seed=seed)
    table = ["index\tname", *(f"{index}\t{name}" for index, name in enumerate(TISSUES))]
    (root / "derivatives/manual_masks/dseg.tsv").write_text("\n".join(table) + "\n")
    dumped(root / "dataset_description.json", {"Name": "Two", "BIDSVersion": "1.10.0", "DatasetType": "raw"})
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\n")


def csv_list(root: Path) -> None:
    for seed in (1, 2):
        case(root, f"scans/{seed}.nii.gz", f"truth/{seed}.nii.gz", number=3, seed=seed)
    rows = [
        "Name,Image,Label,Split,Age",
        "a,scans/1.nii.gz,truth/1.nii.gz,train,1",
        "b,scans/2.nii.gz,truth/2.nii.gz,test,",
    ]
    (root / "cases.csv").write_text("\n".join(rows) + "\n")


def json_list(root: Path) -> None:
    for seed in (1, 2):
        case(root, f"scans/{seed}.nii.gz", f"truth/{seed}.nii.gz", number=3, seed=seed)
    items = [{"image": f"scans/{seed}.nii.gz", "label": f"truth/{seed}.nii.gz"} for seed in (1, 2)]
    labels = {str(index): name for index, name in enumerate(NAMELESS)}
    dumped(root / "cases.json", {"labels": labels, "training": items[:1], "validation": items[1:]})


def split_folders(root: Path) -> None:
    for split, seed in (("train", 1), ("val", 2), ("test", 3)):
        case(root, f"{split}/images/c{seed}.nii.gz", f"{split}/labels/c{seed}.nii.gz", number=3, seed=seed)


def plain(root: Path) -> None:
    for seed in (1, 2):
        case(root, f"c{seed}.nii.gz", f"c{seed}_seg.nii.gz", number=3, seed=seed)


def dicom(root: Path) -> None:
    """Patient / study / series, and a folder of label maps named after the patients."""
    for seed in (1, 2):
        classes, affine = classes_of(3, seed), ORIENTATIONS["axial"]
        write_series(root / f"P{seed}/CT abdomen/3 portal", image_of(classes, seed) + np.int16(1024), affine)
        (root / "labels").mkdir(exist_ok=True)
        labels = nibabel.Nifti1Image(classes.astype(np.uint8), affine)
        nibabel.save(labels, root / f"labels/P{seed}.nii.gz")


@dataclass(frozen=True)
class Example:
    """One layout with voxels.

    Attributes:
        row: of `LAYOUTS`.
        told: how the layout names itself.
        make: writes it into a folder.
        splits: of its cases, in their order.
        names: of its classes; None where it does not name them.
        faults: what `SPOILINGS` of the tests can be wrong with it: only splits leak, only named classes have strangers.
        place: within the folder, what is given as the data.
        labels: likewise, as the labels.
        split: that `compare` is asked for, where the test split has no labels.
    """

    row: str
    told: str
    make: Callable[[Path], None]
    splits: tuple[str, ...]
    names: tuple[str, ...] | None
    faults: tuple[str, ...] = ("moved", "stranger")
    place: str = "."
    labels: str | None = None
    split: str | None = None

    def arguments(self, root: Path) -> list[str]:
        given = [str(root / self.place)]
        return given if self.labels is None else [*given, "--labels", str(root / self.labels)]


ALL = ("leak", "moved", "stranger")
TRAIN_TEST, NO_SPLITS = ("train", "train", "test"), ("", "")
BTCV, TOTAL = "BTCV", "TotalSegmentator"
EXAMPLES: dict[str, Example] = {
    "BTCV as downloaded": Example(BTCV, BTCV, btcv_downloaded, TRAIN_TEST, BTCV_ORGANS, ALL, split="train"),
    "BTCV with MONAI's list": Example(BTCV, BTCV, btcv_listed, ("train", "train", "val"), BTCV_ORGANS, ALL),
    "BTCV of the seed": Example(BTCV, BTCV, btcv_seed, TRAIN_TEST, BTCV_ORGANS, ALL),
    "brains with _glm beside": Example("whole brain", "whole brain", brains_beside, NO_SPLITS, WHOLE_BRAIN_NAMES),
    "brains in folders": Example("whole brain", "whole brain", brains_in_folders, NO_SPLITS, WHOLE_BRAIN_NAMES),
    "TotalSegmentator V2": Example(
        TOTAL, f"{TOTAL} V2", subjects(V2_CLASSES, splits=("train", "test")), ("train", "test"), V2_CLASSES, ALL[:2]
    ),
    "TotalSegmentator V1": Example(
        TOTAL, f"{TOTAL} V1", subjects(V1_CLASSES, splits=("train", "val")), ("train", "val"), V1_CLASSES, ALL[:2]
    ),
    "TotalSegmentator MR": Example(
        TOTAL, f"{TOTAL} MR", subjects(MR_CLASSES, "mri.nii.gz"), NO_SPLITS, MR_CLASSES, ("moved",)
    ),
    "Decathlon": Example(
        "Medical Segmentation Decathlon",
        "Medical Segmentation Decathlon",
        decathlon,
        TRAIN_TEST,
        SPLEEN,
        ALL,
        split="train",
    ),
    "nnU-Net in NIfTI": Example("nnU-Net raw", "nnU-Net raw", nnunet(".nii.gz"), TRAIN_TEST, SPLEEN, ALL),
    "nnU-Net in NRRD": Example("nnU-Net raw", "nnU-Net raw", nnunet(".nrrd"), TRAIN_TEST, SPLEEN, ALL),
    "BIDS with derivatives": Example("BIDS", "BIDS", bids, NO_SPLITS, TISSUES),
    "a table": Example("list of cases", "list of cases", csv_list, ("train", "test"), None, ALL[:2], "cases.csv"),
    "a JSON list": Example("list of cases", "list of cases", json_list, ("train", "val"), NAMELESS, ALL, "cases.json"),
    "folders by split": Example(
        "folders of images and labels",
        "folders of images and labels",
        split_folders,
        ("train", "val", "test"),
        None,
        ALL[:2],
    ),
    "labels beside": Example("folder", "folder", plain, NO_SPLITS, None, ("moved",)),
    "DICOM by patient": Example("DICOM", "DICOM", dicom, NO_SPLITS, None, ("moved",), labels="labels"),
}
"""Every layout at least once."""
