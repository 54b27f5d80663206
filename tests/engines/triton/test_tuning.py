"""Which tilings a device is asked to run: those that were measured for it, as long as they may still be the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq3d.engines.triton import tuning
from ptq3d.engines.triton.place import Place
from ptq3d.engines.triton.products import Tile, simple_tile
from ptq3d.engines.triton.steps import Convolve
from ptq3d.engines.triton.tiles import worth_trying
from ptq3d.errors import EngineError
from triton_memory import Memory

GPU = torch.device("cuda", 0)


@pytest.fixture
def memory() -> Memory:
    return Memory(torch.device("cpu"))


@pytest.fixture
def step(memory: Memory) -> Convolve:
    x, out = memory.image((1, 16, 4, 4, 4), step=0.02), memory.image((1, 16, 4, 4, 4), step=0.05)
    weight = np.ones((16, 16, 3, 3, 3), np.int8)
    return Convolve("conv", out, x, weight, np.ones(16, np.float32), pads=(1,) * 6)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The problems that a GPU of our own telling measured; the last tiling is always its fastest."""
    asked: list[str] = []

    def fastest(step: tuning.Weighted, tiles: Sequence[Tile], _: Place) -> Tile:
        asked.append(tuning.problem(step))
        return tiles[-1]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "compile_ahead", lambda _: None)
    monkeypatch.setattr(tuning, "fastest", fastest)
    return asked


def told(step: Convolve, tile: Tile) -> None:
    """Write a tiling into the file of measured ones."""
    path = tuning._file(GPU)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({tuning.problem(step): astuple(tile)}), encoding="utf-8")


def test_what_was_measured_is_not_measured_again(memory: Memory, step: Convolve, measured: list[str]) -> None:
    first = tuning.choose([step, step], memory, GPU)
    assert tuning.choose([step], memory, GPU) == first[:1] == first[1:]
    assert measured == [tuning.problem(step)]
    told(step, simple_tile(tuning.product_of_step(step)))  # where the device could run no other
    assert tuning.choose([step], memory, GPU) == [simple_tile(tuning.product_of_step(step))]
    assert len(measured) == 1


@pytest.mark.parametrize(
    "tile",
    [
        Tile("line", 1, 30, 64, 16, 32, 2, 4),
        Tile("tap", 1, 1, 100, 16, 32, 2, 4),
        Tile("other", 1, 1, 64, 16, 32, 2, 4),
    ],
    ids=str,
)
def test_a_tiling_that_does_not_fit_is_measured_anew(
    memory: Memory, step: Convolve, measured: list[str], tile: Tile
) -> None:
    told(step, tile)
    assert tuning.choose([step], memory, GPU) == worth_trying(tuning.product_of_step(step))[-1:]
    assert measured == [tuning.problem(step)]


def test_processes_that_measure_at_a_time_keep_what_the_others_found(
    memory: Memory, step: Convolve, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = replace(step, weight=np.ones((16, 16, 5, 5, 5), np.int8), pads=(2,) * 6)
    fastest = tuning.fastest

    def meanwhile(step: tuning.Weighted, tiles: Sequence[Tile], place: Place) -> Tile:
        monkeypatch.setattr(tuning, "fastest", fastest)
        tuning.choose([wider], memory, GPU)
        return fastest(step, tiles, place)

    monkeypatch.setattr(tuning, "fastest", meanwhile)
    tuning.choose([step], memory, GPU)
    tuning.choose([step, wider], memory, GPU)
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [1, 2]}', "{"])
def test_a_file_that_holds_no_tilings_is_named(memory: Memory, step: Convolve, measured: list[str], text: str) -> None:
    told(step, simple_tile(tuning.product_of_step(step)))
    tuning._file(GPU).write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match=r"NVIDIA-H100.*\.json cannot be read as measured tilings .*Delete it"):
        tuning.choose([step], memory, GPU)
    assert not measured


def test_a_device_that_can_run_no_tiling_takes_the_one_that_always_works(
    memory: Memory, step: Convolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "measured", lambda _: float("inf"))
    product = tuning.product_of_step(step)
    assert tuning.fastest(step, worth_trying(product), memory) == simple_tile(product)
