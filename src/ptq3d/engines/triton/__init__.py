"""INT8 networks by Triton kernels of our own, on NVIDIA GPUs: PyTorch and Triton are all they need.

What the file quantizes runs on INT8 tensor cores, the rest in FP16; kernels are compiled, and their tilings measured, when an
artefact is opened for the first time on a kind of GPU.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptq3d.engines.base import PLAIN, BuildSettings, EngineOptions
from ptq3d.errors import EngineError, GraphError, OptionError, UnavailableError, line_of, numbered
from ptq3d.progress import Progress, bar, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from ptq3d.engines.triton.engine import TritonEngine

ARTEFACT, FACTS = "model.onnx", "triton.json"
OLDEST = (8, 0)  # compute capability: what Triton compiles for, with INT8 tensor cores
OLDEST_TRITON = (3, 6)
MEND = "mend it with: pip install 'ptq3d[triton]'"


def unavailable() -> str | None:
    """Why no kernel can run here, None where one can: on a GPU, or in Triton's interpreter where that is asked for."""
    if find_spec("triton") is None:
        return f"Triton is not installed; {MEND}"
    reason = _unfit()
    if reason is not None:
        return reason
    if _interpreted():
        return None
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA; install one that has it, as pytorch.org says"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # it says so where the driver is too old
        return f"PyTorch {torch.__version__} for CUDA {torch.version.cuda} cannot use a GPU here: {line_of(error)}"
    return _too_old(torch.device("cuda", torch.cuda.current_device()))


def _unfit() -> str | None:
    """What is wrong with the Triton that is here."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({line_of(error)}); {MEND}"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if found >= OLDEST_TRITON else f"Triton {triton.__version__} is too old, 3.6 or newer is wanted; {MEND}"


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _too_old(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {found[0]}.{found[1]}; Triton compiles for 8.0 (A100) and newer. Use --engine tensorrt"


def version() -> str:
    """Triton's version."""
    import triton

    return str(triton.__version__)


def compiled_for(settings: BuildSettings) -> str:
    """The batch that an artefact is bound to; it runs on every GPU, since kernels are compiled when it is opened.

    Raises:
        OptionError: a workspace, or another precision than FP16 for what is not INT8.
    """
    if settings.workspace_gb is not None:
        raise OptionError(
            "--workspace is of engines that choose among algorithms; triton's memory is what its layers need."
        )
    _require_precision(settings.precision)
    return f"batch {settings.batch}"


def _require_precision(precision: str) -> None:
    if precision not in ("fp32", "fp16"):  # fp32 is what everybody gets who says nothing
        raise OptionError(
            f"the triton engine runs in FP16 what is not INT8, not in '{precision}'. Give --precision fp16, or leave it at fp32."
        )


def build(onnx: Path, folder: Path, settings: BuildSettings = PLAIN, progress: Progress = silent) -> tuple[Path, ...]:
    """The simplified graph, for any number of windows where it can be, checked to hold only what the engine knows.

    Args:
        onnx: Q/DQ with one step for each activation, as `--target triton` writes them. What is not quantized runs in FP16.
        folder: where the two files go; made where missing.
        settings: its batch.
        progress: nothing to tell.

    Raises:
        EngineError: an operator that the engine does not know, activations of several steps, or a graph of one window for a batch.
        OptionError: settings that it does not have.
    """
    from ptq3d.engines.triton.lowering import lower
    from ptq3d.graphs.files import save_graph

    del progress
    compiled_for(settings)
    model, batch = _for_batch(onnx, settings.batch)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch) / ARTEFACT
        save_graph(model, written)
        try:
            lower(written, batch)
        except EngineError as error:
            raise EngineError(f"{onnx}: {error}") from error
        facts = Path(scratch) / FACTS
        facts.write_text(json.dumps({"batch": batch}), encoding="utf-8")
        return tuple(Path(shutil.move(path, folder / path.name)) for path in sorted(Path(scratch).iterdir()))


def _for_batch(onnx: Path, batch: int) -> tuple[ir.Model, int]:
    """A graph for so many windows at a time, or for as many as the file itself fixes."""
    from ptq3d.graphs.batching import free_batch
    from ptq3d.graphs.files import load_graph, static_input_shape
    from ptq3d.graphs.passes import simplify

    model = simplify(load_graph(onnx))
    own = static_input_shape(model)[0]
    if own > 1:
        if batch not in (1, own):
            raise EngineError(f"{onnx} takes {own} windows at a time, and {batch} were asked for: leave --batch out.")
        return model, own
    try:
        free_batch(model)
    except GraphError as error:
        if batch > 1:
            raise EngineError(f"{onnx}: {error}") from error
        model = simplify(load_graph(onnx))
    return model, batch


def open(folder: Path, options: EngineOptions) -> TritonEngine:
    """The engine of an artefact; "auto" is the current GPU.

    Raises:
        EngineError: the device has too little memory, or the artefact cannot be read.
        UnavailableError: no such device.
        OptionError: another precision than FP16 for what is not INT8.
    """
    from ptq3d.engines.triton.engine import TritonEngine
    from ptq3d.head import load_head

    _require_precision(options.precision)
    device = _device(options.device)
    batch = int(json.loads((folder / FACTS).read_text(encoding="utf-8"))["batch"])
    with bar("measuring kernels") as progress:
        return TritonEngine(folder / ARTEFACT, batch=batch, device=device, head=load_head(folder), progress=progress)


def _device(name: str) -> torch.device:
    """The CUDA device of that name, or the CPU in Triton's interpreter."""
    if _interpreted():
        if name.lower() not in ("auto", "cpu"):
            raise UnavailableError(f"Triton's interpreter runs on the CPU, not on '{name}'. Unset TRITON_INTERPRET.")
        return torch.device("cpu")
    wanted = "cuda" if name == "auto" else name.lower()
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UnavailableError(f"PyTorch has no device '{name}': {line_of(error)}") from error
    if device.type != "cuda":
        raise UnavailableError(f"the triton engine runs on NVIDIA GPUs, not on '{name}'. Give --device cuda.")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UnavailableError(f"PyTorch sees {numbered(count, 'CUDA device')} here, so there is no '{name}'.")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    reason = _too_old(device)
    if reason is not None:
        raise UnavailableError(reason)
    return device
