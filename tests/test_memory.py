"""What may be used is what the machine has free, or what a container's limit leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq3d import memory


def test_a_containers_limit_goes_before_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal:       64000 kB\nMemAvailable:   32000 kB\n")
    monkeypatch.setattr(memory, "MACHINE", machine)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.available_bytes() == 32000 * 1024  # no container
    for limit, used, left in (("max", 5, 32000 * 1024), ("10000", 4000, 6000), ("4000", 5000, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert memory.available_bytes() == left
