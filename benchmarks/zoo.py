"""Every network of the zoo: FP32, BF16, our INT8 and NNCF's on OpenVINO, in one run.

    python benchmarks/zoo.py --shared ../shared --report zoo.json [--weights DIR] [--networks swinunetr ...] [--onnx DIR]

Each network has its published size. Weights are those of DIR/<name>.pt where it is given (state dicts, made by `ptq3d train`), else
fresh ones of a fixed seed, and the row says which. Calibration: central 96^3 windows of 8 training brains, shifted by up to 20
voxels; fidelity is judged on central windows of the 5 test brains, against the same network's FP32 labels, classes of at least 1000
voxels. Engines of a network are timed in turn, one window at a time.

ptq3d deploys a network whose head makes more classes than it reads features without that head (`late head`, once a voxel of the
case); NNCF quantizes the whole network, and for a like pair ("body") the same network without its head, too. NNCF is a peer
(`pip install nncf`), never a dependency.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from fidelity import machine
from sizes import CLASSES, SEED_MB, WINDOW

from ptq3d.artefacts import artefact_size, build_artefact
from ptq3d.engines import load_backend
from ptq3d.engines.base import Engine, EngineOptions, int8_mac_share
from ptq3d.evaluation.metrics import fidelity
from ptq3d.graphs.export import export_network, relative_error
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import parameter_count
from ptq3d.graphs.passes import simplify
from ptq3d.graphs.split_head import split_head
from ptq3d.head import load_head, save_head
from ptq3d.manifest import read_beside
from ptq3d.models import build_network
from ptq3d.models.sources import load_network
from ptq3d.quantization import calibration, planning
from ptq3d.quantization.quantizer import Recipe
from ptq3d.quantization.targets import get_target
from ptq3d.recipes import Engines, with_fewest_terms
from ptq3d.volumes.files import load_image
from ptq3d.volumes.preprocessing import Preprocessing

SLOW_MS = 2000.0  # a window slower than this is timed three times, others seven
TRANSFORMERS = ("transunet", "unest")  # NNCF is faster there when it is told; on SwinUNETR it is slower
NETWORKS = [*SEED_MB, "stunet_s", "stunet_b", "stunet_l"]


@dataclass
class Row:
    """One engine of one network."""

    network: str
    quantizer: str
    weights: str
    parameters: int
    size_bytes: int
    window_latency_ms: float
    int8_mac_share: float
    fidelity: float
    fidelity_each: dict[str, float]
    seconds: float
    note: str = ""
    latencies_ms: list[float] = field(default_factory=list)


@dataclass
class Candidate:
    """An engine to be measured.

    Args:
        quantizer: for the table.
        folder: of its files, with its head where it has one apart.
        seconds: what making it took.
    """

    quantizer: str
    folder: Path
    seconds: float
    precision: str = "fp32"
    note: str = ""


def brains(shared: Path, split: str, rules: Path, shift: int, number: int) -> dict[str, np.ndarray]:
    """(1, 1, 96, 96, 96) float32 windows around the middle of real brains."""
    prepared, random, found = Preprocessing.load(rules), np.random.default_rng(0), {}
    for path in sorted((shared / f"data/whole_brain/{split}/images").glob("*.nii.gz"))[:number]:
        data = prepared.apply(load_image(path)).data
        moved = random.integers(-shift, shift + 1, 3)
        starts = [
            int(np.clip((size - side) // 2 + step, 0, size - side))
            for size, side, step in zip(data.shape[1:], WINDOW, moved, strict=True)
        ]
        x, y, z = (slice(start, start + side) for start, side in zip(starts, WINDOW, strict=True))
        found[path.name.split(".")[0]] = np.ascontiguousarray(data[None, :, x, y, z])
    return found


def exported(name: str, weights: Path | None, onnx: Path, real: np.ndarray) -> tuple[str, str]:
    """Write the FP32 graph of a network; (where its weights come from, how far the export is from PyTorch)."""
    torch.manual_seed(0)
    file = None if weights is None else weights / f"{name}.pt"
    known = file is not None and file.is_file()
    classes = CLASSES.get(name, 105)
    network = load_network(file, name) if known else build_network(name, num_classes=classes)  # type: ignore[arg-type]
    made = export_network(network, channels=1, window=WINDOW)
    save_graph(made.model, onnx)
    with torch.inference_mode():
        logits = network(torch.from_numpy(real)).numpy()
    with tempfile.TemporaryDirectory() as scratch:
        backend = load_backend("openvino")
        backend.build(onnx, Path(scratch))
        with backend.open(Path(scratch), EngineOptions()) as engine:
            random, found = engine(made.window), engine(real)
    errors = relative_error(random, made.logits), relative_error(found, logits)
    same = (random.argmax(1) == made.logits.argmax(1)).mean(), (found.argmax(1) == logits.argmax(1)).mean()
    told = f"export: relative error {max(errors):.1e}, equal labels {min(same):.6f} (random and real window)"
    return str(file) if known else "fresh, seed 0", told


def ours(onnx: Path, folder: Path, windows: list[np.ndarray], classes: int) -> str:
    """The artefact of the default recipe; a note on what it did to single layers."""
    model = simplify(load_graph(onnx))
    placement = planning.place(model, get_target("openvino"))
    seen = calibration.observe(model, placement, iter(windows), len(windows))
    engines = Engines(model, seen, "openvino", folder)
    found = with_fewest_terms(engines, Recipe(), windows, classes)
    made = engines.made(found.recipe)
    save_graph(made.model, folder / "int8.onnx")
    build_artefact(folder / "int8.onnx", folder / "engine", "openvino")
    return f"{found}: {len(made.split)} layers of two terms, {len(made.kept)} in floating point: {', '.join(made.kept)}"


def nncf(onnx: Path, folder: Path, windows: list[np.ndarray], *, transformer: bool) -> str:
    """NNCF's default, told of transformers where that makes it faster."""
    import nncf as library
    import openvino

    model = openvino.convert_model(onnx)
    data = library.Dataset(windows, lambda window: window)
    kind = {"model_type": library.ModelType.TRANSFORMER} if transformer else {}
    made = library.quantize(model, data, subset_size=len(windows), **kind)
    openvino.save_model(made, folder / "engine/model.xml", compress_to_fp16=False)
    return "ModelType.TRANSFORMER" if transformer else ""


