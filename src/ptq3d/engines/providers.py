"""ONNX Runtime's execution providers: who brings each, what it is told, and the proof that it computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ptq3d.engines.base import EngineOptions, Precision
from ptq3d.errors import EngineError, OptionError, UnavailableError, few, line_of

Settings = dict[str, str]
AUDIT = "session.record_ep_graph_assignment_info"
STRICT = "session.disable_cpu_ep_fallback"
OPENVINO_TYPES: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@dataclass(frozen=True)
class Provider:
    """What computes a part of a graph for ONNX Runtime.

    Args:
        name: ONNX Runtime's own.
        install: the pip line that brings it.
        precisions: of what a graph does not quantize, where it comes first; the first one where another comes first.
        settings: (options, whether the graph has Q/DQ) -> what it is told.
        compiles: it takes whole parts of a graph and says nothing of what it makes of them.
    """

    name: str
    install: str
    precisions: tuple[Precision, ...]
    settings: Callable[[EngineOptions, bool], Settings]
    compiles: bool = False


def _of_cpu(options: EngineOptions, quantized: bool) -> Settings:
    if options.device.lower() not in ("auto", "cpu"):
        raise UnavailableError(
            f"the onnxruntime engine runs on the CPU, not on '{options.device}'. Name what computes there: --providers cuda, "
            "tensorrt or openvino."
        )
    return {}


def _gpu(options: EngineOptions) -> Settings:
    kind, _, number = options.device.lower().partition(":")
    if options.device == "auto":
        return {"device_id": "0"}
    if kind != "cuda" or (number and not number.isdecimal()):
        raise OptionError(f"--device {options.device}: this provider of ONNX Runtime takes cuda, cuda:0, cuda:1, ...")
    return {"device_id": number or "0"}


def _of_cuda(options: EngineOptions, quantized: bool) -> Settings:
    return {**_gpu(options), "use_tf32": "1" if options.precision == "tf32" else "0"}


def _of_tensorrt(options: EngineOptions, quantized: bool) -> Settings:
    told = {"fp16": options.precision == "fp16", "bf16": options.precision == "bf16", "int8": quantized}
    return {**_gpu(options), **{f"trt_{kind}_enable": "1" for kind, wanted in told.items() if wanted}}


def _of_openvino(options: EngineOptions, quantized: bool) -> Settings:
    device = "CPU" if options.device == "auto" else options.device.upper()
    if device == "CPU" and options.precision == "fp16":
        raise OptionError("OpenVINO on a CPU rounds to bfloat16 where it is asked for fp16. Say --precision bf16.")
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": OPENVINO_TYPES.get(options.precision, "f32")}
    if device == "CPU" and options.threads:
        config["INFERENCE_NUM_THREADS"] = options.threads
    return {"device_type": device, "load_config": json.dumps({device: config})}


PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "pip install 'ptq3d[onnxruntime]'", ("fp32",), _of_cpu),
    "cuda": Provider("CUDAExecutionProvider", "pip install onnxruntime-gpu", ("fp32", "tf32"), _of_cuda),
    # its FP32 is TF32 where the GPU has it: it has no switch for that
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "pip install onnxruntime-gpu tensorrt",
        ("tf32", "fp16", "bf16"),
        _of_tensorrt,
        compiles=True,
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "pip install onnxruntime-openvino",
        ("fp32", "bf16", "fp16"),
        _of_openvino,
        compiles=True,
    ),
}


def chosen(options: EngineOptions, available: Sequence[str], *, quantized: bool = False) -> list[tuple[str, Settings]]:
    """The providers of a session in their order, by ONNX Runtime's names, with what each is told.

    Device and precision are the first one's. A later one shares the device where it is of the same kind, and computes in the
    first of its precisions what it does not have.

    Args:
        options: without providers, the CPU.
        available: what this ONNX Runtime has.
        quantized: the graph has Q/DQ.

    Raises:
        OptionError: no such provider, one named twice, or a device or precision that the first does not have.
        UnavailableError: this ONNX Runtime does not have it.
    """
    names = options.providers or ("cpu",)
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown or len(set(names)) < len(names):
        raise OptionError(f"--providers {' '.join(names)}: name some of {', '.join(PROVIDERS)}, each once.")
    for name in names:
        if PROVIDERS[name].name not in available:
            raise UnavailableError(
                f"this ONNX Runtime has no provider '{name}', only {', '.join(name for name in _short(available) if name in PROVIDERS)}. "
                f"In place of the package onnxruntime: {PROVIDERS[name].install}"
            )
    first = PROVIDERS[names[0]]
    if options.precision not in first.precisions:
        raise OptionError(
            f"ONNX Runtime's {names[0]} runs in {', '.join(first.precisions)}, not in '{options.precision}': choose with --precision."
        )
    each = [options, *(_later(name, options) for name in names[1:])]
    return [
        (PROVIDERS[name].name, PROVIDERS[name].settings(one, quantized)) for name, one in zip(names, each, strict=True)
    ]


def _later(name: str, options: EngineOptions) -> EngineOptions:
    shares = name in ("cuda", "tensorrt") and options.device.lower().startswith("cuda")
    precision = options.precision if options.precision in PROVIDERS[name].precisions else PROVIDERS[name].precisions[0]
    return replace(options, device=options.device if shares else "auto", precision=precision)


def _short(names: Sequence[str]) -> list[str]:
    known = {provider.name: short for short, provider in PROVIDERS.items()}
    return [known.get(name, name) for name in names]


def placement(session: Any, names: Sequence[str]) -> dict[str, str]:
    """Where each node runs, as the session reports it: name of a node -> a name of `PROVIDERS`.

    ONNX Runtime drops a provider that cannot start with no more than a line in its log, and gives what a provider does not take
    to the CPU.

    Args:
        session: with `AUDIT` set; its nodes are those after ONNX Runtime's basic simplifications.
        names: providers, in their order.

    Raises:
        UnavailableError: a provider did not start.
        EngineError: a node runs elsewhere.
    """
    registered = _short(session.get_providers())
    missing = [name for name in names if name not in registered]
    if missing or registered[0] != names[0]:
        raise UnavailableError(
            f"ONNX Runtime could not start {', '.join(missing) or names[0]} here: the device or its libraries are missing "
            f"(its own words are above); it would have run on {', '.join(registered)}."
        )
    placed = [
        (node, _short([part.ep_name])[0])
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    if not placed:
        raise EngineError("ONNX Runtime does not say where it runs the nodes of this graph.")
    strangers = [f"{node.op_type} '{node.name}' on {where}" for node, where in placed if where not in names]
    if strangers:
        raise EngineError(
            f"ONNX Runtime runs {few(strangers)}, not on {', '.join(names)}. Allow it, where that is meant: "
            f"--providers {' '.join((*names, 'cpu'))}"
        )
    return {node.name: where for node, where in placed}


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its own exceptions have no base but Exception in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, ValueError, *own)


def open_session(
    path: Path, settings: Any, options: EngineOptions, *, quantized: bool = False, disabled: Sequence[str] = ()
) -> tuple[Any, dict[str, str]]:
    """A session and, where providers were named, where each node runs.

    Args:
        path: of the ONNX file.
        settings: onnxruntime's SessionOptions; told here to be strict about providers.
        options: device, precision, providers.
        quantized: the graph has Q/DQ.
        disabled: names of optimizers that must not touch the graph.

    Raises:
        OptionError, UnavailableError: see `chosen` and `placement`.
        EngineError: ONNX Runtime cannot load the file.
    """
    import onnxruntime

    providers = chosen(options, onnxruntime.get_available_providers(), quantized=quantized)
    audited = bool(set(options.providers) - {"cpu"})
    if audited and not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        raise UnavailableError(
            f"--providers needs an ONNX Runtime that says where each node runs (1.24 or newer), this is {onnxruntime.__version__}."
        )
    if audited:
        settings.add_session_config_entry(AUDIT, "1")
        settings.add_session_config_entry(STRICT, "0" if "cpu" in options.providers else "1")
    given = {"providers": providers, "enable_fallback": 0, "disabled_optimizers": list(disabled)}
    make = partial(onnxruntime.InferenceSession, path, settings, **given)
    try:
        session = make()
    except failures() as error:
        if audited and "fallback to CPU EP" in str(error):
            settings.add_session_config_entry(STRICT, "0")  # once more, only to be told which nodes and why
            placement(make(), options.providers)
        raise EngineError(f"ONNX Runtime cannot load {path}: {line_of(error)}") from error
    return session, placement(session, options.providers) if audited else {}
