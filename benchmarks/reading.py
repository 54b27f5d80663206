"""Reading a large compressed CT: time and memory of ptq3d beside nibabel and SimpleITK, in one run.

    python benchmarks/reading.py --report reading.json [--repetitions 5]

The file is made: 512 x 512 x 600 int16 HU, ellipses of tissue with noise, gzip at nibabel's level. Its label map has the same
grid, uint8, 105 classes in blocks. Each reading is a fresh process, and repetitions go round by round, so that drift of the
machine meets all readers alike. Seconds are of the one call, imports done before; memory is the highest the process reached,
less what it held before the call, over the size of one array of the result (float32 for the image, uint8 for labels).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ptq3d.compare import machine
from ptq3d.memory import peak_memory_bytes, resident_bytes

SHAPE = (512, 512, 600)
AFFINE = np.diag([-0.8, -0.8, 1.0, 1.0])
SLOWDOWN, COPIES = 1.3, 1.1  # what is promised beside nibabel, and of one float32 copy with a few MB of pieces


def make(folder: Path, slices: int) -> None:
    """The image and its label map."""
    import nibabel

    random, (x, y, _) = np.random.default_rng(0), SHAPE
    rows, columns = np.mgrid[-1 : 1 : x * 1j, -1 : 1 : y * 1j]
    image, labels = np.empty((x, y, slices), np.int16, "F"), np.empty((x, y, slices), np.uint8, "F")
    for index in range(slices):
        turn = 2 * math.pi * index / slices
        tissue = np.full((x, y), -1000.0)
        tissue[(rows / 0.85) ** 2 + (columns / 0.6) ** 2 < 1] = 40
        tissue[((rows - 0.4) / 0.3) ** 2 + ((columns - 0.1 * math.cos(turn)) / 0.35) ** 2 < 1] = -820
        tissue[(rows / 0.08) ** 2 + ((columns - 0.45) / 0.08) ** 2 < 1] = 700
        image[..., index] = np.clip(np.rint(tissue + 15 * random.standard_normal((x, y))), -1024, 3071)
        blocks = (rows * 4 + 4).astype(int) * 13 + (columns * 4 + 4).astype(int) + index // 40
        labels[..., index] = np.where(tissue > -1000, blocks % 105, 0)
    nibabel.save(nibabel.Nifti1Image(image, AFFINE), folder / "image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, AFFINE), folder / "labels.nii.gz")


def by_ptq3d(folder: Path, what: str) -> Callable[[], object]:
    """What a user of ptq3d calls."""
    from ptq3d.volumes.files import load_image, load_labels

    importlib.import_module("nibabel")  # for both before the clock starts
    return lambda: (load_image if what == "image" else load_labels)(folder / f"{what}.nii.gz")


def by_nibabel(folder: Path, what: str) -> Callable[[], object]:
    """What a user of nibabel calls."""
    import nibabel

    path = folder / f"{what}.nii.gz"
    if what == "image":
        return lambda: nibabel.load(path).get_fdata(dtype=np.float32)
    return lambda: np.asanyarray(nibabel.load(path).dataobj)


def by_simpleitk(folder: Path, what: str) -> Callable[[], object]:
    """What a user of SimpleITK calls."""
    import SimpleITK as sitk  # noqa: N813

    kind = sitk.sitkFloat32 if what == "image" else sitk.sitkUInt8
    return lambda: sitk.GetArrayViewFromImage(sitk.ReadImage(str(folder / f"{what}.nii.gz"), kind))


READERS = {"ptq3d": by_ptq3d, "nibabel": by_nibabel, "SimpleITK": by_simpleitk}


def once(reader: str, folder: Path, what: str) -> dict[str, float]:
    """Seconds, and bytes above what the process held."""
    read = READERS[reader](folder, what)
    held, start = resident_bytes(), perf_counter()
    result = read()
    seconds = perf_counter() - start
    del result
    return {"seconds": seconds, "bytes": peak_memory_bytes() - held}


def apart(reader: str, folder: Path, what: str) -> dict[str, float]:
    """`once` in a fresh process."""
    command = [sys.executable, __file__, "--once", reader, what, "--work", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Row:
    """One reader of one file: medians over the repetitions."""

    file: str
    reader: str
    seconds: float
    copies: float
    seconds_each: list[float]


def rows_of(folder: Path, slices: int, repetitions: int) -> list[Row]:
    """All readers of both files, in turn."""
    rows = []
    for what, item in (("image", 4), ("labels", 1)):
        runs: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
        for _ in range(repetitions):
            for reader, found in runs.items():
                found.append(apart(reader, folder, what))
        copy = math.prod(SHAPE[:2]) * slices * item
        for reader, found in runs.items():
            each = [run["seconds"] for run in found]
            copies = statistics.median(run["bytes"] for run in found) / copy
            rows.append(Row(what, reader, statistics.median(each), copies, each))
    return rows


def bars_of(rows: list[Row]) -> list[dict[str, Any]]:
    """What is promised, and what was measured."""
    at = {(row.file, row.reader): row for row in rows}
    ours, peer = at["image", "ptq3d"], at["image", "nibabel"]
    found = (("time / nibabel's", ours.seconds / peer.seconds, SLOWDOWN), ("float32 copies", ours.copies, COPIES))
    return [
        {"bar": f"image: {name}", "measured": value, "limit": limit, "met": value <= limit}
        for name, value, limit in found
    ]


def show(rows: list[Row], bars: list[dict[str, Any]]) -> None:
    """Tables for people."""
    print(f"{'file':8} {'reader':10} {'seconds':>8} {'x nibabel':>9} {'copies':>7}")
    peer = {row.file: row.seconds for row in rows if row.reader == "nibabel"}
    for row in rows:
        print(f"{row.file:8} {row.reader:10} {row.seconds:8.2f} {row.seconds / peer[row.file]:9.2f} {row.copies:7.2f}")
    for bar in bars:
        print(f"{bar['bar']:26} {bar['measured']:.2f} <= {bar['limit']} {'met' if bar['met'] else 'MISSED'}")


def commit() -> str:
    """What ran."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Make the files, measure, and write the report; exit 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("reading.json"), help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--slices", type=int, default=SHAPE[2])
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(once(options.once[0], options.work, options.once[1])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), options.slices)
        sizes = {path.name: path.stat().st_size for path in sorted(Path(scratch).iterdir())}
        rows = rows_of(Path(scratch), options.slices, options.repetitions)
    bars = bars_of(rows)
    show(rows, bars)
    versions = {package: version(package) for package in ("numpy", "nibabel", "SimpleITK")}
    report = {
        "rows": [asdict(row) for row in rows],
        "bars": bars,
        "bytes": sizes,
        "shape": [*SHAPE[:2], options.slices],
    }
    report |= {"machine": {**machine(), **versions, "commit": commit()}, "command": sys.argv}
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(bar["met"] for bar in bars) else 1)


if __name__ == "__main__":
    main()
