"""TorchScript and ExportedProgram: the graph that is in the file, and nothing of it that reaches beyond tensors."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bundles import UNET, network
from ptq3d.errors import CheckpointError, FileError, GraphError
from ptq3d.graphs.export import export_network, label_agreement, relative_error
from ptq3d.models.programs import from_exported_program, from_torchscript

WINDOW = (8, 16, 24)
SEGRESNET = {"_target_": "SegResNet", "init_filters": 8, "in_channels": 2, "out_channels": 3}
DEFINITIONS = {"unet": UNET, "segresnet": SEGRESNET}
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


def program_file(path: Path, definition: dict[str, Any] = UNET, batch: int = 1) -> Path:
    example = torch.rand(batch, definition["in_channels"], *WINDOW)
    torch.export.save(torch.export.export(network(definition), (example,)), path)
    return path


@pytest.fixture(scope="module")
def saved_program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return program_file(tmp_path_factory.mktemp("program") / "n.pt2").read_bytes()


@pytest.fixture
def program(saved_program: bytes, tmp_path: Path) -> Path:
    (tmp_path / "n.pt2").write_bytes(saved_program)
    return tmp_path / "n.pt2"


def script_file(path: Path, definition: dict[str, Any] = UNET, *, traced: bool = False) -> Path:
    made = network(definition)
    example = torch.rand(1, definition["in_channels"], *WINDOW)
    script = torch.jit.trace(made, example) if traced else torch.jit.script(made)
    script.save(str(path))
    return path


def answers_of(model: Any, window: np.ndarray, tmp_path: Path) -> np.ndarray:
    import onnx_ir as ir
    import onnxruntime

    ir.save(model, tmp_path / "n.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, {"image": window})[0]
    return answer


@pytest.mark.parametrize(
    ("name", "kind"), [("unet", "scripted"), ("segresnet", "scripted"), ("segresnet", "traced"), ("unet", "program")]
)
def test_the_export_is_the_network(name: str, kind: str, tmp_path: Path) -> None:
    definition = DEFINITIONS[name]
    if kind == "program":
        found = from_exported_program(program_file(tmp_path / "n.pt2", definition))
        assert found.window == WINDOW
    else:
        found = from_torchscript(script_file(tmp_path / "n.pt", definition, traced=kind == "traced"))
        assert found.window is None
    assert found.in_channels == definition["in_channels"]
    exported = export_network(found.network, channels=found.in_channels, window=WINDOW)
    with torch.no_grad():
        wanted = network(definition)(torch.from_numpy(exported.window)).numpy()
    assert relative_error(exported.logits, wanted) < 1e-5
    answer = answers_of(exported.model, exported.window, tmp_path)
    assert relative_error(answer, wanted) < 1e-4
    assert label_agreement(answer, wanted) == 1


class Writing(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.conv = torch.nn.Conv3d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return self.conv(x)


def test_a_script_that_writes_files_is_refused_unread(tmp_path: Path) -> None:
    torch.jit.script(Writing(str(tmp_path / "ran"))).save(str(tmp_path / "n.pt"))
    with pytest.raises(CheckpointError, match=r"n\.pt: refused, its script reaches files \(.*save"):
        from_torchscript(tmp_path / "n.pt")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_torchscript(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        from_torchscript(tmp_path / "nowhere.pt")
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt: no TorchScript"):
        from_torchscript(tmp_path / "weights.pt")
    whole = script_file(tmp_path / "n.pt").read_bytes()
    (tmp_path / "n.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        from_torchscript(tmp_path / "n.pt")
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "relu.pt"))
    with pytest.raises(CheckpointError, match="--in-channels"):
        from_torchscript(tmp_path / "relu.pt")


class Payload:
    """Pickled, this would make a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


Members = dict[str, bytes]


def rewritten(path: Path, change: Callable[[Members], None]) -> None:
    """A PyTorch archive with other members; stored, not compressed, as PyTorch's reader wants it."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"n/{name}", content)


def graph_change(change: Callable[[dict[str, Any]], None]) -> Callable[[Members, Path], None]:
    def changed(members: Members, ran: Path) -> None:
        graph = json.loads(members["models/model.json"])
        change(graph)
        members["models/model.json"] = json.dumps(graph).encode()

    return changed


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pickled_weights(members: Members, ran: Path) -> None:
    config = json.loads(members["data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    members["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    members[f"data/weights/{first['path_name']}"] = saved(Payload(ran))


def other_arguments(graph: dict[str, Any]) -> None:
    signature = graph["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", "collections.defaultdict", 1)


HARMS: dict[str, tuple[Callable[[Members, Path], Any], str]] = {
    "pickled example inputs": (
        lambda m, ran: m.update({"data/sample_inputs/model.pt": saved(((Payload(ran),), {}))}), "example inputs"),
    "a bare pickle": (
        lambda m, ran: m.update({"data/sample_inputs/model.pt": pickle.dumps(Payload(ran), protocol=2)}), "example inputs"),
    "pickled weights": (pickled_weights, "pickled tensors"),
    "a pickled object": (
        lambda m, ran: m.update({"data/constants/opaque_obj_0": pickle.dumps(Payload(ran))}), r"'data/constants/opaque_obj_0'"),
    "weights of old": (lambda m, ran: m.update({"data/weights/model.pt": saved(Payload(ran))}), r"'data/weights/model\.pt'"),
    "compiled code": (lambda m, ran: m.update({"data/aotinductor/model/a.so": b"x"}), "aotinductor"),
    "a program of old": (lambda m, ran: m.update({"serialized_state_dict.pt": b"x"}), "serialized_state_dict"),
    "a call of the system": (
        graph_change(lambda g: g["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system")), r"calls 'torch\.os\.system'"),
    "code in a name": (
        graph_change(lambda g: g["graph_module"]["graph"]["inputs"][0]["as_tensor"].update(name="x=print()")), r"x=print\(\)"),
    "an expression": (
        graph_change(lambda g: g["range_constraints"].update({"__import__('os')": {"min_val": 1, "max_val": 2}})), "__import__"),
    "another type of arguments": (graph_change(other_arguments), r"collections\.defaultdict"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_programs_that_need_code_are_refused_unread(name: str, program: Path, tmp_path: Path) -> None:
    change, message = HARMS[name]
    rewritten(program, lambda members: change(members, tmp_path / "ran"))
    with pytest.raises(CheckpointError, match=f"needs code to load.*{message}"):
        from_exported_program(program)
    assert not (tmp_path / "ran").exists()


def test_a_rewritten_program_alone_is_read(program: Path) -> None:
    """So that the test above refuses for its own reasons."""
    rewritten(program, lambda members: None)
    assert from_exported_program(program).window == WINDOW


def test_what_is_no_program_of_one_window(program: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        from_exported_program(tmp_path / "nowhere.pt2")
    whole = program.read_bytes()
    (tmp_path / "half.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        from_exported_program(tmp_path / "half.pt2")
    with pytest.raises(CheckpointError, match="batch of 2"):
        from_exported_program(program_file(tmp_path / "two.pt2", batch=2))
    flat = torch.export.export(torch.nn.Linear(3, 2), (torch.rand(1, 3),))
    torch.export.save(flat, tmp_path / "flat.pt2")
    with pytest.raises(CheckpointError, match="one image"):
        from_exported_program(tmp_path / "flat.pt2")
    found = from_exported_program(program)
    with pytest.raises(GraphError, match="does not take windows"):
        export_network(found.network, channels=1, window=(8, 8, 8))


def test_a_member_twice_is_refused(program: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(program, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"x")
    with pytest.raises(CheckpointError, match="once each"):
        from_exported_program(program)
