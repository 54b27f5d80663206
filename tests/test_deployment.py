"""`ptq3d deploy`: late head, mirrored windows, ensembles, crops, faults, memory; against MONAI, SciPy and NumPy."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from onnx import numpy_helper
from scipy.ndimage import map_coordinates
from torch import Tensor

from networks import NETWORKS, WINDOW, Builder, windows
from ptq3d import compare as comparison
from ptq3d import windows as blending
from ptq3d.artefacts import build_artefact, cached_artefact
from ptq3d.cli import main
from ptq3d.datasets.cases import Case
from ptq3d.deployment import STREAMS, CaseResult, deploy, prepare
from ptq3d.engines import BACKENDS, get_backend, load_backend
from ptq3d.engines.base import EngineOptions
from ptq3d.engines.openvino import OpenVinoEngine
from ptq3d.errors import EngineError, FileError, OptionError
from ptq3d.graphs.files import save_graph
from ptq3d.options import DeployOptions
from ptq3d.predict import LABELLING_BYTES, Needed, require_memory
from ptq3d.quantization import qdq
from ptq3d.volumes.files import load_image
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.volume import Volume
from quantizing import graph, planned, run

Predictor = Callable[[Tensor], Tensor]
INTENSITY = '[[intensity]]\nrule = "window"\nlow = 0.0\nhigh = 1.0\n'
SPACED = "spacing = [1.7, 2.2, 2.5]\n" + INTENSITY
AFFINE = np.array([[-2.0, 0, 0, 7], [0, 2.0, 0, -3], [0, 0, 3.0, 11], [0, 0, 0, 1]])
RAS = np.diag([2.0, 2.0, 3.0, 1.0])
SHAPE = (13, 15, 11)
TIE = 1e-4  # logits spread over more than 1: rounding of float32 moves them by less
CLASSES = 13
STEPS = ["read", "preprocess", "network", "stitch", "write"]


def widened(network: str, path: Path, classes: int = CLASSES) -> Path:
    """A network of `NETWORKS` whose last layer is a 1x1x1 convolution to more classes than it reads features."""
    path.write_bytes(_widened(network, classes))
    return path


@cache
def _widened(network: str, classes: int) -> bytes:
    """Its logits are spread so that every class wins somewhere."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "n.onnx"
        model = onnx.load(NETWORKS[network](path))
        nodes, output = model.graph.node, model.graph.output[0]
        channels = output.type.tensor_type.shape.dim[1]
        if nodes[-1].op_type == "Conv":
            head = nodes.pop()
            channels.dim_value = next(one.dims[1] for one in model.graph.initializer if one.name == head.input[1])
            for node in nodes:
                node.output[0] = "logits" if node.output[0] == head.input[0] else node.output[0]
        onnx.save(model, path)
        features = run("torch", path, windows(2))
    source, (mean, spread) = nodes[-1], (statistic(features, axis=(0, 2, 3, 4)) for statistic in (np.mean, np.std))
    matrix = np.random.default_rng(classes).normal(size=(classes, len(mean))) / spread
    weights = {"late_weight": matrix[:, :, None, None, None], "late_bias": -matrix @ mean}
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    source.output[0], channels.dim_value = "features", classes
    nodes.append(onnx.helper.make_node("Conv", ["features", *weights], ["logits"], name="last"))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def two_layers(path: Path, window: tuple[int, int, int], features: int = 4, classes: int = CLASSES) -> Path:
    b = Builder(6)
    b.conv(b.add("Relu", b.conv("image", 1, features)), features, classes, kernel=1)
    return b.save(path, "logits", classes, window)


def int8(path: Path, target: str) -> Path:
    model, output = graph(path), path.with_name(f"{path.stem}_{target}.onnx")
    save_graph(qdq.write(model, planned(model, target)), output)
    return output


def write_volume(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@dataclass(frozen=True)
class Bench:
    """A folder of three volumes of different sizes on a flipped grid that the network sees with another spacing."""

    root: Path
    net: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def spaced(self) -> Path:
        return self.root / "spaced.toml"

    @property
    def plain(self) -> Path:
        return self.root / "plain.toml"

    def run(self, name: str = "out", **changed: Any) -> tuple[CaseResult, ...]:
        given = {"model": self.net, "data": self.images, "preprocessing": str(self.spaced), "quiet": True}
        return deploy(DeployOptions(**{**given, "output": self.root / name, **changed}))

    def one(self, name: str = "out", **changed: Any) -> np.ndarray:
        """The labels of a single case."""
        (result,) = self.run(name, **changed)
        return labels(result)

    def cli(self, *more: str) -> int:
        return main(["deploy", "--model", str(self.net), "--data", str(self.images), "--output", str(self.root / "out"),
                     "--preprocessing", str(self.spaced), "--report", str(self.root / "report.json"), *more])  # fmt: skip

    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "report.json").read_text())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path, widened("meshnet", tmp_path / "net.onnx"))
    bench.spaced.write_text(SPACED)
    bench.plain.write_text(INTENSITY)
    for seed, (name, shape) in enumerate({"a": SHAPE, "b": (9, 15, 12), "c": (14, 10, 16)}.items()):
        write_volume(bench.images / f"{name}.nii.gz", windows(1, seed=20 + seed, shape=shape)[0])
    return bench


