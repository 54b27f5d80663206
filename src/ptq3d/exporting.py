"""Any source of weights -> FP32 ONNX with its manifest, checked against PyTorch."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ptq3d.engines import choose_backend, get_backend
from ptq3d.engines.base import EngineOptions
from ptq3d.errors import GraphError, OptionError
from ptq3d.graphs.export import SAME_LABELS, TOLERANCE, export_network, label_agreement, relative_error
from ptq3d.graphs.files import load_graph, resize_window, save_graph, static_input_shape
from ptq3d.graphs.layers import shape_of
from ptq3d.graphs.passes import simplify
from ptq3d.manifest import Manifest, embed, embedded
from ptq3d.options import ExportOptions, SourceOptions
from ptq3d.pipeline import DEFAULT_WINDOW, Written, class_names, preprocessing_of
from ptq3d.volumes.preprocessing import PRESETS, Preprocessing
from ptq3d.volumes.source import sha256

if TYPE_CHECKING:
    import onnx_ir as ir

    from ptq3d.models.pretrained import Pretrained

log = logging.getLogger("ptq3d")

ONNX = "onnx_path"


def export(options: ExportOptions) -> Written:
    """One source of weights -> one FP32 ONNX file with its manifest, checked against PyTorch.

    Raises:
        OptionError: not exactly one source, or one of several networks; what the source does not say and nobody else either.
        CheckpointError: the weights belong to another network, or need code to load.
        GraphError: the export differs from PyTorch by more than 1e-3 of the logits' span, or in more than 0.01 % of the labels.
    """
    found = _networks(options)
    if len(found) > 1:
        raise OptionError(
            f"{source_of(options)[1]} holds {len(found)} networks, one is wanted here. Choose one, e.g. --folds 0, or export all of "
            "them with ptq3d export."
        )
    return _write(options, found)[0]


def export_all(options: ExportOptions) -> tuple[Written, ...]:
    """As `export`, and one file for each fold of an nnU-Net folder: name_fold0_fp32.onnx, name_fold1_fp32.onnx, ...

    Raises:
        InputError: see `export`.
    """
    return _write(options, _networks(options))


def _networks(options: SourceOptions) -> tuple[Pretrained, ...]:
    return () if source_of(options)[0] == ONNX else pretrained(options)


def _write(options: ExportOptions, found: tuple[Pretrained, ...]) -> tuple[Written, ...]:
    """The ONNX files of networks; of the ONNX file given, where there is no network."""
    path = source_of(options)[1]
    if not found:
        return (_adopted(options, path),)
    names = [_fold(one, index) if len(found) > 1 else "" for index, one in enumerate(found)]
    return tuple(
        _exported(one, options, _output(options, path.parent / f"{one.name}_fp32.onnx", name))
        for one, name in zip(found, names, strict=True)
    )


def pretrained(options: SourceOptions) -> tuple[Pretrained, ...]:
    """The networks of a source that is no ONNX file, with what it says of their use.

    Raises:
        InputError: see `export`.
    """
    return SOURCES[source_of(options)[0]](options)


def source_of(options: SourceOptions) -> tuple[str, Path]:
    """(name of the option that says where the network comes from, its path).

    Raises:
        OptionError: none or several are given, or an option that belongs to another source.
    """
    given = [name for name in (*SOURCES, ONNX) if getattr(options, name) is not None]
    if len(given) != 1:
        sources = ", ".join(map(_flag, (*SOURCES, ONNX)))
        got = "none" if not given else " and ".join(map(_flag, given))
        raise OptionError(f"a network comes from exactly one of {sources}; given: {got}. Give one.")
    for name, sources_of_option in BELONGS_TO.items():
        if getattr(options, name) not in (None, ()) and given[0] not in sources_of_option:
            belongs = " or ".join(map(_flag, sources_of_option))
            raise OptionError(f"{_flag(name)} belongs to {belongs}, not to {_flag(given[0])}. Leave it out.")
    return given[0], getattr(options, given[0])


def described(options: SourceOptions, model: ir.Model, path: Path) -> tuple[ir.Model, Manifest]:
    """The simplified graph of an ONNX file and its manifest, with what the options say of it.

    Args:
        options: window, class names and preprocessing go before what the file says.
        model: the graph; changed in place.
        path: its file.

    Raises:
        GraphError: a graph that is invalid or whose window is free.
        LabelError: another number of class names than of classes.
    """
    manifest = embedded(model, where=path)
    if options.window is not None:
        resize_window(model, options.window)
    shape = static_input_shape(model)
    model = simplify(model)
    classes = shape_of(model.graph.outputs[0])[1]
    if manifest is None:
        manifest = Manifest(labels=class_names(options.label_map, None, classes), window=shape[2:])
    elif options.label_map is not None:
        manifest = replace(manifest, labels=class_names(options.label_map, None, classes))
    if options.preprocessing is not None:
        manifest = replace(manifest, preprocessing=preprocessing_of(options.preprocessing))
    return model, replace(manifest, window=shape[2:])


def _flag(name: str) -> str:
    return "--onnx" if name == ONNX else f"--{name.replace('_', '-')}"


def _given(options: SourceOptions) -> Preprocessing | None:
    return None if options.preprocessing is None else preprocessing_of(options.preprocessing)


def _path(options: SourceOptions) -> Path:
    return source_of(options)[1]


def _from_checkpoint(options: SourceOptions) -> tuple[Pretrained, ...]:
    from ptq3d.models import read_classes
    from ptq3d.models.sources import from_checkpoint

    wanted, prompts = options.num_classes, read_classes(options.classes)
    found = from_checkpoint(_path(options), options.net, num_classes=wanted, classes=prompts, window=options.window)
    return (found,)


def _from_nnunet(options: SourceOptions) -> tuple[Pretrained, ...]:
    from_nnunet = import_module("ptq3d.models.nnunet_folder").from_nnunet
    found: tuple[Pretrained, ...] = from_nnunet(
        _path(options), folds=options.folds or None, configuration=options.configuration
    )
    return found


def _from_bundle(options: SourceOptions) -> tuple[Pretrained, ...]:
    from ptq3d.models.bundle import from_bundle

    config, prepared = options.configuration, _given(options)
    return (from_bundle(_path(options), config=config, preprocessing=prepared, window=options.window),)


def _from_torchscript(options: SourceOptions) -> tuple[Pretrained, ...]:
    from ptq3d.models.programs import from_torchscript

    return (from_torchscript(_path(options), in_channels=options.in_channels),)


def _from_exported_program(options: SourceOptions) -> tuple[Pretrained, ...]:
    from ptq3d.models.programs import from_exported_program

    return (from_exported_program(_path(options)),)


SOURCES: Mapping[str, Callable[[SourceOptions], tuple[Pretrained, ...]]] = {
    "checkpoint": _from_checkpoint,
    "nnunet": _from_nnunet,
    "bundle": _from_bundle,
    "torchscript": _from_torchscript,
    "exported_program": _from_exported_program,
}
"""Sources of weights by the option that names them. Open: a new one is an option, a function and one row."""
BELONGS_TO: Mapping[str, tuple[str, ...]] = {
    "net": ("checkpoint",),
    "num_classes": ("checkpoint",),
    "classes": ("checkpoint",),
    "folds": ("nnunet",),
    "configuration": ("nnunet", "bundle"),
    "in_channels": ("torchscript",),
}


def _fold(found: Pretrained, index: int) -> str:
    """fold0 of .../fold_0/checkpoint_final.pth."""
    folder = found.files[0].parent.name
    return folder.replace("_", "") if folder.startswith("fold_") else f"fold{index}"


def _output(options: ExportOptions, default: Path, fold: str) -> Path:
    output = options.output or default
    if not fold:
        return output
    stem = output.stem.removesuffix("_fp32")
    return output.with_name(f"{stem}_{fold}{output.stem.removeprefix(stem)}{output.suffix}")


def _exported(found: Pretrained, options: ExportOptions, output: Path) -> Written:
    """The ONNX file of a network, checked, with the manifest that its source and `options` give it."""
    window = options.window or found.window or DEFAULT_WINDOW
    prepared = _export_preprocessing(options, found)
    exported = export_network(found.network, channels=found.in_channels, window=window)
    manifest = Manifest(
        labels=class_names(options.label_map, found.labels, exported.logits.shape[1]),
        window=window,
        preprocessing=prepared,
        overlap=0.5 if found.overlap is None else found.overlap,
        blending=found.blending,
        network=found.name,
        source={file.name: sha256(file) for file in found.files},
    )
    embed(exported.model, manifest)
    error, same = _save_checked(exported.model, output, exported.window, exported.logits)
    facts = {
        "network": found.name,
        "max_relative_error": error,
        "label_agreement": same,
        "window": list(window),
        "classes": list(manifest.labels),
    }
    return Written(output, output.stat().st_size, facts)


def _adopted(options: ExportOptions, path: Path) -> Written:
    """Anyone's ONNX file, simplified, with a manifest."""
    output = _output(options, path.with_name(f"{path.stem}_fp32.onnx"), "")
    if output.resolve() == path.resolve():
        raise OptionError(f"{path} would be overwritten. Choose another --output.")
    model, manifest = described(options, load_graph(path), path)
    if manifest.preprocessing is None:
        raise OptionError(f"nothing says how images for {path} are prepared. Give --preprocessing btcv | FILE.")
    embed(model, replace(manifest, source={path.name: sha256(path)}))
    save_graph(model, output)
    facts = {"network": manifest.network, "window": list(manifest.window), "classes": list(manifest.labels)}
    return Written(output, output.stat().st_size, facts)


