"""A checked data set says what is wrong with it, and only that."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ptq3d import checking
from ptq3d.checking import CaseFacts, Checked, Problem, case_facts, check_dataset
from ptq3d.datasets.cases import Case
from ptq3d.datasets.dataset import Dataset
from ptq3d.datasets.label_map import LabelMap

ORGANS = LabelMap.identity(("background", "liver", "spleen"))
SHAPE = (6, 7, 8)


def written(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine, dtype=voxels.dtype), path)
    return path


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def labels(seed: int, high: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, SHAPE).astype(np.uint8)


def made(root: Path, number: int = 4) -> list[Case]:
    """Sound cases, the first half to train on."""
    return [
        Case(
            f"c{index}",
            (written(root / "images" / f"c{index}.nii.gz", image(index)),),
            written(root / "labels" / f"c{index}.nii.gz", labels(index)),
            "train" if index < number // 2 else "test",
        )
        for index in range(number)
    ]


def checked(root: Path, cases: list[Case], label_map: LabelMap | None = ORGANS) -> Checked:
    return check_dataset(Dataset("folder", root, tuple(cases), label_map))


def test_a_sound_set_has_no_problem_and_is_described(tmp_path: Path) -> None:
    found = checked(tmp_path, made(tmp_path))
    assert found.problems == ()
    assert found.errors == 0
    first = found.cases[0]
    assert (first.shape, first.spacing, first.orientation, first.channels) == (SHAPE, (1.0, 1.0, 1.0), "RAS", 1)
    assert first.intensity == (float(image(0).min()), float(image(0).max()))
    assert dict(first.values) == {value: int((labels(0) == value).sum()) for value in range(3)}
    assert len({case.content for case in found.cases}) == 4


def test_many_cases_are_read_in_processes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = made(tmp_path, 10)
    monkeypatch.setattr(checking, "_cores", lambda: 2)
    parent = os.getpid()
    monkeypatch.setattr(checking, "case_facts", partial(_refuse_in, parent))
    steps: list[tuple[int, int]] = []
    dataset = Dataset("folder", tmp_path, tuple(cases), ORGANS)
    found = check_dataset(dataset, progress=lambda done, total: steps.append((done, total)))
    assert found.cases == tuple(case_facts(case, label_map=ORGANS) for case in cases)
    assert steps == [(done, 10) for done in range(1, 11)]


def _refuse_in(parent: int, case: Case, *, label_map: LabelMap | None = None) -> CaseFacts:
    """`case_facts`, anywhere but in one process."""
    if os.getpid() == parent:
        raise AssertionError("read in the process that asked")
    return case_facts(case, label_map=label_map)


def test_the_same_voxels_elsewhere_are_another_image_and_a_signed_zero_is_not(tmp_path: Path) -> None:
    moved, nearly = np.eye(4), np.eye(4)
    moved[0, 3], nearly[0, 3] = 5.0, -1e-7
    content = [
        case_facts(Case("c", (written(tmp_path / f"{number}.nii", image(1), affine),))).content
        for number, affine in enumerate((np.eye(4), moved, nearly))
    ]
    assert content[0] == content[2] != content[1]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def shifted(path: Path) -> None:
    written(path, labels(1), np.array([[1, 0, 0, 1.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


def flipped(path: Path) -> None:
    written(path, labels(1), np.diag([-1.0, 1, 1, 1]))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str, str, str]] = {
    "truncated image": ("images", truncated, "error", "unreadable", "truncated"),
    "missing image": ("images", lambda path: path.unlink(), "error", "unreadable", "no such file"),
    "NaN": ("images", lambda path: written(path, np.full(SHAPE, np.nan, np.float32)), "error", "unreadable", "NaN"),
    "truncated labels": ("labels", truncated, "error", "unreadable", "truncated"),
    "labels of another shape": ("labels", lambda path: written(path, labels(1)[1:]), "error", "grid", "voxels but its image"),
    "labels moved": ("labels", shifted, "error", "grid", "1 voxels beside its image"),
    "labels flipped": ("labels", flipped, "error", "grid", "beside its image"),
    "labels of no class": ("labels", lambda path: written(path, labels(1, 9)), "error", "labels", "3, 4, 5, 6, 7 and 1 more"),
    "labels that are no whole numbers": (
        "labels", lambda path: written(path, labels(1) * np.float32(0.5)), "error", "labels", "not whole numbers",
    ),
    "constant image": ("images", lambda path: written(path, np.full(SHAPE, 7, np.int16)), "warning", "constant", "all voxels"),
    "no label": ("labels", lambda path: written(path, np.zeros(SHAPE, np.uint8)), "warning", "empty", "background only"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_case_is_said_of_that_case(tmp_path: Path, fault: str) -> None:
    folder, spoil, severity, kind, text = FAULTS[fault]
    cases = made(tmp_path)
    spoil(tmp_path / folder / "c1.nii.gz")
    found = checked(tmp_path, cases)
    (problem,) = found.problems
    assert (problem.case, problem.severity, problem.kind) == ("c1", severity, kind)
    assert text in problem.text
    assert "\n" not in problem.text
    assert found.errors == (severity == "error")


def test_a_spacing_far_from_the_others_is_named_in_any_orientation(tmp_path: Path) -> None:
    cases = made(tmp_path, 6)
    thick = np.diag([1.0, 1.0, 4.0, 1.0])
    written(tmp_path / "images/c4.nii.gz", image(4), thick[:, [2, 1, 0, 3]])  # the thick axis is stored first
    written(tmp_path / "labels/c4.nii.gz", labels(4), thick[:, [2, 1, 0, 3]])
    (problem,) = checked(tmp_path, cases).problems
    assert (problem.case, problem.severity, problem.kind) == ("c4", "warning", "spacing")
    assert "1 x 1 x 4 mm" in problem.text


def test_the_same_image_in_two_splits_is_a_leak_whatever_its_file(tmp_path: Path) -> None:
    cases = made(tmp_path)
    plain = gzip.decompress((tmp_path / "images/c0.nii.gz").read_bytes())
    (tmp_path / "images/c3.nii").write_bytes(plain)
    cases[3] = Case("c3", (tmp_path / "images/c3.nii",), cases[3].labels, "test")
    (problem,) = checked(tmp_path, cases).problems
    assert (problem.severity, problem.kind) == ("error", "leak")
    assert "c0 (train), c3 (test)" in problem.text


def test_the_same_image_twice_in_a_split_is_a_warning(tmp_path: Path) -> None:
    cases = made(tmp_path)
    cases[1] = Case("again", cases[0].images, cases[1].labels, "train")
    (problem,) = checked(tmp_path, cases).problems
    assert (problem.severity, problem.kind) == ("warning", "duplicate")


def test_a_case_that_lacks_a_channel_is_named(tmp_path: Path) -> None:
    cases = made(tmp_path)
    more = [written(tmp_path / f"more{index}.nii", image(20 + index)) for index in range(4)]
    cases = [Case(c.name, (*c.images, extra), c.labels, c.split) for c, extra in zip(cases, more, strict=True)]
    cases[2] = Case("c2", cases[2].images[:1], cases[2].labels, "test")
    (problem,) = checked(tmp_path, cases).problems
    assert (problem.case, problem.kind) == ("c2", "channels")


def test_channels_that_lie_apart_are_refused(tmp_path: Path) -> None:
    other = written(tmp_path / "b.nii", image(2), np.diag([1.0, 1.0, -1.0, 1.0]))
    found = case_facts(Case("c", (written(tmp_path / "a.nii", image(1)), other)))
    assert [problem.kind for problem in found.problems] == ["grid"]


def test_classes_that_never_occur_are_named(tmp_path: Path) -> None:
    names = LabelMap.identity(("background", "liver", "spleen", "pancreas", "aorta"))
    assert checked(tmp_path, made(tmp_path), names).problems == (
        Problem("", "warning", "absent", "2 of 4 classes occur in no label map: pancreas, aorta."),
    )


def test_values_that_a_map_sends_to_background_are_no_error(tmp_path: Path) -> None:
    ids = LabelMap(("background", "organ"), {2: 1}, others=0)
    assert checked(tmp_path, made(tmp_path), ids).problems == ()


def test_without_names_any_whole_number_is_a_label(tmp_path: Path) -> None:
    cases = made(tmp_path)
    written(tmp_path / "labels/c1.nii.gz", labels(1, 200))
    assert checked(tmp_path, cases, None).problems == ()
