"""Engines: one ONNX file on one runtime. They know windows, never a patient, a manifest or quantization."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from ptq3d.engines.base import Backend
from ptq3d.errors import OptionError, UnavailableError

# name -> module; the order is the order in which `auto` tries them
BACKENDS: Mapping[str, str] = {
    "openvino": "ptq3d.engines.openvino",
    "onnxruntime": "ptq3d.engines.onnxruntime",
    "torch": "ptq3d.engines.torch",
    "inductor": "ptq3d.engines.inductor",
    "tensorrt": "ptq3d.engines.tensorrt",
    "triton": "ptq3d.engines.triton",
    "reference": "ptq3d.engines.reference",
}


def get_backend(name: str) -> Backend:
    """The backend of that name, ready to use.

    Raises:
        OptionError: no such backend.
        UnavailableError: it cannot run on this machine; the message says why and how to mend it.
    """
    backend = load_backend(name)
    reason = backend.unavailable()
    if reason is not None:
        raise UnavailableError(f"engine '{name}' is not available: {reason}")
    return backend


def load_backend(name: str) -> Backend:
    """The backend of that name, available or not.

    Raises:
        OptionError: no such backend.
    """
    if name not in BACKENDS:
        raise OptionError(f"no engine '{name}'. The engines are: auto, {', '.join(BACKENDS)}.")
    return cast(Backend, import_module(BACKENDS[name]))


def choose_backend(name: str) -> tuple[str, str]:
    """The backend to use and why.

    Args:
        name: a backend's name, or "auto" for the first available one.

    Returns:
        (name, reason for people).

    Raises:
        UnavailableError: the named one is not available; never another one instead.
    """
    if name != "auto":
        get_backend(name)
        return name, "it was asked for"
    reasons: list[str] = []
    for candidate in BACKENDS:
        reason = load_backend(candidate).unavailable()
        if reason is None:
            skipped = "".join(f"; {line}" for line in reasons)
            return candidate, f"the first of {', '.join(BACKENDS)} that is available here{skipped}"
        reasons.append(f"{candidate}: {reason}")
    raise UnavailableError(f"no engine is available on this machine: {'; '.join(reasons)}")
