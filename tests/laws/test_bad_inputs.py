"""Whatever is wrong with the data, the command line says it in one line that names the place, with exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from bad_sets import BAD_SETS, image
from broken_series import BROKEN, huge, huge_compressed, series
from broken_volumes import BAD, NAMES, made
from laid_out import NAMELESS, follower
from ptq3d import errors
from ptq3d.cli import main

FILES = {f"a volume: {kind}": kind for kind in BAD}
SERIES = {
    f"DICOM: {kind}": kind for kind in BROKEN if kind not in ("two patients", "two series")
}  # two places are two cases
KINDS = (*FILES, *SERIES, *BAD_SETS)
LONGEST = 700
NOT_FOUND = "no such file or folder|no images in this folder"
TYPES = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.InputError)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return follower(tmp_path_factory.mktemp("network") / "net.onnx", NAMELESS)


@pytest.fixture
def deploy(network: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*data: str) -> int:
        given = ["deploy", "--model", str(network), "--engine", "torch", "--threads", "1"]
        return main([*given, "--output", str(tmp_path / "out"), "--data", *data])

    return run


def refused(capsys: pytest.CaptureFixture[str], *, named: str, message: str) -> str:
    """The one line of an error, which names what it is about."""
    lines = [line for line in capsys.readouterr().err.split("\n") if line and not line.startswith("WARNING: ")]
    assert len(lines) == 1, lines
    kind, _, told = lines[0].partition(": ")
    assert kind in TYPES
    assert named in told
    assert re.search(message, told)
    assert len(lines[0]) < LONGEST
    assert "Traceback" not in told
    return told


def nothing_is_written(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_there_are_many_kinds() -> None:
    assert len(set(KINDS)) == len(FILES) + len(SERIES) + len(BAD_SETS)
    assert len(BAD_SETS) >= 40
    assert len(FILES) >= 40
    assert len(SERIES) >= 50


@pytest.mark.parametrize("kind", FILES)
def test_of_a_volume(kind: str, deploy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, make, message = BAD[FILES[kind]]
    path = make(tmp_path, names[list(FILES).index(kind) % len(names)])
    assert deploy(str(path)) == 2
    refused(capsys, named=str(path), message=f"{message}|{NOT_FOUND}")
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("kind", SERIES)
def test_of_a_series(kind: str, deploy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, make, _, message = BROKEN[SERIES[kind]]
    make(tmp_path / name)
    assert deploy(str(tmp_path / name)) == 2
    refused(capsys, named=str(tmp_path / name), message=f"{message}|{NOT_FOUND}")
    assert nothing_is_written(tmp_path / "out")


@pytest.mark.parametrize("kind", BAD_SETS)
def test_of_a_set(
    kind: str,
    deploy: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, root = BAD_SETS[kind], tmp_path / "set"
    root.mkdir()
    bad.make(root)
    monkeypatch.chdir(root)
    data = str(root if bad.data == "." else root / bad.data)
    more = [*(() if bad.labels is None else ("--labels", bad.labels)), *bad.more]
    run = deploy if bad.verb == "deploy" else lambda *given: main([*bad.verb.split(), *given])
    before = sorted(root.rglob("*"))
    assert run(data, *more) == 2
    refused(capsys, named=bad.named or data, message=bad.message)
    assert sorted(root.rglob("*")) == before


def test_a_file_that_may_not_be_read(
    deploy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path = image(tmp_path / "a.nii")
    path.chmod(0)
    assert deploy(str(path)) == 2
    refused(capsys, named=str(path), message="Permission denied")


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mgz", "a.mha"])
def test_a_file_whose_reading_fails(
    name: str,
    deploy: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As permissions do for all but root, and drives that are gone."""
    path, opened = made(tmp_path, name), Path.open

    def refuse(place: Path, *given: str, **more: str) -> object:
        if place == path:
            raise PermissionError(13, "Permission denied")
        return opened(place, *given, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert deploy(str(path)) == 2
    refused(capsys, named=str(path), message="Permission denied")


@pytest.mark.parametrize("window", [("0", "8", "8"), ("8", "-8", "8")])
def test_windows_with_nothing_in_them_are_not_drawn(
    window: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(image(tmp_path / "a.nii")), "--preprocessing", "btcv", "--window", *window]
    assert main(["calibrate", *given, "--output", str(tmp_path / "c.npz")]) == 2
    refused(capsys, named=f"--window {' '.join(window)}", message="1 voxel or more")
    assert not (tmp_path / "c.npz").exists()


def test_of_several_cases_each_is_named_and_the_others_are_written(
    deploy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "set"
    for seed, name in enumerate("abc"):
        image(root / f"{name}.nii.gz", seed)
    for name in "ac":
        (root / f"{name}.nii.gz").write_text("text")
    assert deploy(str(root)) == 2
    told = refused(capsys, named=str(root / "a.nii.gz"), message="2 of 3 cases failed, the others are written")
    assert str(root / "c.nii.gz") in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


@pytest.mark.parametrize(
    "name", ["Übung", "患者 一", "мозг", "a b", "'; rm -rf", "x" * 192, "नमस्ते", "e\u0301", "..a", "-a"]
)
@pytest.mark.parametrize("kind", ["volume", "series"])
def test_names_of_every_alphabet_and_length_work(
    name: str, kind: str, deploy: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counterpart: what only looks bad is read, and its result has its name."""
    place = tmp_path / "sét" / (f"{name}.nii.gz" if kind == "volume" else name)
    image(place) if kind == "volume" else series(place)
    assert deploy(str(place)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.nii.gz"]
    assert capsys.readouterr().err == ""


def enormous(path: Path) -> Path:
    """90 GB of zeros that take no room on disk: a header that the file keeps."""
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)
    content = bytearray(path.read_bytes()[:352])
    content[42:48] = np.array([30000, 30000, 100], "<i2").tobytes()
    path.write_bytes(content)
    os.truncate(path, 352 + 30000 * 30000 * 100)
    return path


BOUNDED = """
import contextlib, io, json, resource, sys
from pathlib import Path
from ptq3d.cli import main

def run(path):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        return main(["data", "check", "--report", report, path]), told.getvalue()

report, sound, *bad = sys.argv[1:]
assert run(sound)[0] == 0  # all that is needed is loaded
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [(*run(path), json.loads(Path(report).read_text())["problems"]) for path in bad]
print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound a process's memory so")
def test_no_header_exhausts_the_memory(tmp_path: Path) -> None:
    """A process that may take 1 GiB more goes on, and takes a small part of it."""
    for kind in NAMES:
        (tmp_path / kind).mkdir()
    paths = [BAD["huge dimensions"][1](tmp_path / kind, kind) for kind in NAMES]
    huge(tmp_path / "dicom")
    huge_compressed(tmp_path / "packed")
    paths += [tmp_path / "dicom", tmp_path / "packed", enormous(tmp_path / "enormous.nii")]
    given = [str(tmp_path / "r.json"), str(image(tmp_path / "sound.nii")), *map(str, paths)]
    done = subprocess.run([sys.executable, "-c", BOUNDED, *given], capture_output=True, text=True, check=True)
    found, grown_kb = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(paths)
    for path, (code, told, problems) in zip(paths, found, strict=True):
        assert code == 2, path
        assert len(told.splitlines()) == 1
        assert str(path) in told
        assert [one["kind"] for one in problems] == ["unreadable"]
        assert len(problems[0]["text"]) < LONGEST
    assert grown_kb < 200_000
