"""The tiling of each convolution: measured once for a device, and kept."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptq3d.cache import cache_folder
from ptq3d.engines.triton.arena import TYPES
from ptq3d.engines.triton.convolution import flattened, launch_of
from ptq3d.engines.triton.packing import first_sums, packed_size
from ptq3d.engines.triton.place import Launch, Place
from ptq3d.engines.triton.products import Product, Tile, product_of, simple_tile
from ptq3d.engines.triton.steps import Convolve, Upsample
from ptq3d.engines.triton.tiles import worth_trying
from ptq3d.errors import EngineError, line_of
from ptq3d.progress import Progress, silent

Weighted = Convolve | Upsample
REPETITIONS, IN_A_ROW = 3, 3
SLEEP_CYCLES = 1_000_000  # half a millisecond, while the launches queue up
INTERPRETED_ROWS = 1024  # the interpreter takes its time for a program, whatever its size
VERSION = 3  # of the kernels: what was measured with others does not count


def problem(step: Weighted) -> str:
    """Everything of a step that its speed depends on, as one line."""
    step = flattened(step) if isinstance(step, Convolve) else step
    product = product_of(step)
    views = [f"{view.dtype}/{view.pitch}" for view in (step.x, step.out, step.epilogue.other) if view is not None]
    numbers = json.dumps(astuple(product), separators=(",", ":"))
    first, last = step.epilogue.activation.kind, step.epilogue.last.kind
    summed = "sums" if step.sums is not None else "plain"
    shifted = "shifted" if step.x.zero else "centred"
    return f"{step.x.shape[0]} {numbers} {' '.join(views)} {first} {last} {step.epilogue.rounded is not None} {summed} {shifted}"


def choose(steps: Sequence[Weighted], place: Place, device: torch.device, *, progress: Progress = silent) -> list[Tile]:
    """A tiling for each step: the fastest that was measured on this kind of device.

    What was not measured yet is measured now, a few seconds for a problem, and kept under `cache_folder()`. In Triton's
    interpreter nothing is measured.

    Args:
        steps: convolutions with their tensors in `place`, which are overwritten.
        place: their memory.
        device: where it is.
        progress: told how many of the new problems are measured.
    """
    if device.type != "cuda":
        return [replace(simple_tile(product_of_step(step)), rows=INTERPRETED_ROWS) for step in steps]
    known = _read(device)
    named = {problem(step): step for step in steps}
    tried = {name: worth_trying(product_of_step(step)) for name, step in named.items()}
    fresh = {name: step for name, step in named.items() if not _counts(known.get(name), step, tried[name])}
    compile_ahead([(step, tile) for name, step in fresh.items() for tile in tried[name]])
    for number, (name, step) in enumerate(fresh.items()):
        known[name] = fastest(step, tried[name], place)
        progress(number + 1, len(fresh))
    if fresh:
        _write(device, known)
    return [known[problem(step)] for step in steps]


def _counts(tile: Tile | None, step: Weighted, tried: Sequence[Tile]) -> bool:
    """Whether a tiling is one that measuring a step today may give."""
    return tile in (*tried, simple_tile(product_of_step(step)))


def product_of_step(step: Weighted) -> Product:
    """The matrix product that the kernel of a step computes."""
    return product_of(flattened(step) if isinstance(step, Convolve) else step)


def fastest(step: Weighted, tiles: Sequence[Tile], place: Place) -> Tile:
    """The tiling that takes least time; the one that always works where the device can run none of them."""
    product = product_of_step(step)
    device = place.view(step.out).device
    start = place.constant(first_sums(step))
    times: dict[Tile, float] = {}
    for tile in tiles:
        weights = torch.randint(-127, 128, (packed_size(product, tile),), dtype=torch.int8, device=device)
        weights = weights.to(TYPES[step.x.dtype])
        times[tile] = measured(launch_of(step, place, tile, weights, start))
    best = min(times, key=lambda tile: times[tile])
    return best if times[best] < math.inf else simple_tile(product)


def measured(launch: Launch) -> float:
    """Median milliseconds of a launch; infinite where the device cannot run it."""
    from triton.runtime.errors import OutOfResources

    try:
        launch()
    except OutOfResources:
        return math.inf
    return time_of(launch)


def times_of(launches: Sequence[Callable[[], None]]) -> list[float]:
    """Median milliseconds of each of some launches that have run before."""
    return [time_of(launch) for launch in launches]


def time_of(launch: Callable[[], None]) -> float:
    """Median milliseconds of a launch that has run before, several in a row, which wait for the GPU so that gaps do not count."""
    times: list[float] = []
    for _ in range(REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(IN_A_ROW):
            launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / IN_A_ROW)
    return sorted(times)[REPETITIONS // 2]


@dataclass(frozen=True)
class Stub:
    """Weights of which only the shape counts."""

    shape: tuple[int, ...]


def compile_ahead(jobs: Sequence[tuple[Weighted, Tile]]) -> None:
    """Compile kernels in as many processes as there are cores; whatever they miss is compiled when it is launched."""
    workers = min(len(os.sched_getaffinity(0)), -(-len(jobs) // 4))
    if workers < 2:
        return
    light: list[Any] = [(replace(step, weight=Stub(step.weight.shape)), tile) for step, tile in jobs]  # type: ignore[arg-type]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for worker in range(workers):
            job = Path(folder) / f"{worker}.pickle"
            job.write_bytes(pickle.dumps(light[worker::workers]))
            command = [sys.executable, "-m", "ptq3d.engines.triton.ahead", str(job)]
            running.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}))
        for process in running:
            process.wait()


def _file(device: torch.device) -> Path:
    import triton

    name = "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device))
    return cache_folder() / "triton" / f"{name}-{triton.__version__}-{VERSION}.json"


def _read(device: torch.device) -> dict[str, Tile]:
    """What was measured on this kind of device."""
    path = _file(device)
    if not path.is_file():
        return {}
    try:
        return {name: Tile(*values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineError(f"{path} cannot be read as measured tilings ({line_of(error)}). Delete it.") from error


def _write(device: torch.device, known: Mapping[str, Tile]) -> None:
    """Keep what was measured, beside what another process did meanwhile; a killed run leaves no half file."""
    path, known = _file(device), {**_read(device), **known}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: astuple(tile) for name, tile in known.items()}, indent=0)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as scratch:
        scratch.write(text)
    os.replace(scratch.name, path)
