"""Engine artefacts: built whole or not at all, kept by the hash of what they were built from, refused when changed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ptq3d.cache import cache_folder
from ptq3d.engines import choose_backend, get_backend
from ptq3d.engines.base import PLAIN, BuildSettings
from ptq3d.errors import OptionError
from ptq3d.graphs.files import load_graph, save_graph, static_input_shape
from ptq3d.graphs.layers import shape_of
from ptq3d.graphs.passes import simplify
from ptq3d.graphs.split_head import split_head
from ptq3d.head import FILE as HEAD_FILE
from ptq3d.head import save_head
from ptq3d.manifest import FILE, Manifest, embedded, read_beside, write_beside
from ptq3d.options import BuildOptions
from ptq3d.pipeline import Written, class_names
from ptq3d.progress import bar
from ptq3d.quantization.qdq import planned_layers
from ptq3d.version import __version__
from ptq3d.volumes.source import sha256

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("ptq3d")


def build(options: BuildOptions) -> Written:
    """ONNX -> a folder with the engine's own files and a manifest with their hashes.

    Raises:
        EngineError: the runtime refuses the graph.
        UnavailableError: the engine is not on this machine.
    """
    name, why = choose_backend(options.engine)
    output = options.output or options.onnx_path.with_suffix(f".{name}")
    settings = BuildSettings(options.device, options.precision, options.batch, options.workspace)
    if not get_backend(name).compiled_for(settings) and (settings.device, settings.precision) != ("auto", "fp32"):
        raise OptionError(
            f"{name} is told device and precision when it runs: ptq3d deploy --device ... --precision ..."
        )
    manifest = build_artefact(
        options.onnx_path, output, name, late_head=options.late_head, settings=settings, quiet=options.quiet
    )
    facts = {key: manifest.engine[key] for key in ("files", "head", "compiled_for")}
    return Written(output, artefact_size(output, manifest), {"engine": name, "why": why, **facts})


def build_artefact(
    onnx: Path,
    folder: Path,
    engine: str,
    *,
    late_head: bool = True,
    settings: BuildSettings = PLAIN,
    quiet: bool = True,
) -> Manifest:
    """Build `onnx` for an engine into `folder`, whole or not at all.

    Args:
        onnx: FP32 or Q/DQ file.
        folder: replaced where it holds an earlier artefact of ours.
        engine: a backend's name.
        late_head: take the last layer off where its input is narrower than its output.
        settings: for what to build it; an engine that is not compiled has none but the defaults.
        quiet: show no bar while a runtime compiles.

    Raises:
        OptionError: the folder exists and is no artefact of ours.
    """
    backend = get_backend(engine)
    if folder.exists() and not (folder / FILE).is_file():
        raise OptionError(f"{folder} exists and is no engine of ptq3d; it is not overwritten. Choose another --output.")
    model = simplify(load_graph(onnx))
    manifest = embedded(model, where=onnx)
    if manifest is None:
        classes = shape_of(model.graph.outputs[0])[1]
        manifest = Manifest(labels=class_names(None, None, classes), window=static_input_shape(model)[2:])
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with bar(f"Build {onnx.name}", quiet=quiet) as progress:
            compile_into = partial(backend.build, settings=settings, progress=progress)
            files, head = _build_parts(onnx, model, compile_into, scratch, late_head=late_head)
        manifest = replace(manifest, source={onnx.name: sha256(onnx)})
        facts = {
            "name": engine,
            "version": backend.version(),
            "compiled_for": backend.compiled_for(settings),
            "head": head,
            "layers": [asdict(layer) for layer in planned_layers(model)],
        }
        manifest = write_beside(scratch, manifest, files, facts)
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _build_parts(
    onnx: Path, model: ir.Model, build: Callable[[Path, Path], tuple[Path, ...]], folder: Path, *, late_head: bool
) -> tuple[tuple[Path, ...], str]:
    """The files of an engine with its head apart where that is asked for and pays, and what was done."""
    split = split_head(model, late=late_head)
    if split.head is None and len(split.body.graph) == len(model.graph):
        return build(onnx, folder), split.reason
    with tempfile.TemporaryDirectory() as scratch:
        body = Path(scratch) / onnx.name
        save_graph(split.body, body)
        files = build(body, folder)
    return files if split.head is None else (*files, save_head(folder, split.head)), split.reason


def artefact_size(folder: Path, manifest: Manifest) -> int:
    """Bytes of an artefact's files, without the manifest."""
    return sum((folder / name).stat().st_size for name in manifest.engine["files"])


def cached_artefact(
    model: Path, engine: str, *, late_head: bool = True, settings: BuildSettings = PLAIN
) -> tuple[Path, Manifest]:
    """The artefact of a model: an engine folder as it is, an ONNX file built once and kept by the hash of its content.

    Args:
        model: an engine folder or an ONNX file.
        engine: a backend's name or "auto"; an engine folder must agree with it.
        late_head: False wants the network whole.
        settings: for what to build it where it is not built.

    Returns:
        (folder, manifest), the files verified.

    Raises:
        OptionError: the folder is of another engine, or has its head apart where `late_head` is False.
        ManifestError: its files were changed.
    """
    if model.is_dir():
        manifest = read_beside(model)
        if engine not in ("auto", manifest.engine["name"]):
            raise OptionError(
                f"{model} is built for {manifest.engine['name']}, not for {engine}. Deploy it without --engine, or build it again."
            )
        if not late_head and HEAD_FILE in manifest.engine["files"]:
            raise OptionError(
                f"{model} has its head apart. For the whole network build it again: ptq3d build --no-late-head."
            )
        get_backend(manifest.engine["name"])
        return model, manifest
    if not model.is_file():
        load_graph(model)  # says what is missing
    name, why = choose_backend(engine)
    log.info("engine %s: %s", name, why)
    backend = get_backend(name)
    parts = (name, backend.version(), __version__, backend.compiled_for(settings), "" if late_head else "whole")
    said = ("".join(letter if letter.isalnum() else "-" for letter in part) for part in parts if part)
    folder = cache_folder() / "-".join((sha256(model)[:32], *said))
    if (folder / FILE).is_file():
        return folder, read_beside(folder)
    return folder, build_artefact(model, folder, name, late_head=late_head, settings=settings, quiet=False)