def labels(result: CaseResult) -> np.ndarray:
    if result.error is not None:
        raise result.error
    return np.asarray(nib.load(result.labels).dataobj)


def network(onnx_path: Path, engine: str = "torch") -> Predictor:
    """The whole network, whose last layer no one took off."""
    folder, manifest = cached_artefact(onnx_path, engine, late_head=False)
    assert manifest.engine["head"] == "whole: asked for"
    options = EngineOptions(streams=STREAMS)  # with another share of the threads sums round otherwise
    opened = get_backend(engine).open(folder, options)
    return lambda x: torch.from_numpy(np.ascontiguousarray(opened(x.numpy())))


def prepared(path: Path, rules: Path) -> Volume:
    return Preprocessing.load(rules).apply(load_image(path))


def blended(image: np.ndarray, predictor: Predictor, overlap: float = 0.5) -> np.ndarray:
    """(K, X, Y, Z) logits of a (1, X, Y, Z) image: MONAI's sliding window."""
    batch = torch.from_numpy(np.ascontiguousarray(image))[None]
    return sliding_window_inference(batch, WINDOW, 1, predictor, overlap=overlap, mode="gaussian")[0].numpy()


def places(target: nib.Nifti1Image, affine: np.ndarray) -> np.ndarray:
    """(3, X, Y, Z) voxel coordinates in `affine` of the voxels of a file."""
    to_source = np.linalg.inv(affine) @ target.affine
    voxels = np.indices(target.shape).reshape(3, -1)
    return (to_source[:3, :3] @ voxels + to_source[:3, 3:]).reshape(3, *target.shape)


def on_file(logits: np.ndarray, affine: np.ndarray, target: nib.Nifti1Image) -> np.ndarray:
    """Linearly resampled by SciPy; beyond the border its nearest voxel."""
    where = places(target, affine).round(9)
    return np.stack([map_coordinates(one.astype(np.float64), where, order=1, mode="nearest") for one in logits])


def logits_on_file(path: Path, rules: Path, predictor: Predictor) -> np.ndarray:
    image = prepared(path, rules)
    return on_file(blended(image.data, predictor), image.affine, nib.load(path))


def assert_best(found: np.ndarray, logits: np.ndarray, *, winners: int = 3, allowed: int = 2) -> None:
    """The labels are the argmax; where they are not, up to `allowed` voxels, the two logits are equal up to rounding."""
    best = logits.argmax(0)
    assert len(np.unique(best)) >= winners  # else nothing is tested
    assert np.ptp(logits) > 1
    assert found.shape == best.shape
    wrong = found != best
    chosen = np.take_along_axis(logits, found[None].astype(np.int64), axis=0)[0]
    assert (logits.max(0) - chosen).max() <= TIE
    assert wrong.sum() <= allowed


# ---------------------------------------------------------------------------------------------------------------- late head


# "inductor" runs the torch engine's graph, and compiles for many seconds: tests/laws/test_engines.py holds them equal
# "triton" takes its own target only and rounds floats to FP16: tests/engines/triton/test_triton_cases.py segments with it
@pytest.fixture(params=[name for name in BACKENDS if name not in ("inductor", "triton")])
def engine(request: pytest.FixtureRequest) -> str:
    reason = load_backend(request.param).unavailable()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("which", NETWORKS)
def test_the_late_head_changes_no_label(which: str, engine: str, kind: str, bench: Bench) -> None:
    """Two ways through ptq3d, and a third through MONAI and SciPy with the engine's own windows."""
    net = widened(which, bench.root / f"{which}.onnx")
    net = int8(net, engine if engine in ("openvino", "onnxruntime") else "openvino") if kind == "int8" else net
    case = bench.images / "a.nii.gz"
    logits = logits_on_file(case, bench.spaced, network(net, engine))
    for late_head in (True, False):
        found = bench.one(str(late_head), model=net, data=case, engine=engine, late_head=late_head)
        assert_best(found, logits)
    assert "late head" in cached_artefact(net, engine)[1].engine["head"]


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("unet", "whole: 8 features are no fewer than the 5 classes they make"),
        ("attention", "whole: the last layer is ConvTranspose, no linear map over channels with constant weights"),
    ],
)
def test_networks_without_a_late_head_stay_whole_and_say_why(which: str, said: str, bench: Bench) -> None:
    net = NETWORKS[which](bench.root / "n.onnx")
    folder, manifest = cached_artefact(net, "openvino")
    assert manifest.engine["head"] == said
    assert "head.npz" not in manifest.engine["files"]
    case = bench.images / "a.nii.gz"
    logits = logits_on_file(case, bench.spaced, network(net))
    assert_best(bench.one(model=folder, data=case), logits, winners=2)


