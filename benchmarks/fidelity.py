"""What INT8 does to real answers: ptq3d's quantizer beside NNCF, ONNX Runtime's and ModelOpt's, in one run.

    python benchmarks/fidelity.py --shared ../shared --report fidelity.json [--demo demo-output] [--networks meshnet-subcortical ...]

Fidelity is the mean Dice of INT8 labels against the same network's FP32 labels over the classes of at least 1000 voxels, on whole
windows; every engine is OpenVINO on the CPU unless its name says otherwise. Engines of one network are timed in turn. NNCF is a
peer (`pip install nncf`), never a dependency. Calibration and test windows:

- OBELISK: the one abdominal CT there is. Calibration: 8 crops shifted by up to 5 and resized by up to 6 voxels, every second one
  mirrored; validation: 3 more of another seed. Test: the documented crop, the whole field of view, another crop, and the documented
  crop with its contrast raised by 1.4.
- MeshNet: 8 training brains for calibration, 2 for validation, the 5 test brains; central windows of 128^3, shifted for calibration.
- U-Net on phantoms: what `ptq3d demo` left in --demo.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ptq3d.engines import load_backend
from ptq3d.engines.base import Engine, EngineOptions, int8_mac_share
from ptq3d.evaluation.metrics import fidelity
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers
from ptq3d.graphs.passes import simplify
from ptq3d.memory import peak_memory_bytes
from ptq3d.quantization import calibration, planning, quantizer
from ptq3d.quantization.budget import FewestTerms, Sensitivity, Trial, by_worth, keeping, search
from ptq3d.quantization.targets import get_target
from ptq3d.recipes import Engines, with_fewest_terms
from ptq3d.volumes.files import load_image
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.resample import reorient

Windows = list[np.ndarray]
BUDGET = 0.005
NETWORKS = ["obelisk-fold1", "obelisk-fold2", "meshnet-subcortical", "meshnet-model18cls", "unet-demo"]
REPETITIONS = 7


@dataclass(frozen=True)
class Subject:
    """A network with its windows, (1, 1, X, Y, Z) float32 each."""

    name: str
    data: str
    onnx: Path
    classes: int
    calibration: Windows
    validation: Windows
    test: dict[str, np.ndarray]


@dataclass
class Row:
    """One engine of one network; `fidelity_each` has the test windows by name."""

    network: str
    data: str
    quantizer: str
    recipe: str
    fidelity: float
    fidelity_each: dict[str, float]
    int8_mac_share: float
    window_latency_ms: float
    size_bytes: int
    quantize_seconds: float
    note: str = ""


# ---------------------------------------------------------------- data


def obelisk(shared: Path, fold: int) -> Subject:
    """The abdominal U-Net on crops of the one CT."""
    image = reorient(load_image(shared / "data/abdomen_ct/images/ct.nii.gz"), "RAS").data[0]
    box = ((6, 116), (12, 92), (50, 112))
    whole = tuple((0, size) for size in image.shape)
    crop = _crop(image, box)
    test = {
        "crop": crop,
        "whole": _crop(image, whole),
        "other": _crop(image, ((2, 112), (8, 96), (44, 106))),
        "contrast": crop * np.float32(1.4),
    }
    path = shared / f"weights/obelisk_unet/fold{fold}.onnx"
    drawn = [list(_drawn_crops(image, box, number, seed)) for number, seed in ((8, 0), (3, 1))]
    return Subject(f"obelisk-fold{fold}", "abdomen_ct", path, 9, drawn[0], drawn[1], test)


def _drawn_crops(image: np.ndarray, box: Sequence[tuple[int, int]], number: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    for index in range(number):
        shift, grow = random.integers(-5, 6, 3), random.integers(-6, 7, 3)
        ends = [(low + s, high + s + g) for (low, high), s, g in zip(box, shift, grow, strict=True)]
        yield _crop(image, ends, mirrored=bool(index % 2))


def _crop(image: np.ndarray, box: Sequence[tuple[int, int]], *, mirrored: bool = False) -> np.ndarray:
    """RAS voxels of a box, axes turned to L, A, I, resized to 144^3 (trilinear); the border repeats outside."""
    import torch

    places = [np.clip(np.arange(*ends), 0, size - 1) for ends, size in zip(box, image.shape, strict=True)]
    piece = image[np.ix_(*places)][::-1, :, ::-1]
    piece = piece[::-1] if mirrored else piece
    tensor = torch.from_numpy(np.ascontiguousarray(piece))[None, None]
    return torch.nn.functional.interpolate(tensor, size=(144,) * 3, mode="trilinear", align_corners=False).numpy()


def meshnet(shared: Path, kind: str, rules: Path) -> Subject:
    """The brain network on central windows of real brains."""
    prepared = Preprocessing.load(rules)
    random = np.random.default_rng(0)

    def window(path: Path, shift: int) -> np.ndarray:
        data = prepared.apply(load_image(path)).data
        moved = random.integers(-shift, shift + 1, 3)
        starts = [
            int(np.clip((size - 128) // 2 + step, 0, size - 128))
            for size, step in zip(data.shape[1:], moved, strict=True)
        ]
        x, y, z = (slice(start, start + 128) for start in starts)
        return np.ascontiguousarray(data[None, :, x, y, z])

    train = sorted((shared / "data/whole_brain/train/images").glob("*.nii.gz"))
    tests = sorted((shared / "data/whole_brain/test/images").glob("*.nii.gz"))
    seen = [window(path, 20) for path in train]
    test = {path.name.split(".")[0]: window(path, 0) for path in tests}
    path = shared / f"weights/meshnet/{kind}/model.onnx"
    return Subject(f"meshnet-{kind}", "whole_brain", path, 18, seen[:8], seen[8:10], test)


def phantoms(folder: Path) -> Subject:
    """The U-Net that the demo trained, on its held-out phantoms."""
    from ptq3d.manifest import embedded

    path = folder / "unet_fp32.onnx"
    manifest = embedded(load_graph(path), where=path)
    if manifest is None or manifest.preprocessing is None:
        raise SystemExit(f"{path} has no manifest; run `ptq3d demo` first.")
    random = np.random.default_rng(0)
    drawn: dict[str, list[np.ndarray]] = {}
    for split in ("train", "test"):
        for file in sorted((folder / f"data/{split}/images").glob("*.nii.gz")):
            data = manifest.preprocessing.apply(load_image(file)).data
            found = calibration.draw_windows(
                data, manifest.window, 2, foreground=data[0] > data[0].mean(), generator=random
            )
            drawn.setdefault(split, []).extend(np.ascontiguousarray(piece[None]) for piece in found)
    test = {f"window{index}": window for index, window in enumerate(drawn["test"])}
    return Subject("unet-demo", "phantoms", path, manifest.classes, drawn["train"][:20], drawn["train"][20:26], test)


# ---------------------------------------------------------------- quantizers: (subject, folder) -> engine folder


def ours(subject: Subject, folder: Path, recipe: quantizer.Recipe) -> Path:
    """ptq3d by one recipe, from the file to the engine."""
    model = simplify(load_graph(subject.onnx))
    made = quantizer.quantize_graph(model, observe(model, subject.calibration), recipe)
    save_graph(made.model, folder / "network.onnx")
    return built(folder / "network.onnx", folder / "engine")


def plainly(subject: Subject, folder: Path) -> tuple[Path, str]:
    """ptq3d's default, which chooses its second terms; also says which."""
    with tempfile.TemporaryDirectory() as scratch:
        model = simplify(load_graph(subject.onnx))
        engines = Engines(model, observe(model, subject.calibration), "openvino", Path(scratch))
        found = settled(engines, subject)
        save_graph(engines.made(found.recipe).model, folder / "network.onnx")
    return built(folder / "network.onnx", folder / "engine"), str(found)


