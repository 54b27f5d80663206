"""What the compiler makes of the kernels for an H100: every thread moves 16 bytes of a tensor at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NARROW = {"ld.global.b8", "ld.global.b16", "ld.global.v2.b16", "st.global.b8", "st.global.b16"}


def compiled(*channels: int) -> dict[str, dict[str, int]]:
    """Kernel -> how often each instruction that touches memory stands in its code."""
    script = Path(__file__).parents[2] / "triton_compiling.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(script), *map(str, channels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def instructions() -> dict[str, dict[str, int]]:
    """Of the kernels that treat every value alike."""
    return compiled(16, 96)


def test_tensors_move_16_bytes_at_once(instructions: dict[str, dict[str, int]]) -> None:
    assert len(instructions) > 20
    for name, counts in instructions.items():
        assert not NARROW & set(counts), (name, counts)
        if not name.startswith("moments"):  # which reads sums, not tensors
            assert counts.get("ld.global.v4.b32"), (name, counts)
        if not name.startswith(("moments", "sum", "enter 4")):
            assert counts.get("st.global.v4.b32"), (name, counts)


def test_a_factor_is_made_once_for_a_channel_and_not_for_every_thread(instructions: dict[str, dict[str, int]]) -> None:
    for channels in (16, 96):
        assert "ld.global.b64" not in instructions[f"normalize {channels}"]  # of sums, which `moments` alone reads
        assert "ld.global.b64" in instructions[f"moments {channels}"]


def test_convolutions_of_more_values_than_int32_counts_compile() -> None:
    assert set(compiled(0)) == {"all 1", "tap 1", "line 1", "tap 2", "line 2"}