def test_an_engine_with_a_late_head_says_so_and_is_not_used_as_a_whole_one(bench: Bench) -> None:
    folders = {late: bench.root / f"engine-{late}" for late in (True, False)}
    built = {late: build_artefact(bench.net, folder, "openvino", late_head=late) for late, folder in folders.items()}
    assert built[True].engine["head"] == "late head: 6 features for 13 classes"
    assert "head.npz" in built[True].engine["files"]
    assert built[False].engine["head"] == "whole: asked for"
    case = bench.images / "a.nii.gz"
    with pytest.raises(OptionError, match="head apart"):
        bench.run("refused", model=folders[True], data=case, late_head=False)
    assert not (bench.root / "refused").exists()
    logits = logits_on_file(case, bench.spaced, network(bench.net))
    for late, folder in folders.items():
        assert_best(bench.one(f"out-{late}", model=folder, data=case, late_head=late), logits)


def test_layers_hold_the_late_head_in_fp32(engine: str, bench: Bench) -> None:
    for net in (bench.net, int8(bench.net, "openvino")):
        reports = {}
        for late in (True, False):
            folder, _ = cached_artefact(net, engine, late_head=late)
            with get_backend(engine).open(folder, EngineOptions()) as opened:
                reports[late] = opened.layers()
        *_, last = reports[True]
        assert (last.name, last.precision, last.macs) == ("late head", "fp32", CLASSES * 6 * int(np.prod(WINDOW)))
        assert sum(one.macs for one in reports[True]) == sum(one.macs for one in reports[False])
        assert "late head" not in [one.name for one in reports[False]]


# ---------------------------------------------------------------------------------------------------- mirrors and ensembles


def flipping(predictor: Predictor, axes: str) -> Predictor:
    """The mean over all mirror images of a window, by hand."""

    def mean(x: Tensor) -> Tensor:
        places = ["xyz".index(axis) + 2 for axis in axes]
        flips = [flip for number in range(len(places) + 1) for flip in combinations(places, number)]
        return torch.stack([predictor(x.flip(flip)).flip(flip) for flip in flips]).mean(0)

    return mean


@pytest.mark.parametrize("axes", ["x", "z", "xy"])
def test_mirrored_windows_are_averaged(axes: str, bench: Bench) -> None:
    """The axes are the network's, whose x runs against the file's."""
    case = bench.images / "a.nii.gz"
    found = bench.one(data=case, tta=axes)
    assert_best(found, logits_on_file(case, bench.spaced, flipping(network(bench.net), axes)))
    assert (found != bench.one("plain", data=case)).mean() > 0.01  # mirrors matter
    np.testing.assert_array_equal(bench.one("turned", data=case, tta=axes[::-1]), found)


@pytest.mark.parametrize("axes", ["xx", "w", "xyw", "X"])
def test_axes_that_do_not_exist_or_come_twice_are_refused(axes: str, bench: Bench) -> None:
    with pytest.raises(OptionError, match=f"--tta {axes}"):
        bench.run(tta=axes)
    assert not (bench.root / "out").exists()


def mean_of(*predictors: Predictor) -> Predictor:
    return lambda x: torch.stack([predictor(x) for predictor in predictors]).mean(0)


@pytest.mark.parametrize("engine_name", ["openvino", "torch"])
def test_an_ensemble_is_the_argmax_of_the_mean_of_logits(engine_name: str, bench: Bench) -> None:
    """Two late heads of different features; mirrored together, too; and two networks that stay whole."""
    case, other = bench.images / "a.nii.gz", widened("unet", bench.root / "other.onnx")
    both = mean_of(network(bench.net), network(other))
    found = bench.one("two", data=case, ensemble=(other,), engine=engine_name)
    assert_best(found, logits_on_file(case, bench.spaced, both))
    for alone in (bench.net, other):
        assert (found != bench.one(f"alone-{alone.stem}", model=alone, data=case)).mean() > 0.01
    mirrored = bench.one("mirrored", data=case, ensemble=(other,), tta="y", engine=engine_name)
    assert_best(mirrored, logits_on_file(case, bench.spaced, flipping(both, "y")))
    five, whole = widened("meshnet", bench.root / "five.onnx", 5), NETWORKS["unet"](bench.root / "whole.onnx")
    mixed = mean_of(network(five), network(whole))
    assert_best(
        bench.one("mixed", model=five, data=case, ensemble=(whole,), engine=engine_name),
        logits_on_file(case, bench.spaced, mixed),
    )


def test_an_ensemble_of_a_late_head_and_a_whole_network(bench: Bench) -> None:
    """Features of one stand beside logits of the other."""
    case, whole = bench.images / "a.nii.gz", bench.root / "whole.onnx"
    two_layers(whole, WINDOW, features=CLASSES + 2)
    assert "whole: " in cached_artefact(whole, "openvino")[1].engine["head"]
    both = mean_of(network(bench.net), network(whole), network(whole))
    found = bench.one(data=case, ensemble=(whole, whole))
    assert_best(found, logits_on_file(case, bench.spaced, both))


