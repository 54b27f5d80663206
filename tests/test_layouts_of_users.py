"""`data show`, `data check` and `compare` on small data sets in every layout, byte for byte as they are shared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest

from laid_out import EXAMPLES, NAMELESS, SHAPE, WINDOW, Example, follower
from ptq3d import compare
from ptq3d.cli import main
from ptq3d.datasets.cases import Case
from ptq3d.datasets.layouts import LAYOUTS, open_dataset
from ptq3d.graphs.files import save_graph
from ptq3d.manifest import embed, embedded
from ptq3d.quantization import qdq
from quantizing import FAST, graph, planned

NAMES = list(EXAMPLES)


def test_every_layout_has_an_example() -> None:
    assert {example.row for example in EXAMPLES.values()} == set(LAYOUTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An example's folder, written once and not to be changed."""

    @cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp("set")
        EXAMPLES[name].make(root)
        return root

    return make


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """A network of these classes that segments the examples without a fault."""
    folder = tmp_path_factory.mktemp("networks")
    return cache(lambda names: follower(folder / f"net{len(names)}_{names[-1]}.onnx", names))


def report(arguments: list[str], path: Path) -> dict:
    """What a verb that succeeds reports."""
    assert main([*arguments, "--report", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_shown(
    name: str, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[name]
    found = report(["data", "show", *example.arguments(made(name))], tmp_path / "r.json")
    assert found["layout"] == example.told
    assert [case["split"] for case in found["cases"]] == list(example.splits)
    assert found["classes"] == (None if example.names is None else list(example.names))
    assert all(Path(label).is_file() for case in found["cases"] for label in case["labels"])
    assert_told(example, capsys.readouterr().out)


def assert_told(example: Example, shown: str) -> None:
    line = shown.splitlines()[0]
    assert line.startswith(f"{example.told} (")
    assert f"): {len(example.splits)} cases" in line
    assert "labels" in line
    assert ("classes" in line) == (example.names is not None)
    if example.names is not None:
        assert f"labels of {len(example.names)} classes" in line


@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_sound(
    name: str, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[name]
    found = report(["data", "check", *example.arguments(made(name))], tmp_path / "r.json")
    assert found["layout"] == example.told
    assert found["problems"] == []
    assert [case["split"] for case in found["cases"]] == list(example.splits)
    assert all(case["shape"] == list(SHAPE) for case in found["cases"])
    labelled = [case for case in found["cases"] if case["values"]]
    assert len(labelled) >= 2
    if example.names is not None:
        present = {value for case in labelled for value in case["values"]}
        assert len(present) == len(example.names)
    captured = capsys.readouterr()
    assert_told(example, captured.out)
    assert captured.out.splitlines()[-1] == f"{len(example.splits)} cases read, 0 errors, 0 warnings"
    assert captured.err == ""


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process an engine is there for the peak of its memory alone, and takes seconds to start."""
    monkeypatch.setattr(compare, "_segment_apart", compare._segment)


def compared(models: list[str], data: list[str], folder: Path) -> list[dict]:
    arguments = ["compare", *models, "--data", *data, "--repetitions", "1", "--threads", "1"]
    return report(arguments, folder / "r.json")["rows"]


@pytest.mark.parametrize("name", NAMES)
def test_engines_are_compared_on_it(
    name: str,
    made: Callable[[str], Path],
    network: Callable[[tuple[str, ...]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the data set names its classes, the data alone are enough for Dice; every voxel is in its place."""
    in_this_process(monkeypatch)
    example = EXAMPLES[name]
    net = network(example.names or NAMELESS)
    more = [] if example.split is None else ["--split", example.split]
    rows = compared([f"{net}@openvino", f"{net}@torch"], [str(made(name) / example.place), *more], tmp_path)
    expected = None if example.names is None else 1.0
    assert [row["mean_dice"] for row in rows] == [expected, expected]
    small = len(example.names or NAMELESS) > 3  # no class of so many fills 1000 voxels
    assert [row["fidelity"] for row in rows] == ([None, None] if small else [1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "labels"),
    [("DICOM by patient", "{root}/labels"), ("labels beside", "seg"), ("folders by split", "{root}/val/labels")],
)
def test_labels_that_are_asked_for_give_dice_where_nothing_names_the_classes(
    name: str,
    labels: str,
    made: Callable[[str], Path],
    network: Callable[[tuple[str, ...]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_this_process(monkeypatch)
    root = made(name)
    data = root / "val/images" if name == "folders by split" else root
    rows = compared([f"{network(NAMELESS)}@torch"], [str(data), "--labels", labels.format(root=root)], tmp_path)
    assert rows[0]["mean_dice"] == 1.0


def test_int8_is_compared_on_it_in_a_process_of_its_own(
    made: Callable[[str], Path], network: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    example = EXAMPLES["BTCV of the seed"]
    net = network(example.names or ())
    model = graph(net)
    rises = np.linspace(0, 1, int(np.prod(WINDOW)), dtype=np.float32).reshape(1, 1, *WINDOW)
    quantized = qdq.write(model, planned(model, images=[rises]))
    manifest = embedded(model, where=net)
    assert manifest is not None
    embed(quantized, manifest)
    save_graph(quantized, tmp_path / "int8.onnx")
    models = [f"{net}@{FAST}", f"{tmp_path / 'int8.onnx'}@{FAST}"]
    first, second = compared(models, [str(made("BTCV of the seed"))], tmp_path)
    assert (first["precision"], first["mean_dice"], second["precision"]) == ("fp32", 1.0, "int8")
    assert second["mean_dice"] is not None
    assert second["dice_change"]["mean"] == pytest.approx(second["mean_dice"] - 1)


def rewritten(path: Path, change: Callable[[np.ndarray], None] = lambda data: None, moved: int = 0) -> None:
    """A volume file with other voxels, or moved by whole voxels along its first axis."""
    if path.suffix == ".nrrd":
        data, header = nrrd.read(str(path))
        change(data)
        header["space origin"] = header["space origin"] + moved * header["space directions"][0]
        nrrd.write(str(path), data, header)
        return
    image = nibabel.load(path)
    data, affine = np.asarray(image.dataobj).copy(), image.affine.copy()
    change(data)
    affine[:3, 3] += moved * affine[:3, 0]
    nibabel.save(nibabel.Nifti1Image(data, affine, dtype=data.dtype), path)


def leak(cases: tuple[Case, ...]) -> Case:
    """The image of the first case is also that of the last, which is in another split."""
    shutil.copy(str(cases[0].images[0]), str(cases[-1].images[0]))
    return cases[0]


def moved(cases: tuple[Case, ...]) -> Case:
    rewritten(cases[1].label_files[-1], moved=1)
    return cases[1]


def stranger(cases: tuple[Case, ...]) -> Case:
    """A value outside the classes in a single voxel."""

    def change(data: np.ndarray) -> None:
        data[3, 4, 5] = 250

    rewritten(cases[1].label_files[0], change)
    return cases[1]


SPOILINGS: dict[str, tuple[Callable[[tuple[Case, ...]], Case], str, str]] = {
    "leak": (leak, "leak", "hold the same image in different splits"),
    "moved": (moved, "grid", "1 voxels beside"),
    "stranger": (stranger, "labels", "holds values 250 that belong to none of the"),
}
FAULTS = [(name, fault) for name, example in EXAMPLES.items() for fault in example.faults]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_what_is_wrong_with_it_is_found(
    name: str, fault: str, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, root = EXAMPLES[name], tmp_path / "set"
    shutil.copytree(made(name), root)
    labels = None if example.labels is None else root / example.labels
    spoil, kind, text = SPOILINGS[fault]
    case = spoil(open_dataset(root / example.place, labels).cases)
    assert main(["data", "check", *example.arguments(root), "--report", str(tmp_path / "r.json")]) == 2
    errors = [one for one in json.loads((tmp_path / "r.json").read_text())["problems"] if one["severity"] == "error"]
    assert [(one["case"], one["kind"]) for one in errors] == [(case.name, kind)]
    assert text in errors[0]["text"]
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    counts = f"{len(example.splits)} cases read, 1 error in {case.name}, "
    assert line.startswith(f"FileError: {root / example.place} is not fit for use: {counts}")