def settled(engines: Engines, subject: Subject) -> FewestTerms:
    """The default recipe with the second terms that calibration windows call for."""
    return with_fewest_terms(engines, quantizer.Recipe(), subject.calibration, subject.classes)


def observe(model: object, windows: Sequence[np.ndarray]) -> object:
    """One pass of calibration."""
    placement = planning.place(model, get_target("openvino"))
    return calibration.observe(model, placement, iter(windows), len(windows))


def budgeted(subject: Subject, folder: Path) -> tuple[Path, str]:
    """ptq3d within a budget on the validation windows; also says what it took."""
    model = simplify(load_graph(subject.onnx))
    seen = observe(model, subject.calibration)
    engines = Engines(model, seen, "openvino", folder)
    exact = labels_of(built(subject.onnx, folder / "fp32"), dict(enumerate(subject.validation)))
    reference = np.stack(list(exact.values()))
    count = 0

    def judge(recipe: quantizer.Recipe) -> Trial:
        nonlocal count
        count += 1
        save_graph(engines.made(recipe).model, folder / "network.onnx")
        engine_folder = built(folder / "network.onnx", folder / f"trial{count}")
        found = labels_of(engine_folder, dict(enumerate(subject.validation)))
        with load_backend("openvino").open(engine_folder, EngineOptions()) as engine:
            share = int8_mac_share(engine.layers())
        return Trial(1 - fidelity(np.stack(list(found.values())), reference, subject.classes), share)

    plain = settled(engines, subject).recipe
    macs = {layer.name: layer.macs for layer in layers(model)}
    alone = replace(plain, second_terms=0.0, rounding="nearest")
    measured = []
    if judge(plain).disagreement > BUDGET:
        names = list(macs)
        for name in names:
            only = keeping(alone, [other for other in names if other != name])
            measured.append(Sensitivity(name, macs[name], judge(only).disagreement))
    result = search(plain, by_worth(measured), judge, BUDGET)
    save_graph(engines.made(result.recipe).model, folder / "network.onnx")
    text = f"{'met' if result.met else 'NOT met'} on validation, {count} engines; second terms {result.recipe.second_terms}"
    return built(folder / "network.onnx", folder / "engine"), f"{text}; float {', '.join(result.recipe.keep) or 'none'}"


