"""The command line as a user meets it: the whole flow on a tiny network, and bad input in one clear sentence."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch

from networks import NETWORKS, WINDOW, windows
from ptq3d.cli import main
from ptq3d.engines import BACKENDS, load_backend
from ptq3d.quantization.calibration import save_windows

RULES = '[[intensity]]\nrule = "window"\nlow = 0.0\nhigh = 1.0\n'
AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0])


def write_volume(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@dataclass(frozen=True)
class Bench:
    """A tiny network with its data, as a user would lay them out."""

    root: Path
    onnx: Path
    rules: Path
    images: Path
    labels: Path

    def deploy(self, **changed: object) -> int:
        given = {
            "model": self.onnx,
            "data": self.images,
            "labels": self.labels,
            "preprocessing": self.rules,
            "output": self.root / "out",
        }
        given.update(changed)
        return main(
            [
                "deploy",
                *(part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))),
            ]
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    network = NETWORKS["meshnet"](tmp_path / "net.onnx")
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES)
    images = windows(2, seed=5, shape=(13, 15, 11))
    for index, image in enumerate(images):
        write_volume(tmp_path / f"images/img{index:04d}.nii.gz", image)
        write_volume(tmp_path / f"labels/label{index:04d}.nii.gz", np.digitize(image, [0.3, 0.5, 0.7]).astype(np.uint8))
    return Bench(tmp_path, network, rules, tmp_path / "images", tmp_path / "labels")


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error, which is all that stderr may hold but warnings."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1, lines
    return lines[0]


def test_the_whole_flow(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Foreign ONNX + TOML -> calibrate -> quantize -> build -> deploy -> compare -> inspect; the INT8 file needs no TOML."""
    root = bench.root
    calibration, int8, engine = root / "calib.npz", root / "net_int8.onnx", root / "engine"
    x, y, z = map(str, WINDOW)
    assert main(["calibrate", "--data", str(bench.images), "--window", x, y, z, "--preprocessing", str(bench.rules),
                 "--number", "6", "--output_path", str(calibration), "--report", str(root / "c.json")]) == 0  # fmt: skip
    assert json.loads((root / "c.json").read_text())["windows"] == 6
    assert main(["quantize", "--onnx_path", str(bench.onnx), "--quantize_mode", "int8", "--calibration_data", str(calibration),
                 "--calibration_method", "max", "--output_path", str(int8), "--high_precision_dtype", "fp32",
                 "--preprocessing", str(bench.rules)]) == 0  # fmt: skip
    assert main(["build", "--onnx-path", str(int8), "--output", str(engine), "--engine", "openvino"]) == 0
    assert main(["deploy", "--model", str(engine), "--data", str(bench.images), "--labels", str(bench.labels),
                 "--output", str(root / "out"), "--report", str(root / "d.json")]) == 0  # fmt: skip
    report = json.loads((root / "d.json").read_text())
    assert [case["case"] for case in report["cases"]] == ["img0000", "img0001"]
    for index in range(2):
        written = nib.load(root / f"out/img{index:04d}.nii.gz")
        original = nib.load(bench.images / f"img{index:04d}.nii.gz")
        assert written.shape == original.shape
        np.testing.assert_array_equal(written.affine, original.affine)
        assert np.issubdtype(written.get_data_dtype(), np.integer)
        assert set(np.unique(written.dataobj)) <= set(range(4))
    assert main(["compare", str(bench.onnx), str(engine), f"{bench.onnx}@torch", "--data", str(bench.images), "--labels",
                 str(bench.labels), "--preprocessing", str(bench.rules),
                 "--repetitions", "3", "--report", str(root / "r.json")]) == 0  # fmt: skip
    rows = json.loads((root / "r.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8", "fp32"]
    assert [row["int8_mac_share"] for row in rows] == [0, pytest.approx(1, abs=0.05), 0]  # a thin layer may leave INT8
    for row in rows:
        whole = sum(layer["macs"] for layer in row["layers"])
        integer = sum(layer["macs"] for layer in row["layers"] if layer["precision"] == "int8")
        assert row["int8_mac_share"] == pytest.approx(integer / whole)
    assert rows[0]["fidelity"] == 1
    assert rows[2]["fidelity"] > 0.999
    assert rows[1]["size_bytes"] == sum((engine / name).stat().st_size for name in ("model.xml", "model.bin"))
    for row in rows:
        assert {"median", "p5", "p95", "n"} <= set(row["window_latency_ms"])
        assert row["window_latency_ms"]["n"] == 3
        assert row["peak_memory_bytes"] > 50e6
        assert row["case_seconds"] > 0
        assert 0 <= row["mean_dice"] <= 1
    for path in (bench.onnx, int8, engine, None):
        assert main(["inspect", *([str(path)] if path else []), "--report", str(root / "i.json")]) == 0
    assert "openvino" in json.loads((root / "i.json").read_text())
    assert "img0000" in capsys.readouterr().out


def test_deploy_on_an_onnx_builds_once_and_reuses(bench: Bench, cache: Path) -> None:
    assert bench.deploy(output=bench.root / "a") == 0
    built = sorted(cache.glob("*/model.bin"), key=lambda path: path.stat().st_mtime)[-1]
    stamp = built.stat().st_mtime_ns
    assert bench.deploy(output=bench.root / "b") == 0
    assert built.stat().st_mtime_ns == stamp


def test_engines_give_the_same_labels(bench: Bench) -> None:
    answers = []
    for engine in ("openvino", "onnxruntime", "torch", "reference"):
        assert bench.deploy(engine=engine, output=bench.root / engine) == 0
        answers.append(np.asarray(nib.load(bench.root / engine / "img0000.nii.gz").dataobj))
    for other in answers[1:]:
        assert (other == answers[0]).mean() > 0.999


def test_a_changed_byte_of_an_engine_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    engine = bench.root / "engine"
    assert main(["build", "--onnx-path", str(bench.onnx), "--output", str(engine)]) == 0
    weights = bytearray((engine / "model.bin").read_bytes())
    weights[10] ^= 1
    (engine / "model.bin").write_bytes(weights)
    capsys.readouterr()
    assert bench.deploy(model=engine) == 2
    assert "was changed since the engine was built" in sentence(capsys)


def test_calibration_cases_among_the_test_cases_are_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    int8 = bench.root / "int8.onnx"
    assert main(["calibrate", "--data", str(bench.images), "--window", *map(str, WINDOW), "--preprocessing", str(bench.rules),
                 "--output", str(bench.root / "c.npz"), "--test-data", str(bench.images)]) == 0  # fmt: skip
    assert capsys.readouterr().err.count("is also in the test folder") == 2
    assert main(["quantize", "--onnx-path", str(bench.onnx), "--calibration-data", str(bench.root / "c.npz"), "--output", str(int8),
                 "--preprocessing", str(bench.rules)]) == 0  # fmt: skip
    capsys.readouterr()
    assert bench.deploy(model=int8, preprocessing=None) == 0
    assert capsys.readouterr().err.count("was used to calibrate this engine") == 2


def truncated(bench: Bench) -> None:
    path = bench.images / "img0000.nii.gz"
    path.write_bytes(path.read_bytes()[:600])


def with_nan(bench: Bench) -> None:
    data = windows(1, shape=(13, 15, 11))[0]
    data[1, 2, 3] = np.nan
    write_volume(bench.images / "img0000.nii.gz", data)


def singular(bench: Bench) -> None:
    image = nib.Nifti1Image(windows(1, shape=(13, 15, 11))[0], None)
    image.header.set_sform(np.diag([0.0, 2.0, 2.0, 1.0]), code=1)
    image.header.set_qform(None, code=0)
    nib.save(image, bench.images / "img0000.nii.gz")


def zero_spacing(bench: Bench) -> None:
    image = nib.Nifti1Image(windows(1, shape=(13, 15, 11))[0], np.eye(4))
    header = bytearray(image.to_bytes())
    header[80:84] = np.float32(0).tobytes()  # pixdim[1]
    header[252:256] = np.asarray([1, 0], np.int16).tobytes()  # qform only
    (bench.images / "img0000.nii.gz").unlink()
    (bench.images / "img0000.nii").write_bytes(bytes(header))


DATA_FAULTS: dict[str, tuple[Callable[[Bench], object], str]] = {
    "image without label": (lambda b: (b.labels / "label0001.nii.gz").unlink(), "img0001"),
    "labels outside the classes": (
        lambda b: write_volume(b.labels / "label0000.nii.gz", np.full((13, 15, 11), 9, np.uint8)),
        "9",
    ),
    "2D file": (lambda b: write_volume(b.images / "img0000.nii.gz", np.zeros((13, 15), np.float32)), "img0000"),
    "4D file": (lambda b: write_volume(b.images / "img0000.nii.gz", np.zeros((5, 6, 7, 3), np.float32)), "img0000"),
    "truncated": (truncated, "img0000"),
    "NaN": (with_nan, "NaN"),
    "singular affine": (singular, "img0000"),
    "zero spacing": (zero_spacing, "img0000"),
    "label on another grid": (
        lambda b: write_volume(b.labels / "label0000.nii.gz", np.zeros((13, 15, 12), np.uint8)),
        "label0000",
    ),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_data_is_one_sentence_exit_2_and_no_output_while_the_other_case_goes_on(
    fault: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, named = DATA_FAULTS[fault]
    break_it(bench)
    assert bench.deploy() == 2
    assert named in sentence(capsys)
    written = {path.name for path in (bench.root / "out").glob("*")}
    assert written == (set() if fault == "image without label" else {"img0001.nii.gz"})


def test_missing_and_empty_folders(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.root / "empty").mkdir()
    for place in ("nowhere", "empty"):
        assert bench.deploy(data=bench.root / place) == 2
        assert place in sentence(capsys)
    assert bench.deploy(model=bench.root / "nowhere.onnx") == 2
    assert "no such ONNX file" in sentence(capsys)
    assert not (bench.root / "out").exists()


def test_wrong_channels(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(bench.onnx)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.save(model, bench.root / "two.onnx")
    assert bench.deploy(model=bench.root / "two.onnx") == 2
    assert sentence(capsys)
    two = torch.nn.Conv3d(2, 4, 3, padding=1)
    from ptq3d.graphs.export import export_network
    from ptq3d.graphs.files import save_graph

    save_graph(export_network(two, channels=2, window=WINDOW).model, bench.root / "two.onnx")
    assert bench.deploy(model=bench.root / "two.onnx") == 2
    assert "takes 2 channels, the volume has 1" in sentence(capsys)
    assert not (bench.root / "out").exists()


def test_nothing_says_how_to_prepare(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.deploy(preprocessing=None) == 2
    assert "--preprocessing" in sentence(capsys)
    assert bench.deploy(preprocessing="nonsense") == 2
    assert "neither a preset" in sentence(capsys)


def test_engines_that_do_not_exist_or_do_not_fit(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for changed, named in (
        ({"engine": "tensorflow"}, "no engine"),
        ({"device": "NPU"}, "NPU"),
        ({"overlap": 1.0}, "overlap"),
    ):
        assert bench.deploy(**changed) == 2
        assert named in sentence(capsys)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (pickle.loads, (b"",))


CALIBRATION_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another shape": (lambda p: np.save(p, np.zeros((2, 1, 8, 8, 8), np.float32)), r"(1, 8, 8, 8)"),
    "no batch axis": (lambda p: np.save(p, np.zeros(WINDOW, np.float32)), "shape"),
    "no window": (lambda p: np.save(p, np.zeros((0, 1, *WINDOW), np.float32)), "0 windows"),
    "NaN": (lambda p: np.save(p, np.full((1, 1, *WINDOW), np.nan, np.float32)), "NaN"),
    "pickled objects": (lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True), "pickled"),
    "a bare pickle": (lambda p: p.write_bytes(pickle.dumps([1, 2])), "pickled"),
    "truncated": (lambda p: p.write_bytes(b"\x93NUMPY\x01"), "readable"),
}


@pytest.mark.parametrize("fault", CALIBRATION_FAULTS)
def test_bad_calibration_files(fault: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    write, named = CALIBRATION_FAULTS[fault]
    write(bench.root / "calib.npy")
    output = bench.root / "int8.onnx"
    assert (
        main(
            [
                "quantize",
                "--onnx-path",
                str(bench.onnx),
                "--calibration-data",
                str(bench.root / "calib.npy"),
                "--output",
                str(output),
            ]
        )
        == 2
    )
    assert named in sentence(capsys)
    assert not output.exists()
    assert not list(bench.root.glob(".*part*"))


def test_bad_checkpoints(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": Harmful()}, bench.root / "harmful.pth")
    torch.save({"model_state_dict": torch.nn.Conv3d(1, 2, 3).state_dict()}, bench.root / "other.pth")
    (bench.root / "half.pth").write_bytes((bench.root / "other.pth").read_bytes()[:200])
    for name, named in (
        ("harmful", "needs code"),
        ("other", "another network"),
        ("half", "half.pth"),
        ("none", "no such"),
    ):
        output = bench.root / "exported.onnx"
        assert (
            main(["export", "--checkpoint", str(bench.root / f"{name}.pth"), "--net", "unet", "--output", str(output)])
            == 2
        )
        assert named in sentence(capsys)
        assert not output.exists()


def test_modelopt_flags_that_mean_something_else_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(bench.root / "c.npy", windows(1))
    for flag, value in (
        ("--quantize_mode", "int4"),
        ("--target", "toaster"),
        ("--keep", "nothing*"),
    ):
        given = [
            "quantize",
            "--onnx_path",
            str(bench.onnx),
            "--calibration_data",
            str(bench.root / "c.npy"),
            flag,
            value,
        ]
        assert main([*given, "--output", str(bench.root / "q.onnx")]) == 2
        assert value in sentence(capsys)
        assert not (bench.root / "q.onnx").exists()


def test_the_image_itself_is_never_overwritten(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before = (bench.images / "img0000.nii.gz").read_bytes()
    assert bench.deploy(output=bench.images) == 2
    assert "overwritten" in sentence(capsys)
    assert (bench.images / "img0000.nii.gz").read_bytes() == before


def test_import_and_help_are_light() -> None:
    """`import ptq3d` and `ptq3d --help` load no heavy library; help answers in well under half a second."""
    heavy = ["torch", "openvino", "monai", "lightning", "onnx", "onnxruntime", "nibabel", "matplotlib", "numpy"]
    code = f"import ptq3d, ptq3d.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    start = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-m", "ptq3d.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert time.perf_counter() - start < 5  # the figure itself is in the README; here only: nothing heavy is loaded
    for verb in (
        "train",
        "export",
        "calibrate",
        "quantize",
        "build",
        "deploy",
        "compare",
        "evaluate",
        "inspect",
        "demo",
    ):
        assert verb in shown


def test_public_names_exist_and_are_sorted() -> None:
    import ptq3d

    assert list(ptq3d.__all__) == sorted(ptq3d.__all__)
    for name in ptq3d.__all__:
        assert getattr(ptq3d, name) is not None


def test_peak_memory_is_the_processes_own() -> None:
    """A child of a large process must not inherit its peak."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from ptq3d.compare import peak_memory_bytes

    large = np.ones(60_000_000)
    assert peak_memory_bytes() > large.nbytes
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(peak_memory_bytes).result() < large.nbytes


@pytest.mark.parametrize("option", ["--report", "--csv"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "r.json"):
        given = ["evaluate", str(tmp_path / "nowhere"), "--labels", str(tmp_path / "nowhere"), option, str(path)]
        assert main(given) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert "cannot be written" in error
        assert error.count("\n") == 1


def test_a_calibration_file_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    windows = [np.full((1, 4, 5, 6), value, np.float32) for value in range(3)]
    save_windows(tmp_path / "c.npz", windows, 3, {"case_1": "ab" * 32})
    assert main(["inspect", str(tmp_path / "c.npz"), "--report", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["kind"], report["windows"], report["shape"]) == ("calibration", 3, [1, 4, 5, 6])
    assert report["cases"] == {"case_1": "ab" * 32}


@pytest.mark.parametrize("name", ["a.nii.gz", "study.zip"])
def test_a_volume_is_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).touch()
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert "look at it with `ptq3d data show`" in capsys.readouterr().err


def test_inspect_without_a_file_says_of_every_engine_whether_it_is_here_and_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ptq3d.engines.inductor.unavailable", lambda: "no compiler; mend it with: apt install g++")
    assert main(["inspect"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip())
    assert list(told) == list(BACKENDS)
    for name, line in told.items():
        reason = load_backend(name).unavailable()
        assert line.rstrip() == (
            f"available, version {load_backend(name).version()}" if reason is None else f"not available: {reason}"
        )
