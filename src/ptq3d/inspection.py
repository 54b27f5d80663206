"""What a file is: manifest, layers, precisions, multiply-accumulates, size. Runs nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq3d.engines import BACKENDS, load_backend
from ptq3d.errors import FileError
from ptq3d.graphs.files import load_graph, static_input_shape
from ptq3d.graphs.layers import parameter_count, shape_of
from ptq3d.graphs.passes import is_quantized, simplify
from ptq3d.manifest import Manifest, embedded, read_beside
from ptq3d.options import InspectOptions
from ptq3d.quantization import calibration
from ptq3d.quantization.qdq import PlannedLayer, planned_layers
from ptq3d.volumes.files import volume_suffix
from ptq3d.volumes.source import sha256


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Args:
        path: the file or folder.
        kind: "onnx", "engine", "calibration" or "engines" (of this machine).
        facts: everything else, JSON-able.
        layers: every multiplying layer with the precision that the file asks for; `compare` says what ran.
    """

    path: Path | None
    kind: str
    facts: dict[str, Any]
    layers: tuple[PlannedLayer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        listed = [vars(layer) for layer in self.layers]
        return {
            "path": None if self.path is None else str(self.path),
            "kind": self.kind,
            **self.facts,
            "layers": listed,
        }


def inspect(options: InspectOptions) -> Inspection:
    """What a file is; without a file, which engines this machine has.

    Raises:
        FileError: no such file, or one that is no network, engine or calibration file.
    """
    path = options.path
    if path is None:
        return Inspection(None, "engines", {name: _described(name) for name in BACKENDS})
    if path.is_dir():
        return _engine(path)
    if not path.exists():
        raise FileError(f"{path}: no such file or folder.")
    if path.suffix in calibration.SUFFIXES:
        return _calibration(path)
    if volume_suffix(path.name) is not None or path.suffix.lower() in (".zip", ".dcm"):
        raise FileError(f"{path} is no ONNX file and no engine. If it is a volume, look at it with `ptq3d data show`.")
    return _onnx(path)


def _described(engine: str) -> str:
    """Whether an engine can run here: its version, or why not."""
    backend = load_backend(engine)
    reason = backend.unavailable()
    return f"available, version {backend.version()}" if reason is None else f"not available: {reason}"


def _calibration(path: Path) -> Inspection:
    shape, number, cases = calibration.described_windows(path)
    if not number or len(shape) != 4:
        raise FileError(
            f"{path} holds {number} windows of shape {shape}: no calibration file. Make one with `ptq3d calibrate`."
        )
    facts = {"size_bytes": path.stat().st_size, "sha256": sha256(path), "windows": number, "shape": list(shape)}
    return Inspection(path, "calibration", {**facts, "cases": cases})


def _engine(path: Path) -> Inspection:
    manifest = read_beside(path)
    sizes = {name: (path / name).stat().st_size for name in manifest.engine["files"]}
    runtime = load_backend(manifest.engine["name"])
    facts = {
        "size_bytes": sum(sizes.values()),
        "files": sizes,
        "available": runtime.unavailable() or "available",
        **_manifest_facts(manifest),
    }
    found = tuple(PlannedLayer(**layer) for layer in manifest.engine.get("layers", ()))
    return Inspection(path, "engine", facts, found)


def _onnx(path: Path) -> Inspection:
    model = load_graph(path)
    manifest = embedded(model, where=path)
    model = simplify(model)
    found = planned_layers(model)
    macs = sum(layer.macs for layer in found)
    facts = {
        "size_bytes": path.stat().st_size,
        "sha256": sha256(path),
        "opset": model.opset_imports.get(""),
        "input": list(static_input_shape(model)),
        "output": list(shape_of(model.graph.outputs[0])),
        "quantized": is_quantized(model),
        "weights": parameter_count(model),
        "macs": macs,
        "int8_mac_share_planned": sum(layer.macs for layer in found if layer.precision == "int8") / max(macs, 1),
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        **({"manifest": None} if manifest is None else _manifest_facts(manifest)),
    }
    return Inspection(path, "onnx", facts, found)


def _manifest_facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "network": manifest.network,
        "classes": list(manifest.labels),
        "window": list(manifest.window),
        "overlap": manifest.overlap,
        "preprocessing": None if manifest.preprocessing is None else manifest.preprocessing.to_dict(),
        "quantization": dict(manifest.quantization),
        "engine": {key: value for key, value in manifest.engine.items() if key not in ("files", "layers")},
        "source": dict(manifest.source),
    }
