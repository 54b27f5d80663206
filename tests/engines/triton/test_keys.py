"""Compiled kernels are found again in Triton's cache, whichever was launched first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SCRIPT = """
import importlib, json, pkgutil, sys
from triton.runtime.jit import JITFunction
from ptq3d.engines import triton
from ptq3d.engines.triton.keys import fix_keys
if sys.argv[1] == "fixed":
    fix_keys()
modules = [importlib.import_module(f"{triton.__name__}.{one.name}") for one in pkgutil.iter_modules(triton.__path__)]
kernels = {
    f"{module.__name__}.{name}": value
    for module in modules
    for name, value in vars(module).items()
    if isinstance(value, JITFunction)
}
order = sorted(kernels, reverse=sys.argv[2] == "backward")
print(json.dumps(dict(sorted((name, kernels[name].cache_key) for name in order))))
"""


def keys_of(way: str, order: str) -> dict[str, str]:
    """The keys in a process of its own that compiles for a GPU, asked for in that order."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, way, order], capture_output=True, text=True, check=True, env=settings
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_the_order_of_launches_changes_no_key() -> None:
    expected = keys_of("fixed", "forward")
    assert len(expected) > 20
    assert keys_of("fixed", "backward") == expected


def test_triton_itself_lets_the_order_change_keys() -> None:
    """If this fails, Triton was mended and `keys.py` can go."""
    assert keys_of("free", "forward") != keys_of("free", "backward")
