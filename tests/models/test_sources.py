"""Weights come back bit for bit from every layout we know, and nothing that needs code is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq3d.errors import CheckpointError, FileError, OptionError
from ptq3d.models import build_network
from ptq3d.models.sources import load_network, load_state, read_description

CHANNELS = (4, 8)
State = dict[str, torch.Tensor]


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network("unet", num_classes=3, channels=CHANNELS).eval()


def description(**changes: Any) -> dict[str, Any]:
    sizes = {"architecture": "unet", "in_channels": 1, "num_classes": 3, "channels": [4, 8], "window": [16, 16, 16]}
    return {**sizes, "labels": ["background", "a", "b"], "preprocessing": {}, "overlap": 0.5, **changes}


def prefixed(prefix: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": lambda state: state,
    "seed": lambda state: {"epoch": 460, "model_state_dict": state},
    "lightning": lambda state: {"state_dict": prefixed("network.")(state), "epoch": 3, "ptq3d": description()},
    "model": lambda state: {"model": state, "optimizer": {"lr": 1e-3}},
    "nnunet": lambda state: {"network_weights": state},
    "parallel": prefixed("module."),
    "net": prefixed("net."),
    "nested": prefixed("module.network."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(layout: str, network: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](network.state_dict()), tmp_path / "weights.pth")
    state = load_state(tmp_path / "weights.pth")
    assert state.keys() == network.state_dict().keys()
    loaded = load_network(tmp_path / "weights.pth", "unet3d", num_classes=3, in_channels=1)
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(image), network(image))
    assert not loaded.training


def test_a_description_needs_no_name(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save({"state_dict": network.state_dict(), "ptq3d": description()}, path)
    assert read_description(path) == description()
    assert load_network(path).state_dict().keys() == network.state_dict().keys()


def test_the_described_window_sizes_the_positions(tmp_path: Path) -> None:
    network = build_network("transunet", num_classes=3, channels=(4, 8), window=(8, 4, 6))
    described = description(architecture="transunet", window=[8, 4, 6])
    torch.save({"model_state_dict": network.state_dict(), "ptq3d": described}, tmp_path / "t.pth")
    assert load_network(tmp_path / "t.pth").positions.shape == (1, 4 * 2 * 3, 24)


def test_someone_elses_checkpoint_has_no_description(network: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert read_description(tmp_path / "w.pth") is None
    with pytest.raises(CheckpointError, match="architecture"):
        load_network(tmp_path / "w.pth")


class Payload:
    """Pickled, this would run `touch` when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {}, "extra": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    for read in (load_state, read_description, load_network):
        with pytest.raises(CheckpointError, match=r"evil\.pth.*needs code.*\(getattr\)"):
            read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(kept: float, network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(
        CheckpointError, match=r"short\.pth: not a readable checkpoint \([^().]+\)\. It may be|such file format"
    ):
        load_state(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere\.pth"):
        load_state(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"epoch": 3}, {"model": {}}, [1, 2]])
def test_files_without_weights_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "other.pth")


def test_weights_of_another_network_name_the_tensor(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"another network.*conv\.weight"):
        load_network(path, "unet")
    state = network.state_dict()
    torch.save({name: value for name, value in state.items() if name != "decoder.ups.0.bias"}, path)
    with pytest.raises(CheckpointError, match=r"no 'decoder\.ups\.0\.bias'.*1 tensors missing"):
        load_network(path, "unet")
    torch.save({**state, "decoder.extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"'decoder\.extra', which unet has not"):
        load_network(path, "unet")
    torch.save({**state, "decoder.ups.0.bias": torch.zeros(9)}, path)
    with pytest.raises(CheckpointError, match=r"'decoder\.ups\.0\.bias' is \(9,\) there and \(4,\) in unet"):
        load_network(path, "unet")


def test_wanted_and_found_must_agree(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": network.state_dict(), "ptq3d": description()}, path)
    with pytest.raises(CheckpointError, match="num_classes 14 is wanted, the checkpoint has 3"):
        load_network(path, "unet", num_classes=14)
    with pytest.raises(CheckpointError, match="in_channels 2"):
        load_network(path, "unet", in_channels=2)
    with pytest.raises(CheckpointError, match="architecture transunet"):
        load_network(path, "transunet")
    with pytest.raises(OptionError, match="vnet"):
        load_network(path, "vnet")


def test_a_damaged_description_is_refused(network: torch.nn.Module, tmp_path: Path) -> None:
    damaged = {name: value for name, value in description().items() if name != "channels"}
    torch.save({"state_dict": network.state_dict(), "ptq3d": damaged}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="damaged"):
        load_network(tmp_path / "w.pth")
