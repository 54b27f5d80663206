"""The check of a data set of many small cases: one process against one a core.

    python benchmarks/checking.py [--cases 1000] [--repetitions 3] [--report checking.json]

Cases are made: int16 images of 48^3 voxels with noise, gzipped, and label maps of 14 classes. `ptq3d data check` runs as a user
runs it, start of Python included, with the processor's cores and with one of them (`taskset`), in turn; medians are told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import nibabel
import numpy as np

from ptq3d.compare import machine


def make(folder: Path, number: int) -> None:
    """`number` images and label maps in the seed's layout."""
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / "train" / kind).mkdir(parents=True)
    for index in range(number):
        image = generator.integers(-1000, 400, (48, 48, 48)).astype(np.int16)
        labels = np.repeat(generator.integers(0, 14, (6, 48, 48)).astype(np.uint8), 8, axis=0)
        for kind, name, voxels in (("images", "img", image), ("labels", "label", labels)):
            path = folder / "train" / kind / f"{name}{index:04d}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


def seconds(folder: Path, cores: str) -> float:
    """One run of the check on these cores."""
    start = perf_counter()
    command = ["taskset", "-c", cores, sys.executable, "-m", "ptq3d.cli", "data", "check", str(folder), "--quiet"]
    subprocess.run(command, check=True)
    return perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    ways = {"all cores": f"0-{(os.cpu_count() or 1) - 1}", "one core": "0"}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), options.cases)
        for _ in range(options.repetitions):
            for way, cores in ways.items():
                taken[way].append(seconds(Path(scratch), cores))
    medians = {way: statistics.median(times) for way, times in taken.items()}
    for way, median in medians.items():
        print(f"{way:10} {median:7.2f} s  {options.cases / median:7.1f} cases/s")
    print(f"{'ratio':10} {medians['one core'] / medians['all cores']:7.2f}")
    if options.report:
        versions = {name: version(name) for name in ("nibabel", "numpy")}
        report = {"machine": {**machine(), **versions}, "cases": options.cases, "seconds": taken, "medians": medians}
        options.report.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
