"""A whole case on the CPU, from file to label file: ptq3d beside the seed's way and MONAI's, in one run.

    python benchmarks/whole_case.py --shared ../shared --report whole_case.json [--work DIR] [--cases brain-133 ct-600 ...]

Cases: a real brain with a U-Net of 14 and of 133 classes; a made CT of 512 x 512 x 150, 300 and 600 slices with one of 105 at
1.5 mm. Windows of 96^3, overlap 0.5, Gaussian. Ways:

- ptq3d: `deploy` on the INT8 file. ptq3d-no-late-head: the same, logits blended in place of features.
- monai-int8: the engine of ptq3d-no-late-head in plain OpenVINO, inside MONAI's `sliding_window_inference`, softmax, argmax.
- seed: the same with the FP32 network in PyTorch.
- network, network-full: the engines of ptq3d and of ptq3d-no-late-head, once for every window in turn, and nothing else.

Each run is a fresh process; repetitions go round by round, so that drift of the machine meets all ways alike. total_seconds is
from before the file is read until the label file is written. Imports and the opening of the engine count for no way, and no way
is warmed up. Threads, and FP32 for what is not INT8, are the same for all; so are reading, preprocessing and writing, which are
ptq3d's. network_seconds of a way is what it waited for its network; OpenVINO's answers are copied for no way.

The weights are random: they show time and memory, nothing of accuracy. Their kernels are constant over space, which averages
noise away, so that labels are regions as a trained network's are and compress as such.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import nibabel
import numpy as np
import openvino
import torch
from torch import Tensor, nn

from ptq3d.compare import machine
from ptq3d.datasets.phantoms import make_phantom
from ptq3d.deployment import Deployment, deploy, prepare
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs.export import export_network
from ptq3d.graphs.files import save_graph
from ptq3d.manifest import Manifest, embed
from ptq3d.memory import peak_memory_bytes
from ptq3d.models import ARCHITECTURES
from ptq3d.models.unet import UNet
from ptq3d.options import DeployOptions, QuantizeOptions
from ptq3d.quantizing import quantize
from ptq3d.volumes.files import load_grid, load_image, save_labels
from ptq3d.volumes.nifti import write_nifti
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.windows import window_starts

VIEW_MM = 409.6  # field of view of the made CT
STRETCH = 1.3  # the phantom's body of 270 x 185 mm becomes one of 350 x 240 mm
CLASSES = {"brain-14": 14, "brain-133": 133, "ct-150": 105, "ct-300": 105, "ct-600": 105}
Measured = tuple[dict[str, float], int]  # seconds of each step, windows


@dataclass(frozen=True)
class Size:
    """Of windows, of the made CT, and of the voxels that the networks see (None: the file's)."""

    window: int = 96
    side: int = 512
    slice_mm: float = 1.0
    ct_mm: tuple[float, float, float] = (1.5, 1.5, 1.5)
    brain_mm: tuple[float, float, float] | None = None


TINY = Size(window=32, side=128, slice_mm=4.0, ct_mm=(6.0, 6.0, 6.0), brain_mm=(3.0, 3.0, 3.0))  # shows that it runs


@dataclass(frozen=True)
class Job:
    """A case with the folders of its files."""

    case: str
    shared: Path
    work: Path
    threads: int

    @property
    def image(self) -> Path:
        """The volume."""
        brain = self.shared / "data/whole_brain/test/images/1013.nii.gz"
        return brain if self.case.startswith("brain") else self.work / f"{self.case}.nii.gz"

    def network(self, kind: str) -> Path:
        """The FP32 file ("fp32") or the one of INT8 ("int8")."""
        return self.work / f"unet{CLASSES[self.case]}_{kind}.onnx"

    def engine(self, *, late: bool) -> Deployment:
        """The INT8 engine, its head apart or not; built by the first call, which is in no measured process."""
        options = EngineOptions(threads=self.threads)
        return prepare(self.network("int8"), "auto", options, preprocessing=None, overlap=None, late_head=late)


def make_inputs(job: Job, size: Size) -> None:
    """Volume, network and engines of a case, each unless it is there; how weights are rounded costs no run time."""
    calibration = job.work / "ct-calibration.nii.gz"
    if job.case.startswith("ct"):
        _make(job.image, lambda path: make_ct(path, int(job.case.split("-")[1]), size))
        _make(calibration, lambda path: make_ct(path, 150, size, seed=1))
        prepared = Preprocessing("RAS", size.ct_mm, ({"rule": "window", "low": -175.0, "high": 250.0},))
    else:
        calibration = job.shared / "data/whole_brain/train/images"
        prepared = Preprocessing("RAS", size.brain_mm, ({"rule": "quantiles", "lower": 0.02, "upper": 0.98},))
    _make(job.network("fp32"), lambda path: export(job, path, prepared, size.window))
    given: dict[str, Any] = {"calibration_data": calibration, "number": 4, "rounding": "nearest", "quiet": True}
    options = QuantizeOptions(onnx_path=job.network("fp32"), **given)
    _make(job.network("int8"), lambda path: quantize(replace(options, output_path=path)))
    _ = job.engine(late=True), job.engine(late=False)


def _make(path: Path, make: Callable[[Path], object]) -> None:
    """A file written beside its place and renamed."""
    if not path.exists():
        print(f"making {path.name}", flush=True)
        make(path.with_name(f"new-{path.name}"))
        path.with_name(f"new-{path.name}").replace(path)


def make_ct(path: Path, slices: int, size: Size, seed: int = 0) -> None:
    """A phantom's abdomen, mirrored up and down until it is as long as asked for, int16 HU with noise, stored as LPS."""
    phantom, random, pixel = make_phantom(seed), np.random.default_rng(seed), VIEW_MM / size.side
    body = nibabel.as_closest_canonical(nibabel.Nifti1Image(phantom.image, phantom.affine))
    planes, steps = torch.from_numpy(np.asarray(body.dataobj, np.float32)), body.header.get_zooms()
    shape = [round(number * step * STRETCH / pixel) for number, step in zip(planes.shape[:2], steps[:2], strict=True)]
    x, y = (slice((size.side - number) // 2, (size.side + number) // 2) for number in shape)
    stored = np.empty((size.side, size.side, round(slices / size.slice_mm)), np.int16, order="F")
    last = planes.shape[2] - 1
    for index in range(stored.shape[2]):
        place = last - abs(index * size.slice_mm / float(steps[2]) % (2 * last) - last)
        low, share = int(place), place % 1
        plane = planes[..., low] * (1 - share) + planes[..., min(low + 1, last)] * share
        frame = np.full((size.side, size.side), -1000, np.float32)
        frame[x, y] = nn.functional.interpolate(plane[None, None], size=shape, mode="bilinear")[0, 0].numpy()
        frame += 12 * random.standard_normal(frame.shape, np.float32)
        stored[::-1, ::-1, index] = np.clip(np.rint(frame), -1024, 3071)
    write_nifti(path, stored, np.diag([-pixel, -pixel, size.slice_mm, 1.0]))


def network(classes: int) -> UNet:
    """The seed's U-Net with random weights, the same at every call, scaled on blobs so that several classes win."""
    torch.manual_seed(0)
    made = UNet(1, classes, tuple(ARCHITECTURES["unet"].channels)).train()
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight.copy_(layer.weight.mean((2, 3, 4), keepdim=True).expand_as(layer.weight))
            elif isinstance(layer, nn.ConvTranspose3d):
                layer.weight.copy_(layer.weight[..., :1, :1, :1].expand_as(layer.weight).clone())
            elif isinstance(layer, nn.BatchNorm3d):
                layer.momentum = 1.0
                nn.init.normal_(layer.bias)
        blobs = nn.functional.interpolate((2 * torch.rand(2, 1, 7, 7, 7) - 1).relu(), size=48, mode="trilinear")
        *skips, deepest = made.encoder(blobs)
        seen = made.decoder(deepest, skips).transpose(0, 1).flatten(1)
        rows = nn.functional.normalize(torch.randn(classes, len(seen))) / (seen.std(1) + 1e-3)
        made.head.load_state_dict({"weight": rows[..., None, None, None], "bias": -rows @ seen.mean(1)})
    return made.eval()


def export(job: Job, path: Path, prepared: Preprocessing, window: int) -> None:
    """The FP32 ONNX file with its manifest."""
    classes, sides = CLASSES[job.case], (window, window, window)
    made, labels = export_network(network(classes), channels=1, window=sides), map("class {}".format, range(classes))
    embed(made.model, Manifest(tuple(labels), sides, prepared, network="unet"))
    save_graph(made.model, path)


def by_deploy(job: Job, *, late: bool) -> Measured:
    """What a user of ptq3d runs."""
    given: dict[str, Any] = {"model": job.network("int8"), "data": job.image, "threads": job.threads}
    output = job.work / "labels" / f"{job.case}-late-{late}"
    (result,) = deploy(DeployOptions(**given, output=output, late_head=late, quiet=True))
    if result.error is not None:
        raise result.error
    return dict(result.seconds), result.windows


def by_monai(job: Job, *, int8: bool) -> Measured:
    """What a user of MONAI writes, around the INT8 engine or around PyTorch."""
    from monai.inferers import sliding_window_inference

    deployment = job.engine(late=False)
    prepared, manifest = deployment.preprocessing, deployment.manifest
    model = plain_openvino(deployment.folder, job.threads) if int8 else network(CLASSES[job.case])
    times: list[float] = []

    def timed(window: Tensor) -> Tensor:
        window, start = window.contiguous(), perf_counter()
        answer: Tensor = model(window)
        times.append(perf_counter() - start)
        return answer

    start = perf_counter()
    image = load_image(job.image)
    read = perf_counter()
    ready = torch.from_numpy(prepared.apply(image).data)[None]
    begin = perf_counter()
    with torch.inference_mode():
        logits = sliding_window_inference(ready, manifest.window, 1, timed, overlap=manifest.overlap, mode="gaussian")
        labels = torch.softmax(logits, 1).argmax(1).numpy().astype(np.uint8)
    found = prepared.restore_labels(labels[0], image.grid)
    end = perf_counter()
    save_labels(job.work / "labels" / f"{job.case}-monai-int8-{int8}" / job.image.name, found)
    seconds = {"total": perf_counter() - start, "read": read - start, "preprocess": begin - read, "network": sum(times)}
    return {**seconds, "stitch": end - begin - sum(times), "write": seconds["total"] - (end - start)}, len(times)


def plain_openvino(folder: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The graph of an engine, compiled without ptq3d."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", settings)
    return lambda window: torch.from_numpy(compiled([window.numpy()], share_inputs=True, share_outputs=True)[0])


def by_network(job: Job, *, late: bool) -> Measured:
    """The engine alone on all windows of the case, one call each, one after the other."""
    deployment = job.engine(late=late)
    ready, window = deployment.preprocessing.apply(load_image(job.image)), deployment.manifest.window
    missing = [max(width - number, 0) for width, number in zip(window, ready.shape, strict=True)]
    data = np.pad(ready.data, [(0, 0), *((lack // 2, lack - lack // 2) for lack in missing)])
    starts = window_starts((data.shape[1], data.shape[2], data.shape[3]), window, deployment.manifest.overlap)
    seconds = 0.0
    with deployment.open() as engine:
        for start in starts:
            x, y, z = (slice(first, first + width) for first, width in zip(start, window, strict=True))
            piece = torch.from_numpy(np.ascontiguousarray(data[:, x, y, z]))
            begin = perf_counter()
            for _ in engine.stream([piece]):
                pass
            seconds += perf_counter() - begin
    return {"network": seconds, "total": seconds}, len(starts)


WAYS: Mapping[str, Callable[[Job], Measured]] = {
    "ptq3d": lambda job: by_deploy(job, late=True),
    "ptq3d-no-late-head": lambda job: by_deploy(job, late=False),
    "monai-int8": lambda job: by_monai(job, int8=True),
    "network": lambda job: by_network(job, late=True),
    "network-full": lambda job: by_network(job, late=False),
    "seed": lambda job: by_monai(job, int8=False),
}


def run_apart(way: str, job: Job) -> dict[str, Any] | None:
    """One run in a fresh process; None where it died."""
    places = ["--shared", str(job.shared), "--work", str(job.work), "--threads", str(job.threads)]
    command = [sys.executable, __file__, "--way", way, "--cases", job.case, *places]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{job.case} {way}: its process ended with {done.returncode}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    total, peak = found["seconds"]["total"], found["peak_memory_bytes"] / 1e9
    print(f"{job.case} {way}: {total:.2f} s, {peak:.2f} GB", flush=True)
    return found


@dataclass(frozen=True)
class Row:
    """One way of one case: medians over the repetitions, and the largest peak."""

    case: str
    classes: int
    way: str
    network_seconds: float
    total_seconds: float
    peak_memory_bytes: float
    windows: int
    seconds: dict[str, float]
    total_seconds_each: list[float]


def row_of(job: Job, way: str, runs: Sequence[dict[str, Any]]) -> Row:
    """From what the runs said."""
    steps = {key: statistics.median(run["seconds"][key] for run in runs) for key in runs[0]["seconds"]}
    peak, each = max(run["peak_memory_bytes"] for run in runs), [run["seconds"]["total"] for run in runs]
    head = (job.case, CLASSES[job.case], way, steps["network"], steps["total"], peak)
    return Row(*head, runs[0]["windows"], steps, each)


def bars_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What is promised of a whole case, computed from the rows; a row that is missing makes NaN."""
    nothing = Row("", 0, "", math.nan, math.nan, math.nan, 0, {"stitch": math.nan, "write": math.nan}, [])
    at = defaultdict(lambda: nothing, {(row.case, row.way): row for row in rows})
    wide, monai, narrow = at["brain-133", "ptq3d"], at["brain-133", "monai-int8"], at["brain-14", "ptq3d"]
    short, middle, tall = (at[f"ct-{slices}", "ptq3d"] for slices in (150, 300, 600))
    beside = (tall.seconds["stitch"] + tall.seconds["write"]) / at["ct-600", "network"].network_seconds
    line = [3 * getattr(middle, key) - 2 * getattr(short, key) for key in ("total_seconds", "peak_memory_bytes")]
    return [
        _bar("133: total / network", wide.total_seconds / at["brain-133", "network"].network_seconds, "<=", 1.15),
        _bar("133: peak, GB", wide.peak_memory_bytes / 1e9, "<=", 1.0),
        _bar("133: seed / ptq3d, total", at["brain-133", "seed"].total_seconds / wide.total_seconds, ">=", 9.0),
        _bar("133: monai-int8 / ptq3d, total", monai.total_seconds / wide.total_seconds, ">=", 3.0),
        _bar("14: seed / ptq3d, total", at["brain-14", "seed"].total_seconds / narrow.total_seconds, ">=", 6.5),
        _bar("ct-600: peak, GB", tall.peak_memory_bytes / 1e9, "<=", 3.0),
        _bar("ct-600: (stitch + write) / network", beside, "<=", 0.25),
        _bar("ct-600: total / line through 150, 300", tall.total_seconds / line[0], "<=", 1.1),
        _bar("ct-600: peak / line through 150, 300", tall.peak_memory_bytes / line[1], "<=", 1.1),
    ]


def _bar(name: str, measured: float, sign: str, limit: float) -> dict[str, Any]:
    met = measured <= limit if sign == "<=" else measured >= limit
    verdict = "not measured" if math.isnan(measured) else "met" if met else "MISSED"
    return {
        "bar": name,
        "measured": None if math.isnan(measured) else measured,
        "sign": sign,
        "limit": limit,
        "verdict": verdict,
    }


def show(rows: Sequence[Row]) -> None:
    """Tables for people."""
    print(f"\n{'case':9} {'way':18} {'network s':>9} {'total s':>8} {'peak GB':>7} {'windows':>7}  steps")
    for row in rows:
        steps = " ".join(f"{key} {value:.2f}" for key, value in row.seconds.items() if key not in ("network", "total"))
        peak, figures = row.peak_memory_bytes / 1e9, f"{row.network_seconds:9.2f} {row.total_seconds:8.2f}"
        print(f"{row.case:9} {row.way:18} {figures} {peak:7.2f} {row.windows:7}  {steps}")
    print()
    for bar in bars_of(rows):
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.3f}"
        print(f"{bar['bar']:38} {measured:>7} {bar['sign']} {bar['limit']:<5g} {bar['verdict']}")


def provenance() -> dict[str, Any]:
    """What it ran on, and what ran."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    versions = {package: version(package) for package in ("openvino", "monai", "torch", "numpy", "nibabel")}
    return {**machine(), **versions, "commit": commit}


def measure(options: argparse.Namespace, work: Path) -> None:
    """Inputs, runs and report, which is written anew after every case."""
    rows, logits, size = [], {}, TINY if options.tiny else Size()
    for job in (Job(case, options.shared, work, options.threads) for case in options.cases):
        made, slow = job.case.startswith("ct"), options.slow_repetitions
        possible = {"ptq3d", "network"} if made else set(WAYS)
        possible -= {"network" if made else "seed"} if options.skip_slow else set()
        ways = [way for way in options.ways if way in possible]
        make_inputs(job, size)
        logits[job.case] = 4 * CLASSES[job.case] * math.prod(load_grid(job.image)[0])
        rounds = {way: slow if made or way == "seed" else options.repetitions for way in ways}
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for index, way in itertools.product(range(max(rounds.values(), default=0)), ways):
            if index < rounds[way] and (found := run_apart(way, job)) is not None:
                runs[way].append(found)
        rows += [row_of(job, way, found) for way, found in runs.items() if found]
        report = {"rows": [asdict(row) for row in rows], "bars": bars_of(rows), "logits_bytes_on_the_file_grid": logits}
        report |= {"threads": options.threads, "size": asdict(size), "machine": provenance(), "command": sys.argv}
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shared", type=Path, default=Path("../shared"), help="folder of real data")
    add("--report", type=Path, default=Path("whole_case.json"), help="JSON file to write")
    add("--work", type=Path, help="folder for inputs, reused where they are there; default: a temporary one")
    add("--threads", type=int, default=2, help="of every way")
    add("--repetitions", type=int, default=3, help="of the brain's ways but the seed's")
    add("--slow-repetitions", type=int, default=1, help="of the seed's way and of the made CT")
    add("--cases", nargs="+", choices=[*CLASSES], default=[*CLASSES])
    add("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    add("--skip-slow", action="store_true", help="without the seed's way and the made CT's pure network time")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    add("--way", choices=[*WAYS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve() / ("tiny" if options.tiny else "")
        work.mkdir(parents=True, exist_ok=True)
        os.environ |= {"PTQ3D_CACHE": str(work / "cache"), "OMP_NUM_THREADS": str(options.threads)}  # for the runs
        if options.way is None:
            measure(options, work)
        else:
            torch.set_num_threads(options.threads)
            seconds, windows = WAYS[options.way](Job(options.cases[0], options.shared, work, options.threads))
            print(json.dumps({"seconds": seconds, "windows": windows, "peak_memory_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main()