def body(onnx: Path, folder: Path) -> Path | None:
    """The graph without its late head, which goes beside the engine; None where it stays whole."""
    split = split_head(simplify(load_graph(onnx)))
    if split.head is None:
        return None
    save_graph(split.body, folder / "body.onnx")
    (folder / "engine").mkdir()
    save_head(folder / "engine", split.head)
    return folder / "body.onnx"


def candidates(name: str, onnx: Path, scratch: Path, windows: list[np.ndarray], *, peers: bool) -> list[Candidate]:
    """FP32, BF16, ours (FP32 and BF16 around INT8), NNCF's."""
    found: list[Candidate] = []

    def add(quantizer: str, make: Callable[[Path], str | None], *, may_fail: bool = False) -> None:
        folder = scratch / quantizer.replace(" ", "-")
        folder.mkdir()
        start = time.perf_counter()
        try:
            note = make(folder)
        except (ImportError, RuntimeError, KeyError, ValueError) as error:
            if not may_fail:
                raise
            print(f"  {name} {quantizer}: fails with {type(error).__name__}: {error}", flush=True)
            return
        if note is not None:
            found.append(Candidate(quantizer, folder / "engine", time.perf_counter() - start, note=note))
            print(f"  {name} {quantizer}: {found[-1].seconds:.1f} s {note}", flush=True)
        gc.collect()

    def whole(folder: Path) -> str:
        load_backend("openvino").build(onnx, folder / "engine")
        return ""

    def nncf_body(folder: Path) -> str | None:
        graph = body(onnx, folder)
        return None if graph is None else nncf(graph, folder, windows, transformer=name in TRANSFORMERS)

    add("fp32", whole)
    found.append(Candidate("bf16", found[0].folder, 0.0, "bf16"))
    add("ptq3d", lambda folder: ours(onnx, folder, windows, CLASSES.get(name, 105)))
    found.append(Candidate("ptq3d bf16", found[-1].folder, 0.0, "bf16", "BF16 around INT8"))
    if peers:
        add("nncf", lambda folder: nncf(onnx, folder, windows, transformer=name in TRANSFORMERS), may_fail=True)
        add("nncf body", nncf_body, may_fail=True)
    return found


