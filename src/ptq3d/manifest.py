"""The manifest: all that deployment needs beside the network, inside the ONNX file and beside an engine artefact.

In an ONNX file it is one JSON text in `metadata_props`; beside an artefact it is `manifest.json`, with the SHA-256 of every
file. So one file or one folder is enough to deploy, and training, calibration and deployment cannot drift apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq3d.errors import FileError, ManifestError, Ptq3dError
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.source import sha256

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT = 1
KEY = "ptq3d.manifest"
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a network means and how it is deployed.

    Args:
        preprocessing: from a volume file to what the network reads; None where nobody said yet.
        labels: class names, index = class, 0 is background.
        window: (X, Y, Z) in voxels of the preprocessed grid.
        overlap: of neighbouring windows, 0..1.
        blending: how windows are placed and weighed, one of `ptq3d.windows.BLENDINGS`.
        network: name of the architecture, "onnx" for a foreign file.
        quantization: recipe, calibration cases and layer precisions; empty for FP32.
        source: where it came from: file name -> SHA-256.
        engine: runtime, its version, its layers and the files of the artefact with their SHA-256; empty inside an ONNX file.
    """

    labels: tuple[str, ...]
    window: tuple[int, int, int]
    preprocessing: Preprocessing | None = None
    overlap: float = 0.5
    blending: str = "gaussian"
    network: str = "onnx"
    quantization: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as JSON text, keys sorted, so that equal manifests are equal texts."""
        plain = asdict(replace(self, preprocessing=None))
        plain["preprocessing"] = None if self.preprocessing is None else self.preprocessing.to_dict()
        return json.dumps({"format": FORMAT, **plain}, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """The manifest in a JSON text.

        Args:
            text: from `to_json`.
            where: the file it came from, for messages.

        Raises:
            ManifestError: no JSON, another format, missing or unknown entries.
        """
        try:
            plain = json.loads(text)
            version = plain.pop("format")
            if version != FORMAT:
                raise ManifestError(
                    f"{where}: manifest format {version}, this ptq3d reads {FORMAT}. Update ptq3d, or export again."
                )
            rules = plain.pop("preprocessing")
            plain["preprocessing"] = None if rules is None else Preprocessing.from_dict(rules)
            x, y, z = plain["window"]
            return cls(**{**plain, "labels": tuple(plain["labels"]), "window": (int(x), int(y), int(z))})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{where}: its ptq3d manifest cannot be read ({error}). Export the network again."
            ) from error

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.labels)


def embed(model: ir.Model, manifest: Manifest) -> None:
    """Put `manifest` into an ONNX model, in place."""
    model.metadata_props[KEY] = manifest.to_json()


def embedded(model: ir.Model, *, where: Path) -> Manifest | None:
    """The manifest inside an ONNX model, None where it has none.

    Raises:
        ManifestError: it has one that cannot be read.
    """
    text = model.metadata_props.get(KEY)
    return None if text is None else Manifest.from_json(text, where=str(where))


def write_beside(folder: Path, manifest: Manifest, files: Iterable[Path], engine: Mapping[str, Any]) -> Manifest:
    """Write `manifest.json` into an artefact's folder, with the hashes of its files.

    Args:
        folder: of the artefact.
        manifest: of its network.
        files: what the runtime wrote there.
        engine: name and version of the runtime, and the layers of the network.

    Returns:
        The manifest as written.
    """
    complete = replace(manifest, engine={**engine, "files": {path.name: sha256(path) for path in files}})
    write_text(folder / FILE, complete.to_json())
    return complete


def read_beside(folder: Path) -> Manifest:
    """The manifest of an artefact, after its files were found unchanged.

    Raises:
        ManifestError: there is none, or a file is missing or was changed.
    """
    path = folder / FILE
    if not path.is_file():
        raise ManifestError(f"{folder}: no {FILE}, so this is no engine of ptq3d. Make one with `ptq3d build`.")
    manifest = Manifest.from_json(path.read_text(encoding="utf-8"), where=str(path))
    if not manifest.engine:
        raise ManifestError(f"{path}: it names no engine. Make the artefact again with `ptq3d build`.")
    for name, digest in manifest.engine["files"].items():
        file = folder / name
        if not file.is_file() or sha256(file) != digest:
            state = "was changed" if file.is_file() else "is missing"
            raise ManifestError(f"{file} {state} since the engine was built. Build it again with `ptq3d build`.")
    return manifest


def require_writable(path: Path) -> None:
    """Refuse early a file that could not be written after hours of work.

    Raises:
        FileError: it is a folder, or its folder cannot be made or written into.
    """
    there = next((parent for parent in path.parents if parent.exists()), path)
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{there} is no folder that can be written into"
        raise FileError(f"{path} cannot be written: {reason}; name another file.")


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there.

    Raises:
        Ptq3dError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise Ptq3dError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
