"""TensorRT 10.3 to 11.x on an NVIDIA GPU: strongly typed networks with explicit Q/DQ, built for one GPU and one version."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from ptq3d.cache import cache_folder
from ptq3d.engines.base import PLAIN, BuildSettings, EngineOptions
from ptq3d.engines.tensorrt_engine import Compiled, TensorRtEngine
from ptq3d.errors import EngineError, OptionError, UnavailableError
from ptq3d.graphs.batching import free_batch
from ptq3d.graphs.files import image_input, load_graph, save_graph, static_input_shape
from ptq3d.graphs.layers import layers
from ptq3d.graphs.low_precision import low_precision
from ptq3d.graphs.passes import simplify, write_kernel_shapes
from ptq3d.graphs.tensorrt_rules import violations
from ptq3d.head import load_head
from ptq3d.progress import Progress, silent

if TYPE_CHECKING:
    import tensorrt as trt

ARTEFACT, FACTS = "engine.plan", "tensorrt.json"
OLDEST, BEYOND = (10, 3), (12, 0)
MEND = "mend it with: pip install 'ptq3d[tensorrt]'"
STEPS = 1000  # of the progress bar
NOTHING = "factory function returned nullptr"  # what the bindings say in a TypeError where TensorRT gives no object
log = logging.getLogger("ptq3d")


def unavailable() -> str | None:
    """Why TensorRT cannot run here, None where it can."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        return f"{error}; {MEND}"
    if not OLDEST <= _major_and_minor(tensorrt.__version__) < BEYOND:
        return f"TensorRT {tensorrt.__version__} is not one of 10.3 to 11; {MEND}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA; install one that has it, as pytorch.org says"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU, or its driver is older than CUDA {torch.version.cuda} needs"
    return None


def version() -> str:
    """TensorRT's version."""
    import tensorrt

    return str(tensorrt.__version__)


def _major_and_minor(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def compiled_for(settings: BuildSettings) -> str:
    """The GPU, arithmetic, batch and workspace that an artefact is bound to.

    Raises:
        UnavailableError: no such GPU.
    """
    device = _device(settings.device)
    workspace = "" if settings.workspace_gb is None else f" {settings.workspace_gb:g} GB"
    return f"{_name(device)} sm {_capability(device)} {settings.precision} batch {settings.batch}{workspace}"


def build(onnx: Path, folder: Path, settings: BuildSettings = PLAIN, progress: Progress = silent) -> tuple[Path, ...]:
    """A serialized engine, and what it was built for.

    Types are the graph's own: what is FP16 in the file runs in FP16, what lies between Q and DQ in INT8; fp16 and bf16 as
    settings turn the FP32 rest into such first. FP32 is multiplied as FP32 unless tf32 is asked for. Timings of kernels are kept
    for the next build, under `cache_folder()` by GPU and version.

    Args:
        onnx: FP32 or Q/DQ.
        folder: where the two files go; made where missing.
        settings: GPU, arithmetic, batch (1 to that many windows at a time) and workspace.
        progress: told how far the build is.

    Raises:
        EngineError: the graph breaks a rule of TensorRT, which are all named, or TensorRT refuses it with its own reasons.
        UnavailableError: no such GPU.

    Source: TensorRT developer guide, "Strongly Typed Networks", "Timing Cache", "Explicit Quantization".
    """
    device = _device(settings.device)
    model = _prepared(onnx, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / onnx.name  # messages name it
        save_graph(model, path)
        plan = _in_a_thread(path, model, settings, device, _monitor(progress))
    (folder / ARTEFACT).write_bytes(plan)
    facts = Compiled.of(model, layers(model), settings, version=version(), capability=_capability(device))
    (folder / FACTS).write_text(json.dumps({**facts.to_dict(), "device": _name(device)}, indent=1), encoding="utf-8")
    return folder / ARTEFACT, folder / FACTS


def open(folder: Path, options: EngineOptions) -> TensorRtEngine:
    """The engine of an artefact.

    Raises:
        EngineError: it was built for another GPU or version, or TensorRT cannot load it.
        UnavailableError: no such GPU.
        OptionError: another precision than it was built for.
    """
    import tensorrt as trt

    device = _device(options.device)
    written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    facts = Compiled.from_dict(written)
    _require_same_machine(folder, facts, device)
    if options.precision != facts.precision:
        raise OptionError(
            f"{folder} was built for --precision {facts.precision}, not for {options.precision}. Say so, or build it again."
        )
    if written["device"] != _name(device):
        log.warning("%s was built on %s; on %s other kernels may be faster.", folder, written["device"], _name(device))
    with torch.cuda.device(device), _heard("TensorRT cannot load it") as logger:
        torch.cuda.empty_cache()  # TensorRT allocates beside PyTorch, which keeps what it freed
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine((folder / ARTEFACT).read_bytes())
        if engine is None:
            raise EngineError(f"{folder / ARTEFACT} cannot be loaded.")
        return TensorRtEngine((runtime, engine), facts, device, load_head(folder))


def _device(name: str) -> torch.device:
    """The CUDA device of that name, "auto" for the current one.

    Raises:
        UnavailableError: there is none.
    """
    number = torch.cuda.device_count()
    found = re.fullmatch(r"auto|cuda(?::(\d+))?", name.lower())
    index = -1 if found is None else int(found.group(1) or torch.cuda.current_device()) if number else 0
    if not 0 <= index < number:
        there = ", ".join(f"cuda:{one}" for one in range(number)) or "none"
        raise UnavailableError(f"TensorRT has no device '{name}' here. The NVIDIA GPUs are: {there}.")
    return torch.device("cuda", index)


def _name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device))


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def _require_same_machine(folder: Path, facts: Compiled, device: torch.device) -> None:
    """Refuse an engine that TensorRT would refuse, and say why before it does."""
    here = (("TensorRT", facts.version, version()), ("compute capability", facts.capability, _capability(device)))
    for what, built, found in here:
        if built != found:
            raise EngineError(
                f"{folder} was built for {what} {built}, this machine has {found}: engines of TensorRT run only where they were "
                "built. Build it here from its ONNX file: ptq3d build --engine tensorrt."
            )


