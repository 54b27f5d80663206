"""Calibration windows: drawn where there is something to see, kept in a file, read as a stream, watched layer by layer."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.engines.base import Precision
from ptq3d.engines.openvino import tap
from ptq3d.errors import CalibrationError, FileError
from ptq3d.graphs.files import image_input, save_graph
from ptq3d.graphs.layers import parameter_count
from ptq3d.quantization.observation import Observations, Observer
from ptq3d.quantization.planning import Placement

Window = npt.NDArray[np.float32]
AT_ONCE = 3 << 30  # bytes of observed tensors; the runtime needs several times as much to hand them over
LEAST_AT_ONCE = 1 << 30  # of a network whose weights fill the memory
OBSERVED: Precision = "bf16"  # ranges and moments need no more, and half the time where the processor has it
SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class CalibrationWindows:
    """A stream of windows that can be read again and again without keeping them in memory.

    Args:
        path: `.npy` (n, C, X, Y, Z), or `.npz` with one (C, X, Y, Z) array a window.
        number: n.
        cases: case name -> SHA-256 of the image the windows were drawn from; empty for a foreign file.
    """

    path: Path
    number: int
    cases: Mapping[str, str]

    def __iter__(self) -> Iterator[Window]:
        """Each window as (1, C, X, Y, Z) float32."""
        if self.path.suffix == ".npy":
            for window in np.load(self.path, mmap_mode="r", allow_pickle=False):
                yield np.ascontiguousarray(window[None], np.float32)
            return
        with np.load(self.path, allow_pickle=False) as archive:
            for name in _window_names(archive.files):
                yield np.ascontiguousarray(archive[name][None], np.float32)


def _window_names(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith("window"))


def shares(number: int, cases: int) -> tuple[int, ...]:
    """How many of `number` windows each of the cases gives: as evenly as whole numbers allow."""
    return tuple(number * (index + 1) // cases - number * index // cases for index in range(cases))


def draw_windows(
    image: Window,
    window: tuple[int, int, int],
    number: int,
    *,
    foreground: npt.NDArray[np.bool_],
    generator: np.random.Generator,
) -> Iterator[Window]:
    """Random windows of one preprocessed case, each around a random foreground voxel.

    Args:
        image: (C, X, Y, Z) float32, preprocessed.
        window: (X, Y, Z); smaller images are padded with zeros at the end.
        number: how many.
        foreground: (X, Y, Z), True where windows may be centred; where it is all False, anywhere.
        generator: the source of randomness.

    Yields:
        (C, X, Y, Z) float32 windows.
    """
    grow = [(0, max(0, size - have)) for size, have in zip(window, image.shape[1:], strict=True)]
    padded = np.pad(image, [(0, 0), *grow])
    voxels = np.flatnonzero(foreground)
    shape = np.asarray(image.shape[1:])
    for _ in range(number):
        flat = voxels[generator.integers(len(voxels))] if len(voxels) else generator.integers(np.prod(shape))
        centre = np.asarray(np.unravel_index(flat, image.shape[1:]))
        start = np.clip(centre - np.asarray(window) // 2, 0, np.maximum(np.asarray(padded.shape[1:]) - window, 0))
        x, y, z = (slice(int(first), int(first) + size) for first, size in zip(start, window, strict=True))
        yield padded[:, x, y, z]


def save_windows(path: Path, windows: Iterable[Window], number: int, cases: Mapping[str, str]) -> None:
    """Write windows to `.npy` (one array, as the seed's tools read it) or `.npz` (with the cases they come from).

    Args:
        path: where to; written beside its place and renamed.
        windows: (C, X, Y, Z) float32 each, taken one at a time.
        number: how many they are, at least one.
        cases: case name -> SHA-256 of its image; read after the last window (a .npy has no place for them).

    Raises:
        FileError: another suffix.
        CalibrationError: no window is asked for.
    """
    if path.suffix not in SUFFIXES:
        raise FileError(f"{path}: calibration windows go into a .npy or .npz file.")
    if number < 1:
        raise CalibrationError(f"{number} calibration windows are asked for; at least one is needed.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        if path.suffix == ".npz":
            _save_npz(temporary, windows, cases)
        else:
            _save_npy(temporary, windows, number)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_npy(path: Path, windows: Iterable[Window], number: int) -> None:
    stored = None
    for index, window in enumerate(windows):
        if stored is None:
            stored = np.lib.format.open_memmap(path, "w+", np.float32, (number, *window.shape))
        stored[index] = window


def _save_npz(path: Path, windows: Iterable[Window], cases: Mapping[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index, window in enumerate(windows):
            _put(archive, f"window_{index:05d}", window.astype(np.float32, copy=False))
        _put(archive, "case_names", np.asarray(list(cases), dtype=np.str_))
        _put(archive, "case_sha256", np.asarray(list(cases.values()), dtype=np.str_))


def _put(archive: zipfile.ZipFile, name: str, array: npt.NDArray[np.generic]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def open_windows(path: Path, shape: tuple[int, int, int, int]) -> CalibrationWindows:
    """The windows of a calibration file, checked against the network that they calibrate.

    Args:
        path: a `.npy` or `.npz`.
        shape: (C, X, Y, Z) that the network takes.

    Raises:
        FileError: missing, truncated, or no NumPy file.
        CalibrationError: pickled objects, another shape, no window.
    """
    found, number, cases = described_windows(path)
    if not number or found != shape:
        raise CalibrationError(
            f"{path}: {number} windows of shape {found}, the network takes {shape}. "
            "Calibrate with the window and channels of this very network: `ptq3d calibrate --onnx-path`."
        )
    return CalibrationWindows(path, number, cases)


def described_windows(path: Path) -> tuple[tuple[int, ...], int, dict[str, str]]:
    """What a calibration file holds: the shape of a window, their number, and case name -> SHA-256 of its image.

    Raises:
        FileError: missing, truncated, or no NumPy file.
        CalibrationError: pickled objects.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such calibration file. Make one with `ptq3d calibrate`.")
    try:
        return _describe(path)
    except ValueError as error:
        if any(word in str(error) for word in ("pickle", "Object arrays", "Python objects")):
            raise CalibrationError(
                f"{path} holds pickled Python objects, which can run code when they are loaded, so it is refused. "
                "Save plain float32 arrays: np.save(path, windows.astype('float32'), allow_pickle=False)."
            ) from error
        raise FileError(f"{path} is no readable NumPy file ({error}). It may be truncated; make it again.") from error
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise FileError(f"{path} is no readable NumPy file ({error}). It may be truncated; make it again.") from error


def _describe(path: Path) -> tuple[tuple[int, ...], int, dict[str, str]]:
    """(shape of a window, number of windows, cases) without reading the windows of a .npy into memory."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return tuple(array.shape[1:]), len(array) if array.ndim else 0, {}
    with np.load(path, allow_pickle=False) as archive:
        if not hasattr(archive, "files"):
            raise FileError(f"{path} is no .npz archive, whatever its name says.")
        names = _window_names(archive.files)
        keys = archive["case_names"].tolist() if "case_names" in archive.files else []
        digests = archive["case_sha256"].tolist() if keys else []
        shape = archive[names[0]].shape if names else ()
    return tuple(shape), len(names), dict(zip(keys, digests, strict=True))


def require_finite(window: Window, *, where: str) -> None:
    """Refuse a window with NaN or infinite values.

    Raises:
        CalibrationError: with their number.
    """
    bad = int(window.size - np.isfinite(window).sum())
    if bad:
        raise CalibrationError(
            f"{where}: {bad} values are NaN or infinite. Repair the volume it was drawn from, or leave it out."
        )


def watch(
    model: ir.Model,
    tensors: Sequence[str],
    windows: Iterable[Window],
    *,
    precision: Precision = "fp32",
) -> Iterator[dict[str, Window]]:
    """The values of tensors, window by window, the image input among them if wanted.

    Raises:
        CalibrationError: a window holds NaN or infinite values.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "observed.onnx"
        save_graph(model, path)
        yield from _watched(path, str(image_input(model).name), tensors, windows, precision=precision)


def _watched(
    onnx: Path, image: str, tensors: Sequence[str], windows: Iterable[Window], *, precision: Precision
) -> Iterator[dict[str, Window]]:
    inner = [name for name in dict.fromkeys(tensors) if name != image]
    current: dict[str, Window] = {}

    def seen() -> Iterator[Window]:
        for number, window in enumerate(windows, 1):
            require_finite(window, where=f"calibration window {number}")
            current[image] = window
            yield window

    for values in tap(onnx, inner, seen(), precision=precision):
        yield {**values, **current}


def observe(model: ir.Model, placement: Placement, windows: Iterable[Window], number: int) -> Observations:
    """What the tensors and layers of a placement hold over all windows, in memory that does not grow with them.

    A network whose tensors take more than `AT_ONCE` bytes, less half of its weights' bytes, runs more than once, on windows that
    are kept in a file meanwhile.

    Args:
        model: the simplified FP32 graph.
        placement: what will be quantized at most; later placements may keep more in floating point.
        windows: each (1, C, X, Y, Z) float32; read once.
        number: how many they are.

    Raises:
        CalibrationError: a window or a tensor holds NaN or infinite values, or there is no window.
    """
    observer = Observer(model, placement, number)
    parts = observer.parts(max(AT_ONCE - 2 * parameter_count(model), min(AT_ONCE, LEAST_AT_ONCE)))
    image = str(image_input(model).name)
    with tempfile.TemporaryDirectory() as scratch:
        path, kept = Path(scratch) / "observed.onnx", windows
        save_graph(model, path)
        if len(parts) > 1:
            kept = CalibrationWindows(Path(scratch) / "windows.npz", number, {})
            save_windows(kept.path, (window[0] for window in windows), number, {})
        for part in parts:
            tensors = observer.tensors_of(part)
            for values in _watched(path, image, tensors, kept, precision=OBSERVED):
                observer.see(values, part)
    return observer.finish()
