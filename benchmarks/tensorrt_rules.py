"""TensorRT's documented rules on every network of the zoo at its published size: FP32 and with Q/DQ for TensorRT.

    python benchmarks/tensorrt_rules.py [NAME | FILE.onnx ...] [--report tensorrt_rules.json]

A NAME is built with random weights (seed 0), exported for windows of 96^3 and quantized with scales that come from nowhere, since
only the graph's form counts: Q/DQ are where `ptq3d quantize --target tensorrt` puts them. A FILE is checked as it is, and where it is
FP32 with such Q/DQ, too. Each in a fresh process. Rules are those of the oldest TensorRT, 10.3. STU-Net H, whose
export alone takes 12 GiB, is run where it is named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from sizes import WINDOW, build
from zoo import NETWORKS

from ptq3d.compare import machine
from ptq3d.graphs.export import export_network
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.passes import is_quantized, simplify
from ptq3d.graphs.tensorrt_rules import OLDEST, RULES, advice, violations
from ptq3d.int8 import Scale
from ptq3d.memory import peak_memory_bytes
from ptq3d.quantization import planning, qdq
from ptq3d.quantization.targets import get_target

ANY = Scale(np.asarray(1 / 16, np.float32), np.asarray(0, np.int32), "int8")


def graph_of(name: str) -> ir.Model:
    """A file's graph, or that of a network with random weights."""
    if name.endswith(".onnx"):
        return simplify(load_graph(Path(name)))
    torch.manual_seed(0)
    return export_network(build(name), channels=1, window=WINDOW).model


def quantize(model: ir.Model) -> ir.Model:
    """TensorRT's Q/DQ, in place, with one scale for every activation."""
    target = get_target("tensorrt")
    placement = planning.place(model, target)
    scales = {name: ANY for group in placement.tensors for name in group}
    return qdq.write(model, planning.plan(model, placement, {}, target, given=scales))


def checked(model: ir.Model) -> dict[str, Any]:
    """What the rules say of one graph."""
    began = perf_counter()
    broken = violations(model)
    milliseconds = 1e3 * (perf_counter() - began)
    layers = qdq.planned_layers(model) if is_quantized(model) else ()
    return {
        "nodes": len(list(model.graph)),
        "layers": len(layers),
        "int8_layers": sum(layer.precision == "int8" for layer in layers),
        "operators": dict(sorted(Counter(node.op_type for node in model.graph).items())),
        "violations": [asdict(one) for one in broken],
        "advice": [asdict(one) for one in advice(model)],
        "milliseconds": milliseconds,
    }


def rows_of(name: str) -> dict[str, Any]:
    """One network's graphs."""
    model = graph_of(name)
    if is_quantized(model):
        return {"as it is": checked(model)}
    found = {"fp32": checked(model), "int8": checked(quantize(model))}
    return {**found, "peak_bytes": peak_memory_bytes()}


def apart(name: str) -> dict[str, Any]:
    """What `rows_of` finds in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name, "--inner"], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines(name: str, rows: dict[str, Any]) -> list[str]:
    """The rows of the table, and whatever was found."""
    told = []
    for kind, row in rows.items():
        if kind == "peak_bytes":
            continue
        share = f"{row['int8_layers']} / {row['layers']}" if row["layers"] else ""
        told.append(
            f"| {name} | {kind} | {row['nodes']} | {share} | {len(row['violations'])} | {len(row['advice'])} "
            f"| {row['milliseconds']:.0f} |"
        )
        told += [f"    {one['rule']}: {one['node']}: {one['said']}" for one in (*row["violations"], *row["advice"])[:5]]
    return told


def main() -> None:
    """Print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NETWORKS)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(json.dumps(rows_of(options.names[0])))
        return
    print(f"{len(RULES)} rules of TensorRT {OLDEST[0]}.{OLDEST[1]}")
    print("| network | graph | nodes | INT8 layers | violations | advice | ms |\n|---|---|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for name in options.names:
        found[name] = apart(name)
        print("\n".join(lines(name, found[name])), flush=True)
    if options.report is not None:
        versions = {package: version(package) for package in ("torch", "monai", "onnx", "onnx_ir", "onnxscript")}
        about = {"machine": {**machine(), **versions}, "version": OLDEST, "rules": list(RULES)}
        options.report.write_text(json.dumps({**about, "networks": found}, indent=1))


if __name__ == "__main__":
    main()