def test_networks_of_other_windows_or_classes_are_not_averaged(bench: Bench) -> None:
    window = two_layers(bench.root / "window.onnx", (8, 12, 12))
    classes = widened("unet", bench.root / "classes.onnx", CLASSES + 1)
    for other, what in ((window, "window"), (classes, "labels")):
        with pytest.raises(OptionError, match=f"another '{what}' than the model"):
            bench.run(ensemble=(other,))
        assert bench.cli("--ensemble", str(other), "--quiet") == 2
    assert not (bench.root / "out").exists()


# ----------------------------------------------------------------------------------------------------- crop and empty windows


@pytest.fixture
def bordered(bench: Bench) -> tuple[Path, tuple[slice, slice, slice]]:
    """A volume with air around a box, and the box."""
    data, box = np.zeros((22, 21, 18), np.float32), (slice(5, 18), slice(3, 17), slice(4, 15))
    data[box] = 0.1 + 0.9 * windows(1, seed=30, shape=data[box].shape)[0]
    return write_volume(bench.root / "bordered.nii.gz", data), box


@pytest.mark.parametrize("restore", ["logits", "labels"])
def test_a_crop_is_the_cropped_file_and_background_around_it(
    restore: str, bench: Bench, bordered: tuple[Path, tuple[slice, slice, slice]]
) -> None:
    path, box = bordered
    image, shift = nib.load(path), np.eye(4)
    shift[:3, 3] = [part.start for part in box]
    small = write_volume(bench.root / "small.nii.gz", image.get_fdata(dtype=np.float32)[box], image.affine @ shift)
    options = {"preprocessing": str(bench.plain), "restore": restore}
    found = bench.one("cropped", data=path, crop="foreground", **options)
    whole, alone = bench.one("whole", data=path, **options), bench.one("alone", data=small, **options)
    np.testing.assert_array_equal(found[box], alone)
    around = np.ones(found.shape, bool)
    around[box] = False
    assert not found[around].any()
    assert whole[around].any()  # the network says something else there, and beside the border inside
    assert (whole[box] != alone).any()
    assert len(np.unique(alone)) >= 3


@pytest.mark.parametrize("restore", ["logits", "labels"])
def test_a_crop_on_another_spacing(
    restore: str, bench: Bench, bordered: tuple[Path, tuple[slice, slice, slice]]
) -> None:
    """The box is that of the resampled image; half a voxel around its outer voxels still belongs to it."""
    path, _ = bordered
    image, file = prepared(path, bench.spaced), nib.load(path)
    inner = np.argwhere(image.data[0] > image.data.min())
    first, size = inner.min(0), np.ptp(inner, axis=0) + 1
    assert (first > 0).all()
    part = tuple(slice(one, one + wide) for one, wide in zip(first, size, strict=True))
    logits, shift = blended(image.data[0][part][None], network(bench.net)), np.eye(4)
    shift[:3, 3] = first
    found = bench.one(data=path, crop="foreground", restore=restore)
    if restore == "labels":
        whole = np.zeros(image.shape, np.uint8)
        whole[part] = logits.argmax(0)
        wanted = Preprocessing.load(bench.spaced).restore_labels(whole, load_image(path).grid).data[0]
        np.testing.assert_array_equal(found, wanted)
        return
    where = places(file, image.affine @ shift)
    inside = np.logical_and.reduce([(one >= -0.5) & (one <= wide - 0.5) for one, wide in zip(where, size, strict=True)])
    assert 0.1 < inside.mean() < 0.9
    resampled = on_file(logits, image.affine @ shift, file)
    assert not found[~inside].any()
    resampled[1:, ~inside], resampled[0, ~inside] = 0, 9
    assert_best(found, resampled)


@pytest.mark.parametrize("restore", ["logits", "labels"])
def test_empty_windows_are_not_asked_and_are_background(restore: str, bench: Bench) -> None:
    """Blended by hand over the windows that hold something."""
    data = np.zeros((40, *SHAPE[1:]), np.float32)
    data[3:15] = 0.1 + 0.9 * windows(1, seed=31, shape=data[3:15].shape)[0]
    path = write_volume(bench.root / "air.nii.gz", data, RAS)
    boxes = dense_patch_slices(data.shape, WINDOW, (4, 6, 5))
    full = [box for box in boxes if np.ptp(data[box]) > 0]
    predictor, importance = network(bench.net), compute_importance_map(WINDOW, "gaussian", 0.125).numpy()
    total, weight = np.zeros((CLASSES, *data.shape)), np.zeros(data.shape)
    for box in full:
        total[:, *box] += predictor(torch.from_numpy(data[box].copy())[None, None])[0].numpy() * importance
        weight[box] += importance
    seen = weight > 0
    logits = np.where(seen, total / np.where(seen, weight, 1), np.eye(CLASSES)[0][:, None, None, None])
    options = {"data": path, "preprocessing": str(bench.plain), "restore": restore}
    (skipped,), (every,) = bench.run("skipped", skip_empty=True, **options), bench.run("every", **options)
    assert (skipped.windows, every.windows) == (len(full), len(boxes))
    assert 0 < len(full) < len(boxes)
    assert_best(labels(skipped), logits)
    assert not labels(skipped)[~seen].any()
    assert labels(every)[~seen].any()