def nncf(subject: Subject, folder: Path, *, best: bool) -> Path:
    """NNCF's default, or its mixed preset with its accurate bias correction."""
    import nncf as library
    import openvino

    options = {"preset": library.QuantizationPreset.MIXED, "fast_bias_correction": False} if best else {}
    model = openvino.convert_model(subject.onnx)
    data = library.Dataset(subject.calibration, lambda window: window)
    made = library.quantize(model, data, subset_size=len(subject.calibration), **options)
    openvino.save_model(made, folder / "engine/model.xml", compress_to_fp16=False)
    return folder / "engine"


def onnxruntime(subject: Subject, folder: Path, *, method: str) -> Path:
    """ONNX Runtime's static quantizer, Q/DQ format, weights per channel, read by OpenVINO."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(subject.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            window = next(self.left, None)
            return None if window is None else {name: window}

    save_graph(simplify(load_graph(subject.onnx)), folder / "plain.onnx")
    name = str(load_graph(folder / "plain.onnx").graph.inputs[0].name)
    quantize_static(
        folder / "plain.onnx", folder / "network.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
    )  # fmt: skip
    return built(folder / "network.onnx", folder / "engine")


# ---------------------------------------------------------------- judging


def built(onnx: Path, folder: Path, backend: str = "openvino") -> Path:
    """The artefact of an ONNX file."""
    folder.mkdir(parents=True, exist_ok=True)
    load_backend(backend).build(onnx, folder)
    return folder


def labels_of(folder: Path, windows: dict, precision: str = "fp32", backend: str = "openvino") -> dict:
    """Label maps of windows."""
    with load_backend(backend).open(folder, EngineOptions(precision=precision)) as engine:
        return {name: engine(window)[0].argmax(0).astype(np.uint8) for name, window in windows.items()}


def size_of(folder: Path) -> int:
    """Bytes of an artefact."""
    return sum(file.stat().st_size for file in folder.glob("model.*"))


def measure(subject: Subject, engines: list[tuple[str, str, Path, str, float, str]]) -> list[Row]:
    """A row for each (quantizer, recipe, engine folder, precision, seconds it took, note); the first is FP32."""
    reference = labels_of(engines[0][2], subject.test)
    times = latencies(
        [(folder, precision) for _, _, folder, precision, _, _ in engines], next(iter(subject.test.values()))
    )
    rows = []
    for (name, recipe, folder, precision, seconds, note), latency in zip(engines, times, strict=True):
        found = labels_of(folder, subject.test, precision)
        each = {key: fidelity(found[key], reference[key], subject.classes) for key in subject.test}
        with load_backend("openvino").open(folder, EngineOptions(precision=precision)) as engine:
            share = int8_mac_share(engine.layers())
        known = [value for value in each.values() if not np.isnan(value)]
        rows.append(
            Row(
                subject.name,
                subject.data,
                name,
                recipe,
                float(np.mean(known)),
                each,
                share,
                latency,
                size_of(folder),
                seconds,
                note,
            )
        )
    return rows


def latencies(engines: Sequence[tuple[Path, str]], window: np.ndarray) -> list[float]:
    """Median ms of one window, all engines in turn, two rounds not counted."""
    opened: list[Engine] = [load_backend("openvino").open(folder, EngineOptions(precision=p)) for folder, p in engines]
    taken: list[list[float]] = [[] for _ in opened]
    for _ in range(REPETITIONS + 2):
        for engine, row in zip(opened, taken, strict=True):
            start = time.perf_counter()
            engine(window)
            row.append((time.perf_counter() - start) * 1e3)
    for engine in opened:
        engine.close()
    return [float(np.median(row[2:])) for row in taken]


def run(subject: Subject, scratch: Path, *, budget: bool, recipes: Sequence[str] | None = None) -> list[Row]:
    """All quantizers on one subject, or FP32 and the recipes of those names."""
    engines: list[tuple[str, str, Path, str, float, str]] = []

    def add(name: str, recipe: str, make: Callable[[Path], Path | tuple[Path, str]], precision: str = "fp32") -> None:
        if recipes is not None and recipe not in ("fp32", *recipes):
            return
        folder = scratch / f"{subject.name}-{len(engines)}"
        folder.mkdir(parents=True)
        start = time.perf_counter()
        try:
            result = make(folder)
        except ImportError as error:
            print(f"  {name}: not installed ({error})", flush=True)
            return
        path, note = result if isinstance(result, tuple) else (result, "")
        engines.append((name, recipe, path, precision, time.perf_counter() - start, note))
        print(f"  {subject.name} {name} {recipe}: {engines[-1][4]:.1f} s {note}", flush=True)

    plain = quantizer.Recipe()
    add("none", "fp32", lambda folder: built(subject.onnx, folder / "engine"))
    add("none", "bf16", lambda folder: built(subject.onnx, folder / "engine"), "bf16")
    add("nncf", "default", lambda folder: nncf(subject, folder, best=False))
    add("nncf", "mixed, bias correction", lambda folder: nncf(subject, folder, best=True))
    add("onnxruntime", "MinMax", lambda folder: onnxruntime(subject, folder, method="MinMax"))
    if subject.data != "whole_brain":  # it keeps every tensor of every window: 40 GB for MeshNet
        add("onnxruntime", "Percentile", lambda folder: onnxruntime(subject, folder, method="Percentile"))
    add("ptq3d", "plain", lambda folder: plainly(subject, folder))
    add("ptq3d", "no second terms", lambda folder: ours(subject, folder, replace(plain, second_terms=0.0)))
    nothing = quantizer.Recipe(equalize=False, second_terms=0.0, rounding="nearest")
    add("ptq3d", "ranges only", lambda folder: ours(subject, folder, nothing))
    add("ptq3d", "ranges, equalization", lambda folder: ours(subject, folder, replace(nothing, equalize=True)))
    if budget:
        add("ptq3d", f"budget {BUDGET}", lambda folder: budgeted(subject, folder))
    return measure(subject, engines)


def modelopt(shared: Path, scratch: Path) -> list[Row]:
    """ModelOpt's file of OBELISK fold 2 as it is and retargeted, on OpenVINO, against the same file in ONNX Runtime and FP32."""
    from ptq3d.options import QuantizeOptions
    from ptq3d.quantizing import quantize

    subject, rows = obelisk(shared, 2), []
    path = shared / "weights/obelisk_unet/fold2.modelopt-int8.onnx"
    written = quantize(
        QuantizeOptions(onnx_path=path, retarget="openvino", output_path=scratch / "retargeted.onnx", quiet=True)
    )
    exact = labels_of(built(subject.onnx, scratch / "modelopt-fp32"), subject.test)
    theirs = labels_of(built(path, scratch / "modelopt-ort", "onnxruntime"), subject.test, backend="onnxruntime")
    for recipe, onnx, engine in (
        ("as it is, onnxruntime", path, "onnxruntime"),
        ("as it is, openvino", path, "openvino"),
        ("retargeted, openvino", written.path, "openvino"),
    ):
        folder = built(onnx, scratch / f"modelopt-{recipe.replace(' ', '')}", engine)
        found = labels_of(folder, subject.test, backend=engine)
        each = {key: fidelity(found[key], exact[key], 9) for key in subject.test}
        same = {key: fidelity(found[key], theirs[key], 9) for key in subject.test}
        with load_backend(engine).open(folder, EngineOptions()) as opened:
            share = int8_mac_share(opened.layers())
        note = "against the file in ONNX Runtime: " + ", ".join(f"{key} {value:.4f}" for key, value in same.items())
        mean = float(np.mean(list(each.values())))
        rows.append(
            Row(
                "obelisk-fold2",
                "abdomen_ct",
                "modelopt",
                recipe,
                mean,
                each,
                share,
                float("nan"),
                size_of(folder),
                0.0,
                note,
            )
        )
    return rows


