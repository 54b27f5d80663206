"""The networks of the zoo: parameters and FP32 size beside the seed's, and whether their export equals PyTorch.

    python benchmarks/sizes.py [NAME ...] [--export DIR] [--report sizes.json]

Sizes are of networks on torch's meta device and take no memory. With --export each network is built with random weights (seed 0),
exported for windows of 96^3 into DIR/NAME.onnx and run in FP32 by ONNX Runtime and OpenVINO, in a fresh process: errors are
relative to the range of PyTorch's logits; labels of random weights on a random image are close calls. The seed's megabytes
(arXiv 2501.17343) are engines, and of either kind (10^6 or 2^20 bytes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ptq3d.compare import machine
from ptq3d.graphs.export import export_network, relative_error
from ptq3d.graphs.files import save_graph
from ptq3d.memory import peak_memory_bytes
from ptq3d.models import ARCHITECTURES, build_network

WINDOW = (96, 96, 96)
CLASSES = {"unet": 14, "transunet": 14, "unest": 133}  # 105 for all others
SEED_MB = {
    "unet": 23.11,
    "transunet": 351.85,
    "unest": 349.41,
    "nnunet": 107.84,
    "swinunetr": 247.96,
    "segresnet": 170.44,
    "vista3d": 264.57,
}


def build(name: str) -> torch.nn.Module:
    """The network as published, for 96^3 windows."""
    return build_network(name, num_classes=CLASSES.get(name, 105), window=WINDOW)


def sizes(name: str) -> dict[str, Any]:
    """Parameters, bytes, and their ratio to the seed's megabytes of the kind that comes nearer."""
    with torch.device("cpu" if name == "swinunetr" else "meta"):  # MONAI's SwinUNETR asks for values as it is built
        count = sum(one.numel() for one in build(name).parameters())
    found: dict[str, Any] = {"parameters": count, "bytes": 4 * count}
    if name in SEED_MB:
        ratios = [4 * count / unit / SEED_MB[name] for unit in (1e6, 2**20)]
        found |= {"seed_mb": SEED_MB[name], "ratio": min(ratios, key=lambda ratio: abs(ratio - 1))}
    return found


def exported(name: str, folder: Path) -> dict[str, Any]:
    """Export one network and run it."""
    torch.manual_seed(0)
    began = perf_counter()
    done = export_network(build(name), channels=1, window=WINDOW)
    path = folder / f"{name}.onnx"
    save_graph(done.model, path)
    seconds, peak = perf_counter() - began, peak_memory_bytes()
    operators = Counter(node.op_type for node in done.model.graph)
    window, logits = done.window, done.logits
    del done
    return {
        "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*")),
        **{runtime: judged(answer(path, window), logits) for runtime, answer in RUNTIMES.items()},
        "classes_seen": len(np.unique(logits.argmax(1))),
        "export_seconds": seconds,
        "export_peak_bytes": peak,
        "operators": dict(sorted(operators.items())),
    }


def in_onnxruntime(path: Path, window: np.ndarray) -> np.ndarray:
    """Its logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: window})[0])


def in_openvino(path: Path, window: np.ndarray) -> np.ndarray:
    """Its logits, in FP32."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(window)[0])


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def judged(answer: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Beside PyTorch's logits."""
    equal = float((answer.argmax(1) == logits.argmax(1)).mean())
    return {"error": relative_error(answer, logits), "equal_labels": equal}


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    mb = found["bytes"] / 1e6
    text = f"{name:10} {found['parameters']:>13,} {mb:9.2f} MB {found['bytes'] / 2**20:9.2f} MiB"
    text += f"  seed {found['seed_mb']:7.2f} x {found['ratio']:.3f}" if "ratio" in found else " " * 22
    if "file_bytes" in found:
        text += f"  file {found['file_bytes'] / 1e6:8.2f} MB"
        for runtime in RUNTIMES:
            text += f"  {runtime} {found[runtime]['error']:.1e} {found[runtime]['equal_labels']:.6f}"
        text += f"  {found['export_seconds']:.0f} s  {found['export_peak_bytes'] / 2**30:.1f} GiB"
    return text


def apart(name: str, folder: Path) -> dict[str, Any]:
    """What `exported` finds in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, name, "--export", str(folder), "--inner"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--export", type=Path, help="folder for the ONNX files")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export is not None:
        options.export.mkdir(parents=True, exist_ok=True)
    if options.inner:
        print(json.dumps(exported(options.names[0], options.export)))
        return
    rows: dict[str, Any] = {}
    for name in options.names:
        rows[name] = sizes(name) | (apart(name, options.export) if options.export is not None else {})
        print(line(name, rows[name]), flush=True)
    if options.report is not None:
        versions = {package: version(package) for package in ("torch", "monai", "onnx", "onnxscript", "openvino")}
        options.report.write_text(json.dumps({"machine": {**machine(), **versions}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