def test_without_empty_windows_nothing_changes_and_of_nothing_else_all_is_background(bench: Bench) -> None:
    for result, plain in zip(bench.run("skip", skip_empty=True), bench.run("plain"), strict=True):
        assert result.windows == plain.windows
        np.testing.assert_array_equal(labels(result), labels(plain))
    path = write_volume(bench.root / "air.nii.gz", np.zeros(SHAPE, np.float32))
    (empty,) = bench.run("empty", data=path, skip_empty=True)
    assert (empty.windows, empty.windows_per_second) == (0, 0)
    assert not labels(empty).any()
    assert labels(empty).shape == SHAPE
    assert bench.one("cropped", data=path, crop="foreground").any()  # nothing stands out: all of it is segmented


# ------------------------------------------------------------------------------------------------------------------- restore


def test_restored_labels_are_the_nearest_ones_of_the_preprocessed_grid(bench: Bench) -> None:
    rules, predictor = Preprocessing.load(bench.spaced), network(bench.net)
    for result in bench.run(restore="labels"):
        path = bench.images / result.labels.name
        logits = blended(prepared(path, bench.spaced).data, predictor)
        ordered = np.sort(logits, axis=0)
        assert (ordered[-1] - ordered[-2]).min() > TIE / 10  # no ties: equal to the voxel
        wanted = rules.restore_labels(logits.argmax(0).astype(np.uint8), load_image(path).grid).data[0]
        np.testing.assert_array_equal(labels(result), wanted)
        linear = logits_on_file(path, bench.spaced, predictor).argmax(0)
        assert (linear != wanted).any()


# -------------------------------------------------------------------------------------------------------- cases side by side


def test_the_command_line_passes_every_option_on(bench: Bench) -> None:
    """All at once, on a volume with air, against the same by hand."""
    other = widened("unet", bench.root / "other.onnx")
    for name in "ab":
        (bench.images / f"{name}.nii.gz").unlink()
    path = bench.images / "c.nii.gz"
    data = np.zeros((30, 16, 12), np.float32)
    data[3:12, 2:, :] = 0.1 + 0.9 * windows(1, seed=33, shape=(9, 14, 12))[0]
    write_volume(path, data)
    flags = ["--tta", "xy", "--ensemble", str(other), "--crop", "foreground", "--skip-empty", "--restore", "labels",
             "--no-late-head", "--max-memory", "1000", "--threads", "1", "--quiet"]  # fmt: skip
    assert bench.cli(*flags) == 0
    image = prepared(path, bench.spaced)
    inner = np.argwhere(image.data[0] > 0)
    part = tuple(slice(low, high + 1) for low, high in zip(inner.min(0), inner.max(0), strict=True))
    logits = blended(image.data[0][part][None], flipping(mean_of(network(bench.net), network(other)), "xy"))
    whole = np.zeros(image.shape, np.uint8)
    whole[part] = logits.argmax(0)
    wanted = Preprocessing.load(bench.spaced).restore_labels(whole, load_image(path).grid).data[0]
    np.testing.assert_array_equal(np.asarray(nib.load(bench.root / "out/c.nii.gz").dataobj), wanted)
    assert len(np.unique(wanted)) >= 3


def test_several_cases_are_each_case_alone_with_any_number_of_threads(bench: Bench) -> None:
    predictor = network(bench.net)
    results = bench.run("all")
    assert [result.name for result in results] == ["a", "b", "c"]
    for result, single in zip(results, bench.run("single", threads=1), strict=True):
        path = bench.images / f"{result.name}.nii.gz"
        assert result.labels == bench.root / "all" / path.name
        np.testing.assert_array_equal(bench.one(f"alone-{result.name}", data=path), labels(result))
        logits = logits_on_file(path, bench.spaced, predictor)
        assert_best(labels(result), logits)
        assert_best(labels(single), logits)
        np.testing.assert_array_equal(nib.load(result.labels).affine, nib.load(path).affine)


@pytest.mark.parametrize("threads", [0, 1])
def test_seconds_and_windows_are_told(threads: int, bench: Bench) -> None:
    for result in bench.run(threads=threads):
        assert list(result.seconds) == [*STEPS, "total"]
        assert result.seconds["total"] == pytest.approx(sum(result.seconds[step] for step in STEPS))
        assert all(result.seconds[step] > 0 for step in STEPS)
        shape = prepared(bench.images / result.labels.name, bench.spaced).shape
        padded = tuple(max(size, wide) for size, wide in zip(shape, WINDOW, strict=True))
        assert result.windows == len(dense_patch_slices(padded, WINDOW, (4, 6, 5)))
        assert result.windows_per_second == result.windows / (result.seconds["network"] + result.seconds["stitch"])