def memory(subject: Subject, number: int) -> int:
    """Peak bytes of a fresh process that calibrates on that many windows."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_calibrate_in_process, (subject.onnx, subject.calibration[0], number))


def _calibrate_in_process(onnx: Path, window: np.ndarray, number: int) -> int:
    model = simplify(load_graph(onnx))
    placement = planning.place(model, get_target("openvino"))
    calibration.observe(model, placement, (window * np.float32(1 + index / 100) for index in range(number)), number)
    return peak_memory_bytes()


def show(rows: Sequence[Row]) -> None:
    """A table for people."""
    heads = f"{'network':20} {'quantizer':12} {'recipe':24} {'fidelity':>9} {'worst':>7} {'x BF16':>7}"
    print()
    print(f"{heads} {'share':>6} {'ms':>8} {'MB':>7} {'s':>7}")
    bf16 = {row.network: 1 - row.fidelity for row in rows if row.recipe == "bf16"}
    for row in rows:
        worst = min(value for value in row.fidelity_each.values() if not np.isnan(value))
        times = (1 - row.fidelity) / bf16[row.network] if bf16.get(row.network) else float("nan")
        print(
            f"{row.network:20} {row.quantizer:12} {row.recipe:24} {row.fidelity:9.4f} {worst:7.4f} {times:7.1f} {row.int8_mac_share:6.3f} "
            f"{row.window_latency_ms:8.1f} {row.size_bytes / 1e6:7.2f} {row.quantize_seconds:7.1f}  {row.note}",
            flush=True,
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of real data and weights")
    parser.add_argument("--demo", type=Path, help="folder that `ptq3d demo` wrote")
    parser.add_argument("--report", type=Path, default=Path("fidelity.json"))
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--recipes", nargs="*", help="only these, e.g. bf16 default plain")
    parser.add_argument("--no-budget", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of calibration")
    options = parser.parse_args()
    rules = Path(__file__).parents[1] / "examples/meshnet.toml"
    makers: dict[str, Callable[[], Subject]] = {
        "obelisk-fold1": lambda: obelisk(options.shared, 1),
        "obelisk-fold2": lambda: obelisk(options.shared, 2),
        "meshnet-subcortical": lambda: meshnet(options.shared, "subcortical", rules),
        "meshnet-model18cls": lambda: meshnet(options.shared, "model18cls", rules),
    }
    if options.demo is not None:
        makers["unet-demo"] = lambda: phantoms(options.demo)
    rows: list[Row] = []
    peaks: dict[str, int] = {}
    for name in options.networks:
        if name not in makers:
            print(f"{name}: left out (give --demo with a folder that `ptq3d demo` wrote)")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            subject = makers[name]()
            found = run(subject, Path(scratch), budget=not options.no_budget, recipes=options.recipes)
            if name == "obelisk-fold2":
                found += modelopt(options.shared, Path(scratch))
                if options.memory:
                    peaks = {str(number): memory(subject, number) for number in (4, 64)}
                    print("peak bytes of calibration by windows:", peaks)
        show(found)
        rows += found
        report = {
            "rows": [asdict(row) for row in rows],
            "calibration_peak_bytes": peaks,
            "machine": machine(),
            "command": sys.argv,
        }
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    """What it ran on."""
    from importlib.metadata import PackageNotFoundError, version

    from ptq3d.compare import machine as found

    versions = {}
    for package in ("openvino", "nncf", "onnxruntime", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {**found(), **versions, "platform": platform.platform(), "repetitions": REPETITIONS}


if __name__ == "__main__":
    main()