def labels_of(engine: Engine, window: np.ndarray) -> np.ndarray:
    """(96, 96, 96) classes of one window, through the head where it is apart."""
    features = torch.from_numpy(engine(window)[0]).movedim(0, -1).reshape(-1, engine.spec.features)
    return engine.classifier(engine.head)(features).numpy().reshape(WINDOW).astype(np.uint16)


def latencies(engines: list[Engine], window: np.ndarray) -> list[list[float]]:
    """Milliseconds of one window, all engines in turn, one round not counted."""
    taken: list[list[float]] = [[] for _ in engines]
    rounds = 8
    while len(taken[0]) < rounds:
        for engine, row in zip(engines, taken, strict=True):
            start = time.perf_counter()
            engine(window)
            row.append((time.perf_counter() - start) * 1e3)
        rounds = 4 if taken[0][0] > SLOW_MS else 8
    return [row[1:] for row in taken]


def measure(
    name: str, weights: str, parameters: int, found: list[Candidate], test: dict[str, np.ndarray], told: str
) -> list[Row]:
    """A row for each engine; the first is FP32."""
    backend, rows = load_backend("openvino"), []
    classes = CLASSES.get(name, 105)
    with ExitStack() as stack:
        engines = [
            stack.enter_context(backend.open(one.folder, EngineOptions(precision=one.precision)))  # type: ignore[arg-type]
            for one in found
        ]
        times = latencies(engines, next(iter(test.values())))
        reference = {key: labels_of(engines[0], window) for key, window in test.items()}
        for one, engine, row in zip(found, engines, times, strict=True):
            each = {key: fidelity(labels_of(engine, test[key]), reference[key], classes) for key in test}
            known = [value for value in each.values() if not np.isnan(value)]
            rows.append(
                Row(
                    name,
                    one.quantizer,
                    weights,
                    parameters,
                    size_of(one.folder),
                    float(np.median(row)),
                    int8_mac_share(engine.layers()),
                    float(np.mean(known)) if known else float("nan"),
                    each,
                    one.seconds,
                    told if one.quantizer == "fp32" else one.note,
                    row,
                )
            )
    return rows


def size_of(folder: Path) -> int:
    """Bytes of an artefact: ours with its head, others' as they are."""
    if (folder / "manifest.json").is_file():
        return artefact_size(folder, read_beside(folder))
    head = (folder / "head.npz").stat().st_size if load_head(folder) is not None else 0
    return sum(file.stat().st_size for file in folder.glob("model.*")) + head


def show(rows: list[Row]) -> None:
    """A table for people."""
    heads = f"{'network':10} {'engine':10} {'M par.':>7} {'MB':>8} {'x':>5} {'ms':>8} {'x':>5} {'share':>6} {'fidelity':>9} {'s':>7}"
    print(heads)
    for row in rows:
        fp32 = next(one for one in rows if one.network == row.network and one.quantizer == "fp32")
        print(
            f"{row.network:10} {row.quantizer:10} {row.parameters / 1e6:7.2f} {row.size_bytes / 1e6:8.2f} "
            f"{fp32.size_bytes / row.size_bytes:5.2f} {row.window_latency_ms:8.1f} {fp32.window_latency_ms / row.window_latency_ms:5.2f} "
            f"{row.int8_mac_share:6.3f} {row.fidelity:9.4f} {row.seconds:7.1f}  {row.note}",
            flush=True,
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of real data")
    parser.add_argument("--weights", type=Path, help="folder of state dicts, <name>.pt")
    parser.add_argument("--report", type=Path, default=Path("zoo.json"))
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--no-peers", action="store_true", help="without NNCF")
    options = parser.parse_args()
    rules = Path(__file__).parents[1] / "examples/meshnet.toml"
    seen = list(brains(options.shared, "train", rules, 20, 8).values())
    test = brains(options.shared, "test", rules, 0, 5)
    rows: list[Row] = []
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            onnx = scratch / f"{name}.onnx"
            weights, told = exported(name, options.weights, onnx, next(iter(test.values())))
            found = candidates(name, onnx, scratch, seen, peers=not options.no_peers)
            parameters = parameter_count(load_graph(onnx))
            rows += measure(name, weights, parameters, found, test, told)
        show([row for row in rows if row.network == name])
        report = {
            "rows": [asdict(row) for row in rows],
            "seed_fp32_mb": SEED_MB,
            "machine": machine(),
            "command": sys.argv,
        }
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print()
    show(rows)


if __name__ == "__main__":
    main()