def _prepared(onnx: Path, settings: BuildSettings) -> ir.Model:
    """The graph as TensorRT gets it.

    Raises:
        EngineError: it breaks rules of TensorRT.
        GraphError: it cannot take that batch.
    """
    model = simplify(load_graph(onnx))
    static_input_shape(model)
    if settings.precision in ("fp16", "bf16"):
        low_precision(model, settings.precision)
    write_kernel_shapes(model)
    found = violations(model, _major_and_minor(version()))
    if found:
        listed = "; ".join(f"{one.node}: {one.said}" for one in found)
        raise EngineError(f"{onnx.name} breaks rules of TensorRT, which would refuse it or compute otherwise. {listed}")
    if settings.batch > 1:
        free_batch(model)
    return model


# ---------------------------------------------------------------- building


def _in_a_thread(path: Path, model: ir.Model, settings: BuildSettings, device: torch.device, monitor: Any) -> bytes:
    """The serialized engine; while TensorRT works Python would not hear Ctrl-C, but it does while it waits for a thread."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_serialized, path, model, settings, device, monitor)
        try:
            return future.result()
        except BaseException:
            monitor.stopped = True
            raise


def _serialized(path: Path, model: ir.Model, settings: BuildSettings, device: torch.device, monitor: Any) -> bytes:
    import tensorrt as trt

    with torch.cuda.device(device), _heard(f"TensorRT cannot build {path.name}") as logger:
        torch.cuda.empty_cache()  # TensorRT allocates beside PyTorch, which keeps what it freed
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            raise EngineError(f"its parser refuses the graph: {'; '.join(_refusals(parser))}.")
        _lay_out_plainly(network)
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that layers say in which type they run
        if settings.precision != "tf32":
            config.clear_flag(trt.BuilderFlag.TF32)
        if settings.workspace_gb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings.workspace_gb * 1e9))
        if _is_free(model):
            _add_profile(builder, config, model, settings.batch)
        timings = cache_folder() / "tensorrt" / f"{_file_name(device)}.timings"
        _load_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError("the build was stopped." if monitor.stopped else "it gives no engine.")
        _save_timings(config, timings)
        return bytes(plan)


def _refusals(parser: trt.OnnxParser) -> Iterator[str]:
    """What the parser says, with the nodes that it names."""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"{error.node_operator()} '{error.node_name()}': " if error.node_name() else ""
        yield f"{where}{error.desc()}"


def _lay_out_plainly(network: trt.INetworkDefinition) -> None:
    """Input and output lie in memory as PyTorch's tensors do; by default TensorRT may choose any format (NvInfer.h, ITensor)."""
    import tensorrt as trt

    given = (network.get_input(index) for index in range(network.num_inputs))
    made = (network.get_output(index) for index in range(network.num_outputs))
    for tensor in (*given, *made):
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


