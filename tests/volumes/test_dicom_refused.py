"""What makes no volume ends in one sentence on one line that names the place, and what is wrong with it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from broken_series import BROKEN, series, two_places
from dicoms import edit, stored_values
from ptq3d.errors import FileError, InputError, UnavailableError
from ptq3d.volumes.dicom import find_series, only_series, read_series, series_grid
from ptq3d.volumes.dicom_files import quiet


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_series_gives_one_sentence_that_names_it(tmp_path: Path, case: str) -> None:
    name, make, error, message = BROKEN[case]
    make(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        read_series(only_series(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("wanted", ["9", "lung", "", "1.2.3"])
def test_a_series_that_is_not_there_lists_those_that_are(tmp_path: Path, wanted: str) -> None:
    series(tmp_path, lambda header, index: setattr(header, "SeriesInstanceUID", "1.2.826.0.1.3680043.8.9"))
    with pytest.raises(FileError, match=r"--series among: 3 CT Abdomen portal \(6 slices"):
        only_series(tmp_path, wanted)


def test_one_of_two_patients_can_be_chosen(tmp_path: Path) -> None:
    two_places(tmp_path, PatientID="P2", SeriesNumber=8)
    chosen = only_series(tmp_path, "8")
    assert {Path(name).parent.name for name in chosen.members} == {"b"}
    assert len(find_series(tmp_path)) == 2


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path)
    opened = Path.open

    def refuse(path: Path, *arguments: str) -> object:
        if path.name == "IM0002":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FileError, match=r"IM0002 cannot be read.*Permission denied"):
        find_series(tmp_path)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    found = only_series(series(tmp_path))
    (tmp_path / "IM0002").unlink()
    with pytest.raises(FileError, match="IM0002 cannot be read"):
        series_grid(found)
    (tmp_path / "IM0002").write_text("a text")
    with pytest.raises(FileError, match="IM0002 is no DICOM file"):
        read_series(found)


def test_two_series_of_one_uid_but_two_patients_are_two(tmp_path: Path) -> None:
    uid = generate_uid()
    two_places(tmp_path, PatientID="P2", SeriesInstanceUID=uid)
    edit(tmp_path / "a", lambda header, index: setattr(header, "SeriesInstanceUID", uid))
    assert [len(one.members) for one in find_series(tmp_path)] == [6, 6]


def test_without_pydicom_it_says_what_to_install(tmp_path: Path) -> None:
    series(tmp_path)
    code = f"""
import sys
sys.modules["pydicom"] = None
from pathlib import Path
from ptq3d.errors import UnavailableError
from ptq3d.volumes.dicom import find_series
try:
    find_series(Path({str(tmp_path)!r}))
except UnavailableError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'ptq3d[dicom]'" in done.stdout
    assert issubclass(UnavailableError, InputError)


def test_nothing_of_pydicom_is_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Values that break the standard's rules but can be read; pytest makes an error of each warning."""

    def change(header: Dataset, index: int) -> None:
        header.add_new("StationName", "SH", "x")
        header["StationName"]._value = "a name much longer than sixteen characters"
        header["StudyDate"]._value = "yesterday"

    series(tmp_path, change)
    code = f"""
import logging
logging.basicConfig(level=logging.INFO)
from pathlib import Path
from ptq3d.volumes.dicom import only_series, read_series
print(read_series(only_series(Path({str(tmp_path)!r})))[0].sum())
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == np.float32((stored_values((7, 6, 6)).astype(np.float64) - 1024).sum())
    assert done.stderr == ""


def test_threads_leave_warnings_and_loggers_as_they_were() -> None:
    """One thread reads the next series while another writes the last result."""
    filters, level = list(warnings.filters), logging.getLogger("pydicom").level
    barrier = threading.Barrier(4)

    def silent(wait: float) -> None:
        barrier.wait()
        for _ in range(50):
            with quiet():
                time.sleep(wait)
                warnings.warn("of a header", UserWarning, stacklevel=1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(silent, wait) for wait in (0, 1e-4, 2e-4, 3e-4)]:
            done.result()
    assert warnings.filters == filters
    assert logging.getLogger("pydicom").level == level
    with pytest.warns(UserWarning, match="of a header"):
        warnings.warn("of a header", UserWarning, stacklevel=1)