def test_overlap_decides_the_number_of_windows(bench: Bench) -> None:
    case = bench.images / "c.nii.gz"
    image = prepared(case, bench.spaced)
    (result,) = bench.run(data=case, overlap=0.0)
    padded = tuple(max(size, wide) for size, wide in zip(image.shape, WINDOW, strict=True))
    assert result.windows == len(dense_patch_slices(padded, WINDOW, WINDOW))
    logits = on_file(blended(image.data, network(bench.net), overlap=0.0), image.affine, nib.load(case))
    assert_best(labels(result), logits)


# -------------------------------------------------------------------------------------------------------------------- faults


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def break_gently(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("threads", [0, 1])
def test_an_unreadable_file_ends_its_case_only(threads: int, bench: Bench) -> None:
    good = [labels(result) for result in bench.run("good")]
    break_gently(bench.images / "b.nii.gz")
    first, second, third = bench.run(threads=threads)
    assert isinstance(second.error, FileError)
    assert "b.nii.gz" in str(second.error)
    assert (second.name, second.windows, dict(second.seconds)) == ("b", 0, {})
    assert set(contents(bench.root / "out")) == {"a.nii.gz", "c.nii.gz"}
    np.testing.assert_array_equal(labels(first), good[0])
    np.testing.assert_array_equal(labels(third), good[2])


def test_the_command_line_tells_of_unreadable_files(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "bc":
        break_gently(bench.images / f"{name}.nii.gz")
    assert bench.cli() == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("FileError: 2 of 3 cases failed, the others are written. b: ")
    assert "c.nii.gz" in line
    assert " a " in said.out
    report = bench.report()
    assert [row["case"] for row in report["cases"]] == ["a"]
    assert set(report["failed"]) == {"b", "c"}
    assert report["failed"]["b"].startswith("FileError: ")
    assert set(contents(bench.root / "out")) == {"a.nii.gz"}


def test_a_run_without_failures_reports_none(bench: Bench) -> None:
    assert bench.cli("--quiet") == 0
    report = bench.report()
    assert report["failed"] == {}
    assert [row["case"] for row in report["cases"]] == ["a", "b", "c"]
    for row, result in zip(report["cases"], bench.run("again"), strict=True):
        assert set(row["seconds"]) == {*STEPS, "total"}
        assert row["windows"] == result.windows


def fail_on_second(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """OpenVINO breaks in the second case, after some windows."""
    real, calls = OpenVinoEngine.stream, []

    def stream(self: OpenVinoEngine, given: Iterable[Tensor]) -> Iterator[Tensor]:
        calls.append(0)
        with closing(real(self, given)) as answers:  # type: ignore[type-var]
            for number, answer in enumerate(answers):
                if len(calls) == 2 and number == after:
                    raise EngineError("the device fell asleep")
                yield answer

    monkeypatch.setattr(OpenVinoEngine, "stream", stream)


@pytest.mark.parametrize("after", [0, 3])
def test_an_engine_that_fails_ends_its_case_only(
    after: int, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [labels(result) for result in bench.run("good")]
    fail_on_second(monkeypatch, after)
    assert bench.cli("--quiet") == 1
    assert "EngineError: 1 of 3 cases failed, the others are written. b: the device" in capsys.readouterr().err
    assert bench.report()["failed"] == {"b": "EngineError: the device fell asleep"}
    assert set(contents(bench.root / "out")) == {"a.nii.gz", "c.nii.gz"}
    for name, wanted in (("a", good[0]), ("c", good[2])):
        np.testing.assert_array_equal(np.asarray(nib.load(bench.root / f"out/{name}.nii.gz").dataobj), wanted)


def test_of_several_faults_the_gravest_gives_the_exit_code(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_gently(bench.images / "a.nii.gz")
    fail_on_second(monkeypatch, 0)  # the first case never reaches the network: c is the second
    assert bench.cli("--quiet") == 1
    assert "EngineError: 2 of 3 cases failed" in capsys.readouterr().err
    assert bench.report()["failed"].keys() == {"a", "c"}


def test_a_case_that_outgrows_the_memory_ends_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Preprocessing.apply

    def apply(self: Preprocessing, volume: Volume) -> Volume:
        if volume.shape == (9, 15, 12):
            raise MemoryError("unable to allocate 9 EiB")
        return real(self, volume)

    monkeypatch.setattr(Preprocessing, "apply", apply)
    first, second, third = bench.run()
    assert isinstance(second.error, EngineError)
    assert "9 EiB" in str(second.error)
    assert first.error is third.error is None


def test_a_full_disk_leaves_no_part_of_a_file(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nib.save

    def save(image: nib.Nifti1Image, path: Path) -> None:
        if Path(path).name.startswith(".b."):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(image, path)

    monkeypatch.setattr(nib, "save", save)
    first, second, third = bench.run()
    assert isinstance(second.error, FileError)
    assert "No space left" in str(second.error)
    assert first.error is third.error is None
    assert set(contents(bench.root / "out")) == {"a.nii.gz", "c.nii.gz"}


def child(code: str, bench: Bench) -> subprocess.Popen[str]:
    """A process of its own; sys.argv[1] is the bench's root."""
    given = [sys.executable, "-c", code, str(bench.root)]
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


FULL = """
import resource, sys
from ptq3d.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
root = sys.argv[1]
sys.exit(main(["deploy", "--model", root + "/net.onnx", "--data", root + "/images", "--output", root + "/out",
               "--preprocessing", root + "/spaced.toml", "--quiet"]))
"""


def test_a_limit_of_the_system_leaves_no_part_of_a_file(bench: Bench) -> None:
    sizes = [result.labels.stat().st_size for result in bench.run("good")]  # builds the engine, too
    assert min(sizes) > 400
    with child(FULL, bench) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "FileError: 3 of 3 cases failed" in said
    assert "File too large" in said
    assert contents(bench.root / "out") == {}


STUCK = """
import sys, threading, time
from pathlib import Path
import nibabel
from ptq3d.deployment import deploy
from ptq3d.engines.openvino import OpenVinoEngine
from ptq3d.options import DeployOptions

root, writing = Path(sys.argv[1]), threading.Event()
real_save, real_stream, streams = nibabel.save, OpenVinoEngine.stream, []

def save(image, path):
    real_save(image, path)
    if Path(path).name.startswith(".b."):
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        writing.set()
        time.sleep(600)

def stream(self, windows):
    streams.append(0)
    answers = real_stream(self, windows)
    yield next(answers)
    if len(streams) == 3 and writing.wait(60):
        print("stuck", flush=True)
        time.sleep(600)
    yield from answers

nibabel.save, OpenVinoEngine.stream = save, stream
deploy(DeployOptions(model=root / "net.onnx", data=root / "images", output=root / "out",
                     preprocessing=str(root / "spaced.toml"), quiet=True))
"""


def test_a_killed_run_leaves_whole_files_only_and_can_be_run_again(bench: Bench) -> None:
    """Killed while the second label map is half written and the third case is in the network."""
    good = {result.labels.name: labels(result) for result in bench.run("good")}
    with child(STUCK, bench) as process:
        assert process.stdout is not None
        reached = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    assert reached == "stuck", said
    assert process.returncode == -signal.SIGKILL
    out = bench.root / "out"
    assert {name for name in contents(out) if not name.startswith(".")} == {"a.nii.gz"}
    assert len(contents(out)) == 2  # the half one is there, under a name that no one reads
    gzip.decompress((out / "a.nii.gz").read_bytes())
    np.testing.assert_array_equal(np.asarray(nib.load(out / "a.nii.gz").dataobj), good["a.nii.gz"])
    for result in bench.run():
        np.testing.assert_array_equal(labels(result), good[result.labels.name])


def test_an_image_is_never_overwritten(bench: Bench) -> None:
    """Not even the last of several, nor through a link; nothing is written before that is known."""
    before = contents(bench.images)
    with pytest.raises(OptionError, match="would be overwritten"):
        bench.run(output=bench.images)
    assert contents(bench.images) == before
    link = bench.root / "link"
    link.symlink_to(bench.images)
    with pytest.raises(OptionError, match="would be overwritten"):
        bench.run(output=link)
    assert contents(bench.images) == before
    out = bench.root / "mixed"
    out.mkdir()
    (out / "c.nii.gz").write_bytes((bench.images / "c.nii.gz").read_bytes())
    (bench.images / "c.nii.gz").unlink()
    (bench.images / "c.nii.gz").symlink_to(out / "c.nii.gz")
    before = contents(out)
    with pytest.raises(OptionError, match=r"c\.nii\.gz is an input"):
        bench.run(output=out)
    assert contents(out) == before


def test_true_labels_are_never_overwritten(bench: Bench) -> None:
    truth = bench.root / "truth"
    bench.run(output=truth)
    before = contents(truth)
    with pytest.raises(OptionError, match=r"truth/a\.nii\.gz is an input"):
        bench.run(labels=truth, output=truth)
    assert contents(truth) == before


# -------------------------------------------------------------------------------------------------------------------- memory


def test_too_little_memory_is_refused_before_anything_is_written(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError, match=r"a would need about \d+\.\d\d GB .*more than --max-memory 0\.001"):
        bench.run(max_memory=0.001)
    assert bench.cli("--max-memory", "0.001", "--quiet") == 2
    assert "OptionError: a would need about" in capsys.readouterr().err
    assert not (bench.root / "out").exists()


def test_an_unreadable_case_does_not_end_the_others_for_want_of_an_estimate(bench: Bench) -> None:
    (bench.images / "b.nii.gz").write_bytes(b"nonsense")
    first, broken, third = bench.run(max_memory=1e3)
    assert broken.error is not None
    assert first.labels.exists()
    assert third.labels.exists()


def test_the_next_case_counts_where_it_is_read_meanwhile() -> None:
    needed = {"a": Needed(reading=10, segmenting=30), "b": Needed(reading=25, segmenting=5)}
    require_memory(needed, 85, 30, ahead=True)
    with pytest.raises(OptionError, match=r"a would need .* reading the next one beside it"):
        require_memory(needed, 84, 30, ahead=True)
    require_memory(needed, 60, 30, ahead=False)
    with pytest.raises(OptionError, match="a would need"):
        require_memory(needed, 59, 30, ahead=False)


@pytest.mark.parametrize("kind", ["sheared", "with slope"])
def test_the_estimate_holds_for_files_that_need_more(bench: Bench, kind: str) -> None:
    two_layers(bench.root / "large.onnx", (32, 32, 32), features=8, classes=20)
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    if kind == "sheared":
        affine[0, 2] = 0.3
    image = nib.Nifti1Image(np.arange(120 * 120 * 100, dtype=np.int16).reshape(120, 120, 100), affine)
    if kind == "with slope":
        image.header.set_slope_inter(0.5, 1.0)
    nib.save(image, bench.root / "large.nii.gz")
    with child(GROWTH, bench) as process:
        told, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    estimated, added, _ = json.loads(told.splitlines()[-1])
    assert added <= estimated


def test_torch_without_memory_ends_its_case_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says it by a RuntimeError."""
    made = 0

    def hungry(*given: object, **named: object) -> object:
        nonlocal made
        made += 1
        return torch.zeros(10**15) if made == 2 else kind(*given, **named)

    kind = blending._Blended
    monkeypatch.setattr(blending, "_Blended", hungry)
    first, second, third = bench.run(threads=1)
    assert isinstance(second.error, EngineError)
    assert "memory" in str(second.error)
    assert first.error is third.error is None


def test_enough_memory_changes_nothing(bench: Bench) -> None:
    for result, plain in zip(bench.run("limited", max_memory=1e3), bench.run("plain"), strict=True):
        np.testing.assert_array_equal(labels(result), labels(plain))


GROWTH = """
import json, sys
from pathlib import Path
from ptq3d import deployment
from ptq3d.memory import peak_memory_bytes
from ptq3d.options import DeployOptions

root, told = Path(sys.argv[1]), {}

def note(needed, limit, resident, *, ahead):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    told.update(one=max(needed["large"].reading, needed["large"].segmenting), resident=resident)

deployment.require_memory = note
(result,) = deployment.deploy(DeployOptions(model=root / "large.onnx", data=root / "large.nii.gz", output=root / "out",
                              preprocessing=str(root / "spaced.toml"), overlap=0.25, max_memory=1.0, quiet=True))
if result.error is not None:
    raise result.error
print(json.dumps([told["one"], peak_memory_bytes() - told["resident"], result.windows]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells what a process holds")
def test_the_estimate_is_an_upper_bound_and_no_fantasy(bench: Bench) -> None:
    two_layers(bench.root / "large.onnx", (48, 64, 64), features=8, classes=20)
    data = np.arange(200 * 200 * 150, dtype=np.int16).reshape(200, 200, 150)
    write_volume(bench.root / "large.nii.gz", data, np.diag([1.5, 1.5, 2.0, 1.0]))
    with child(GROWTH, bench) as process:
        told, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    estimated, added, asked = json.loads(told.splitlines()[-1])
    assert asked > 8
    assert added <= estimated <= 4 * added + LABELLING_BYTES


def test_compare_ends_with_what_ended_a_case(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a row would have fewer cases than the others."""
    failed = CaseResult("a", bench.root / "out" / "a.nii.gz", error=FileError("the disk is full"))
    monkeypatch.setattr(comparison, "deploy_cases", lambda *given, **named: (failed,))
    deployment = prepare(bench.net, "torch", EngineOptions(), preprocessing=str(bench.spaced), overlap=None)
    with pytest.raises(FileError, match="the disk is full"):
        comparison._segment(deployment, [Case("a", (bench.images / "a.nii.gz",))], bench.root / "out")


def test_labels_of_other_classes_are_no_less_an_input(bench: Bench) -> None:
    """Labels that no Dice is made of, since their classes are others, are not overwritten either."""
    task = bench.root / "Task01_Other"
    for kind in ("imagesTr", "labelsTr"):
        write_volume(task / kind / "a.nii.gz", np.full(SHAPE, 9 if kind == "labelsTr" else 0, np.uint8))
    listed = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    table = {
        "modality": {"0": "CT"},
        "labels": {str(n): f"organ {n}" for n in range(10)},
        "training": listed,
        "test": [],
    }
    (task / "dataset.json").write_text(json.dumps(table))
    with pytest.raises(OptionError, match="is an input and would be overwritten"):
        bench.run(data=task, output=task / "labelsTr")
    assert (np.asarray(nib.load(task / "labelsTr" / "a.nii.gz").dataobj) == 9).all()