def _add_profile(builder: trt.Builder, config: trt.IBuilderConfig, model: ir.Model, batch: int) -> None:
    """1 to `batch` windows at a time, fastest with all of them."""
    import tensorrt as trt

    value, profile = image_input(model), builder.create_optimization_profile()
    _, *rest = static_input_shape(model)
    least, most = (trt.Dims([number, *rest]) for number in (1, batch))
    profile.set_shape(str(value.name), least, most, most)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"a profile of 1 to {batch} windows of {rest} is refused.")


def _is_free(model: ir.Model) -> bool:
    """Whether the number of windows is the caller's choice: only then TensorRT wants a profile."""
    shape = image_input(model).shape
    return shape is not None and not isinstance(shape[0], int)


def _file_name(device: torch.device) -> str:
    """Timings hold for one GPU, TensorRT and CUDA."""
    text = f"{_name(device)}-{_capability(device)}-{version()}-cuda{torch.version.cuda}"
    return re.sub(r"[^\w.-]+", "-", text)


def _load_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Give the build the timings of earlier ones; those of another machine are refused by TensorRT and begun anew."""
    stored = path.read_bytes() if path.is_file() else b""
    for content in dict.fromkeys((stored, b"")):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return


def _save_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Keep the timings; where they cannot be, the next build is slower, but this one is done."""
    timings = config.get_timing_cache()
    if timings is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(bytes(timings.serialize()))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("TensorRT's timings of kernels cannot be kept for the next build in %s: %s", path, error)
        with suppress(OSError):
            temporary.unlink()


# ---------------------------------------------------------------- what TensorRT calls


@cache
def _logger() -> tuple[trt.ILogger, deque[str]]:
    """TensorRT's only logger in this process, and the errors it was told; these become part of ours."""
    import tensorrt as trt

    errors: deque[str] = deque(maxlen=20)
    grave = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in grave:
                errors.append(msg)
            log.log(logging.WARNING if severity == trt.ILogger.Severity.WARNING else logging.DEBUG, "TensorRT: %s", msg)

    return Log(), errors


@contextmanager
def _heard(tried: str) -> Iterator[trt.ILogger]:
    """Adds what TensorRT logged, and what helps against it, to an EngineError."""
    logger, errors = _logger()
    errors.clear()
    try:
        yield logger
    except EngineError as error:
        reasons = list(dict.fromkeys(errors))
        raise EngineError(" ".join((f"{tried}: {error}", *reasons, *_advice(" ".join(reasons))))) from error
    except (RuntimeError, TypeError) as error:  # of PyTorch's CUDA, or of the bindings
        if isinstance(error, TypeError) and NOTHING not in str(error):
            raise
        reasons = list(dict.fromkeys((*str(error).splitlines()[:1], *errors)))
        raise EngineError(" ".join((f"{tried}:", *reasons, *_advice(" ".join(reasons))))) from error


def _advice(reasons: str) -> Iterator[str]:
    if re.search(r"CUDA initialization failure|driver version is insufficient", reasons):
        yield f"TensorRT {version()} may want a newer driver than there is: update it, or install TensorRT for an older CUDA."
    if "memory" in reasons.lower():
        yield "It wants more memory than the GPU has free: take a smaller --batch or --workspace, or close what else uses it."
    missing = re.search(r"[Cc]ould not find any implementation for node (\S.*?)(?:\.|\s\[|$)", reasons)
    if missing:
        yield f"TensorRT has no kernel for {missing.group(1)}: leave that layer in floating point with ptq3d quantize --keep NAME."


def _monitor(progress: Progress) -> Any:
    """Turns the nested phases of a build into one bar, and stops it when told.

    TensorRT calls it from several threads, and prints errors of it instead of raising them.
    """
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, done, steps

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: Any) -> None:
            self.phases[phase_name] = (parent_phase, 0, num_steps)

        def step_complete(self, phase_name: str, step: Any) -> bool:
            parent, _, steps = self.phases.get(phase_name, (None, 0, 0))
            self.phases[phase_name] = (parent, step + 1, steps)
            progress(round(STEPS * self.share()), STEPS)
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def share(self) -> float:
            """How much of the outermost phase is done: its steps, and the share of the phase inside the one that runs."""
            phases = dict(self.phases)
            done, parent = 0.0, next((name for name, phase in phases.items() if phase[0] not in phases), None)
            part = 1.0
            while parent is not None:
                _, finished, steps = phases[parent]
                part /= max(steps, 1)
                done += part * min(finished, steps)
                inner = (name for name, phase in phases.items() if phase[0] == parent)
                parent = next(inner, None) if finished < steps else None
            return done

    return Monitor()
