"""What the graphs written for a GPU are worth beside those for OpenVINO, without a GPU: in ONNX Runtime and the reference engine.

    python benchmarks/tensorrt_fidelity.py --shared ../shared --report tensorrt.json [--target triton] [--demo demo-output] [--networks ...]

Networks, windows and fidelity are those of benchmarks/fidelity.py. Both files are made by the default recipe of their target. The
reference engine is slow, so that it runs --reference test windows of each network only; for these its fidelity stands beside that of
ONNX Runtime on the same windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from fidelity import NETWORKS, Subject, built, labels_of, machine, meshnet, obelisk, phantoms

from ptq3d.evaluation.metrics import fidelity
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import calibration, planning
from ptq3d.quantization.quantizer import Recipe
from ptq3d.quantization.targets import get_target
from ptq3d.recipes import Engines, with_fewest_terms

BAR = 0.002


@dataclass
class Row:
    """One network: fidelity of both files, of all test windows and of those that the reference engine ran."""

    network: str
    target: str
    openvino: float
    fidelity: float
    windows: int
    openvino_some: float
    fidelity_some: float
    reference: float
    int8_mac_share: float
    float_layers: list[str]

    @property
    def short(self) -> float:
        """How much the file for the target is behind."""
        return self.openvino - self.fidelity


def written(subject: Subject, target: str, folder: Path) -> tuple[Path, Engines, Recipe]:
    """The file that the default recipe of a target makes."""
    model = simplify(load_graph(subject.onnx))
    placement = planning.place(model, get_target(target))
    seen = calibration.observe(model, placement, iter(subject.calibration), len(subject.calibration))
    engines, rules = Engines(model, seen, target, folder), get_target(target)
    start = Recipe(target, second_terms=rules.mending.most, high_precision_dtype=rules.rest)
    recipe = with_fewest_terms(engines, start, subject.calibration, subject.classes).recipe
    path = folder / f"{target}.onnx"
    save_graph(engines.made(recipe).model, path)
    return path, engines, recipe


def measured(subject: Subject, target: str, folder: Path, some: int) -> Row:
    """Both files of one network."""
    exact = labels_of(built(subject.onnx, folder / "fp32", "onnxruntime"), subject.test, backend="onnxruntime")
    few = dict(list(subject.test.items())[:some])

    def kept(path: Path, engine: str, windows: dict) -> float:
        found = labels_of(built(path, folder / f"{path.stem}-{engine}", engine), windows, backend=engine)
        return float(np.nanmean([fidelity(found[name], exact[name], subject.classes) for name in windows]))

    openvino, _, _ = written(subject, "openvino", folder)
    other, engines, recipe = written(subject, target, folder)
    made = engines.made(recipe)
    return Row(
        subject.name,
        target,
        kept(openvino, "onnxruntime", subject.test),
        kept(other, "onnxruntime", subject.test),
        len(few),
        kept(openvino, "onnxruntime", few),
        kept(other, "onnxruntime", few),
        kept(other, "reference", few),
        made.int8_mac_share,
        sorted(made.kept),
    )


def main() -> None:
    """Print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--target", choices=["tensorrt", "triton"], default="tensorrt")
    parser.add_argument("--demo", type=Path, default=Path("demo-output"))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--reference", type=int, default=1)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    rules = Path(__file__).parents[1] / "examples/meshnet.toml"
    makers = {
        "obelisk-fold1": lambda: obelisk(options.shared, 1),
        "obelisk-fold2": lambda: obelisk(options.shared, 2),
        "meshnet-subcortical": lambda: meshnet(options.shared, "subcortical", rules),
        "meshnet-model18cls": lambda: meshnet(options.shared, "model18cls", rules),
        "unet-demo": lambda: phantoms(options.demo),
    }
    rows = []
    print(
        f"{'network':21}{'openvino':>9}{options.target:>9}{'behind':>8}{'bar':>5}{'reference / ort, some':>24}{'INT8':>7}  floating point"
    )
    for name in options.networks:
        with tempfile.TemporaryDirectory() as scratch:
            row = measured(makers[name](), options.target, Path(scratch), options.reference)
        rows.append(row)
        met = "met" if row.short <= BAR else "MISS"
        both = f"{row.reference:.4f} / {row.fidelity_some:.4f}"
        shown = f"{row.network:21}{row.openvino:9.4f}{row.fidelity:9.4f}{row.short:8.4f}{met:>5}{both:>24}{row.int8_mac_share:7.3f}"
        print(f"{shown}  {', '.join(row.float_layers)}", flush=True)
    if options.report:
        content = {"rows": [{**asdict(row), "behind": row.short} for row in rows], "bar": BAR, "machine": machine()}
        options.report.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