def _export_preprocessing(options: ExportOptions, found: Pretrained) -> Preprocessing:
    prepared = _given(options) or found.preprocessing
    if prepared is not None:
        return prepared
    if options.checkpoint is None:
        raise OptionError(
            f"{found.files[0]} does not say how its images are prepared. Give --preprocessing btcv | FILE."
        )
    log.warning(
        "%s does not say how its images are prepared; taking the preset btcv. Say otherwise with --preprocessing.",
        found.files[0],
    )
    return PRESETS["btcv"]


def _save_checked(model: ir.Model, output: Path, window: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Write the graph once its FP32 engine agrees with PyTorch; returns the relative error and the share of equal labels."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        path = Path(scratch) / output.name
        save_graph(model, path)
        backend = get_backend(choose_backend("auto")[0])
        backend.build(path, Path(scratch) / "engine")
        with backend.open(Path(scratch) / "engine", EngineOptions()) as engine:
            answer = engine(window)
        error, same = relative_error(answer, logits), label_agreement(answer, logits)
        if not error <= TOLERANCE:
            raise GraphError(
                f"the exported ONNX differs from PyTorch by {error:.2g} of the logits' span, more than {TOLERANCE:g}. It was not written."
            )
        if not same >= SAME_LABELS:
            raise GraphError(
                f"the exported ONNX gives {1 - same:.2%} of the voxels another label than PyTorch, more than {1 - SAME_LABELS:.2%}. "
                "It was not written."
            )
        for file in Path(scratch).glob(f"{output.name}*"):
            os.replace(file, output.with_name(file.name))
    return error, same
