"""Networks that bring their own graph: TorchScript and PyTorch's ExportedProgram. Neither file may bring Python code.

TorchScript is a language of its own: `torch.jit.load` runs no Python, but what it runs can write files, so a file whose
code names such an operator is refused before it is loaded. `torch.export.load` unpickles, evaluates and compiles texts of
its file, so every member and every text of the file is held against a list of what is harmless before it is loaded.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq3d.errors import CheckpointError, FileError, line_of
from ptq3d.models.pretrained import Pretrained

if TYPE_CHECKING:
    from torch import Tensor

Members = Mapping[str, bytes]

# operators of TorchScript that reach files, by themselves or by a name made up at run time
FILES_IN_SCRIPT = re.compile(rb"\b(?:torch|aten|ops\.\w+)\.(save|load|from_file|_load\w*)\b")
# all that torch.export.save writes of a network of plain tensors; no pickled weights, compiled code or objects
HARMLESS_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment|models/model\.json"
    r"|data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)"
    r"|data/sample_inputs/model\.pt|extra/.*"
)
HARMLESS_TEXT = re.compile(r"[\w.+\-]*")  # names and numbers; no call can be written with it
HARMLESS_TARGET = re.compile(r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.getitem")
HARMLESS_TYPES = ("builtins.tuple", "builtins.list", "builtins.dict", None)
DESCRIPTIVE = (
    "metadata",
    "guards_code",
)  # texts that are kept or dropped, never run: `Pretrained.network` checks no guards
TREES = ("in_spec", "out_spec")  # JSON in a text: which type each level of arguments has


def from_torchscript(path: Path, *, in_channels: int | None = None) -> Pretrained:
    """The network in a file of `torch.jit.save`.

    Args:
        path: the file.
        in_channels: of the image; None takes those of the file's first 3D convolution.

    Raises:
        FileError: there is no such file.
        CheckpointError: no TorchScript, truncated, or a script that reaches files.
    """
    import torch

    members = _members(path, "torch.jit.save")
    for name, content in members.items():
        found = FILES_IN_SCRIPT.search(content) if name.startswith("code/") else None
        if found:
            raise CheckpointError(
                f"{path}: refused, its script reaches files ({found.group().decode()} in {name}). "
                "Script the network alone, without what reads or writes."
            )
    try:
        network = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: no TorchScript that can be read ({line_of(error)}). Save it again.") from error
    channels = in_channels or _first_channels(network.state_dict(), path)
    return Pretrained(network.eval(), "torchscript", channels, (path,))


def from_exported_program(path: Path) -> Pretrained:
    """The network in a file of `torch.export.save`, with the window that it was exported for.

    Raises:
        FileError: there is no such file.
        CheckpointError: truncated, of another version, or with anything in it that needs code to load; or a program that
            does not take one image.
    """
    import torch

    members = _members(path, "torch.export.save")
    _require_harmless(members, path)
    try:
        program = torch.export.load(io.BytesIO(path.read_bytes()))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path}: no ExportedProgram that this PyTorch {torch.__version__} can read ({line_of(error)}). Export it again."
        ) from error
    shape = _image_shape(program, path)
    return Pretrained(program, "exported-program", shape[1], (path,), window=(shape[2], shape[3], shape[4]))


def _members(path: Path, maker: str) -> dict[str, bytes]:
    """The members of a PyTorch archive by their names below its one folder.

    Raises:
        FileError: there is no such file.
        CheckpointError: no such archive, truncated, or with two members of one name.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file. Name a file of {maker}.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            contents = [archive.read(name) for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no file of {maker} ({error}). It may be truncated; copy it again.") from error
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise CheckpointError(
            f"{path}: refused, its members do not lie in one folder, once each. Save it again with {maker}."
        )
    return {name.partition("/")[2]: content for name, content in zip(names, contents, strict=True)}


def _require_harmless(members: Members, path: Path) -> None:
    """Refuse whatever `torch.export.load` would unpickle, evaluate, compile or call.

    Source: torch/export/pt2_archive/_package.py and torch/_export/serde/serialize.py of PyTorch 2.13, read for this.
    """
    for name in members:
        if not HARMLESS_MEMBERS.fullmatch(name):
            raise _refused(path, f"its member '{name}' is pickled, compiled or of another version")
    for name, content in members.items():
        if name.endswith(".json") and not name.startswith("extra/"):
            try:
                _require_harmless_values(json.loads(content), name, path)
            except (ValueError, RecursionError) as error:
                raise _refused(path, f"its member '{name}' is no JSON ({error})") from error
    _require_tensors(members.get("data/sample_inputs/model.pt", b""), path)


def _require_harmless_values(value: Any, key: str, path: Path) -> None:
    """Go through JSON: texts may only be names, targets only tensor operators, weights not pickled."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if name not in DESCRIPTIVE:
                _require_harmless_values(name, "a name", path)
                _require_harmless_values(part, name, path)
    elif isinstance(value, list):
        for part in value:
            _require_harmless_values(part, key, path)
    elif key in TREES:
        for kind in _types(json.loads(value)):
            if kind not in HARMLESS_TYPES:
                raise _refused(path, f"its arguments are of the type '{kind}'")
    elif key == "target" and not HARMLESS_TARGET.fullmatch(str(value)):
        raise _refused(path, f"it calls '{value}', which is no operator of tensors")
    elif key == "use_pickle" and value:
        raise _refused(path, "it has pickled tensors")
    elif isinstance(value, str) and not HARMLESS_TEXT.fullmatch(value):
        raise _refused(path, f"it holds the text '{value[:60]}', which could be code")


def _types(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        if "type" in tree:
            yield tree["type"]
        for part in tree.values():
            yield from _types(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from _types(part)


def _require_tensors(content: bytes, path: Path) -> None:
    """Refuse example inputs that need code: torch.export.load would unpickle them all the same."""
    import torch

    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _refused(path, f"its example inputs are no plain tensors ({line_of(error)})") from error


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused, it needs code to load: {reason}. Export the network with static shapes by torch.export.export and "
        "torch.export.save of PyTorch 2.13, or export it to ONNX where it comes from."
    )


def _first_channels(state: Mapping[str, Tensor], path: Path) -> int:
    found = next((int(weight.shape[1]) for weight in state.values() if weight.ndim == 5), None)
    if found is None:
        raise CheckpointError(f"{path}: no 3D convolution in it, so nothing says its channels. Give --in-channels.")
    return found


def _image_shape(program: Any, path: Path) -> tuple[int, ...]:
    """(1, C, X, Y, Z) of the one input of an ExportedProgram."""
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [tuple(getattr(value, "shape", ())) for value in values]
    if len(shapes) != 1 or len(shapes[0]) != 5 or not all(isinstance(side, int) for side in shapes[0]):
        raise CheckpointError(
            f"{path}: one image (1, C, X, Y, Z) of static shape is wanted, the program takes {shapes}. Export it for one window."
        )
    if shapes[0][0] != 1:
        raise CheckpointError(f"{path}: exported for a batch of {shapes[0][0]}, one window is wanted. Export it again.")
    return shapes[0]
