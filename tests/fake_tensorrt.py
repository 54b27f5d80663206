"""A stand-in for TensorRT's Python binding and for torch's CUDA, for the paths of an engine's life.

It computes with ONNX Runtime what TensorRT would on a GPU, reading and writing the addresses that it is given. Every call and every
freed object is written down. Its names and arguments are held against the stubs of the real bindings by test_tensorrt_stubs.py.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

NAMES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int64": "INT64"}


@dataclass
class Machine:
    """What there is, what goes wrong, and what was done.

    Args:
        faults: of "parser", "no kernel", "build memory", "no profile", "deserialize", "context memory", "input memory", "capture",
            "execute", "timings", "address", "driver", "refused capture", "running".
        calls: what was called and freed, in order.
    """

    version: str = "10.16.1.11"
    capability: tuple[int, int] = (9, 0)
    name: str = "NVIDIA Stand-in"
    faults: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    capturing: list[Callable[[], bool]] | None = None

    def freed(self) -> list[str]:
        return [call.removeprefix("free ") for call in self.calls if call.startswith("free ")]


def install(patch: pytest.MonkeyPatch, machine: Machine) -> types.ModuleType:
    """Put the stand-ins in place of `tensorrt` and of what an engine uses of torch.cuda."""
    from ptq3d.engines import tensorrt as backend

    module = binding(machine)
    patch.setitem(sys.modules, "tensorrt", module)
    backend._logger.cache_clear()
    real = backend._device
    patch.setattr(backend, "_device", lambda name: real(name) and torch.device("cpu"))
    for name, value in cuda(machine).items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.version, "cuda", "13.0")
    zeros = torch.zeros

    def allocated(*args: object, **kwargs: object) -> torch.Tensor:
        if "input memory" in machine.faults and "device" in kwargs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*args, **kwargs)

    patch.setattr(torch, "zeros", allocated)
    return module


# ---------------------------------------------------------------- torch.cuda


def cuda(machine: Machine) -> dict[str, object]:
    class Stream:
        cuda_stream = 77

        def __init__(self, device: object = None) -> None: ...

        def wait_stream(self, other: object) -> None:
            machine.calls.append("wait")

        def synchronize(self) -> None:
            machine.calls.append("synchronize")

    class Graph:
        def __init__(self) -> None:
            self.work: list[Callable[[], bool]] = []

        def replay(self) -> None:
            machine.calls.append("replay")
            if "running" in machine.faults:
                raise RuntimeError(
                    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be late"
                )
            for one in self.work:
                one()

        def __del__(self) -> None:
            machine.calls.append("free graph")

    @contextmanager
    def graph(one: Graph, stream: object = None, capture_error_mode: str = "global") -> Iterator[None]:
        machine.capturing = one.work
        assert capture_error_mode == "thread_local"
        try:
            yield
            if "capture" in machine.faults:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            machine.capturing = None

    return {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_name": lambda _=None: machine.name,
        "get_device_capability": lambda _=None: machine.capability,
        "device": lambda _: nullcontext(),
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda _=None: Stream(),
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda _=None: None,
        "empty_cache": lambda: machine.calls.append("empty cache"),
        "mem_get_info": lambda _=None: (2_000_000_000, 80_000_000_000),
    }


# ---------------------------------------------------------------- tensorrt


def binding(machine: Machine) -> types.ModuleType:
    calls, faults = machine.calls, machine.faults
    module = types.ModuleType("tensorrt")

    class Counted:
        def __del__(self) -> None:
            calls.append(f"free {type(self).__name__}")

    class ILogger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3
            VERBOSE = 4

        def __init__(self) -> None: ...

        def log(self, severity: Severity, msg: str) -> None: ...

    class IProgressMonitor:
        def __init__(self) -> None: ...

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool: ...

        def phase_finish(self, phase_name: str) -> None: ...

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    class BuilderFlag(enum.IntEnum):
        TF32 = 5

    class MemoryPoolType(enum.IntEnum):
        WORKSPACE = 0

    class ProfilingVerbosity(enum.IntEnum):
        LAYER_NAMES_ONLY = 0
        DETAILED = 2

    class TensorFormat(enum.IntEnum):
        LINEAR = 0
        CDHW32 = 6

    class LayerInformationFormat(enum.IntEnum):
        JSON = 1

    class TensorIOMode(enum.IntEnum):
        INPUT = 1
        OUTPUT = 2

    DataType = enum.IntEnum("DataType", ["FLOAT", "HALF", "INT8", "INT64"])

    class Dims(tuple):
        def __new__(cls, shape: list[int]) -> Dims:
            return super().__new__(cls, shape)

    class IHostMemory(bytes):
        pass

    class ITensor:
        allowed_formats = (1 << TensorFormat.LINEAR) | (1 << TensorFormat.CDHW32)

    class INetworkDefinition(Counted):
        num_inputs = num_outputs = 1

        def __init__(self, flags: int, builder: Builder) -> None:
            calls.append(f"network {flags}")
            self.model, self.alive = b"", builder  # as the real ones keep what they were made by
            self.ports = ITensor(), ITensor()

        def get_input(self, index: int) -> ITensor:
            return self.ports[index]

        def get_output(self, index: int) -> ITensor:
            return self.ports[1 + index]

    class ParserError:
        def __init__(self, name: str, operator: str, text: str) -> None:
            self.texts = name, operator, text

        def node_name(self) -> str:
            return self.texts[0]

        def node_operator(self) -> str:
            return self.texts[1]

        def desc(self) -> str:
            return self.texts[2]

    class OnnxParser(Counted):
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self.network, self.errors = network, []

        def parse_from_file(self, model: str) -> bool:
            calls.append("parse")
            if "parser" in faults:
                self.errors = [
                    ParserError("resize_3", "Resize", "only three dimensions are resized"),
                    ParserError("", "", "the model is of a newer IR"),
                ]
            self.network.model = Path(model).read_bytes()
            return not self.errors

        @property
        def num_errors(self) -> int:
            return len(self.errors)

        def get_error(self, index: int) -> ParserError:
            return self.errors[index]

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> IHostMemory:
            return IHostMemory(self.content + b"more")

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple] = {}

        def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
            self.shapes[input] = (min, opt, max)

    class IBuilderConfig(Counted):
        def __init__(self, builder: Builder) -> None:
            self.alive, self.progress_monitor = builder, None
            self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
            self.flags, self.profiles, self.timings = {BuilderFlag.TF32}, [], None

        def clear_flag(self, flag: BuilderFlag) -> None:
            calls.append(f"clear {flag.name}")
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
            calls.append(f"{pool.name} {pool_size}")

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self.profiles.append(profile)
            return -1 if "no profile" in faults else len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            refused = "timings" in faults and cache.content != b""
            calls.append(f"timings of {len(cache.content)} bytes{' refused' if refused else ''}")
            self.timings = None if refused else cache
            return not refused

        def get_timing_cache(self) -> ITimingCache:
            return self.timings

    class Builder(Counted):
        def __init__(self, logger: ILogger) -> None:
            self.logger_ = logger
            _require_driver(logger)

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags, self)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig(self)

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
            calls.append("build")
            if not _progress(config.progress_monitor):
                return None
            severity = ILogger.Severity
            self.logger_.log(severity.INFO, "building")
            self.logger_.log(severity.WARNING, "a weight is subnormal")
            if "no kernel" in faults:
                text = "Error Code 10: Could not find any implementation for node conv_4 + elu_5. (no tactic)"
                self.logger_.log(severity.ERROR, text)
                return None
            if "build memory" in faults:
                self.logger_.log(severity.INTERNAL_ERROR, "Error Code 2: OutOfMemory (requested 4096 bytes)")
                return None
            return IHostMemory(
                json.dumps(
                    {
                        "model": network.model.hex(),
                        "version": machine.version,
                        "formats": [
                            max(TensorFormat, key=lambda one: one * (port.allowed_formats >> one & 1))
                            for port in network.ports
                        ],
                        "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
                    }
                ).encode()
            )

    def _require_driver(logger: ILogger) -> None:
        if "driver" in faults:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35.")
            raise TypeError("pybind11::init(): factory function returned nullptr")  # as the real bindings do

    def _progress(monitor: IProgressMonitor | None) -> bool:
        if monitor is None:
            return True
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 4)
        for step in range(4):
            if not monitor.step_complete("Timing", step):
                return False
        monitor.phase_finish("Timing")
        going = all(monitor.step_complete("Building", step) for step in range(2))
        monitor.phase_finish("Building")
        return going

    class IExecutionContext(Counted):
        def __init__(self, engine: ICudaEngine) -> None:
            self.engine_, self.addresses = engine, {}
            self.given = engine.ports[0].name
            self.shape = tuple(engine.get_tensor_shape(self.given))

        def set_input_shape(self, name: str, shape: tuple) -> bool:
            calls.append(f"shape {shape[0]}")
            self.shape = tuple(shape)
            return name == self.given

        def get_tensor_shape(self, name: str) -> Dims:
            fixed = self.engine_.get_tensor_shape(name)
            return Dims([self.shape[0], *fixed[1:]])

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return "address" not in faults

        def execute_async_v3(self, stream_handle: int) -> bool:
            assert stream_handle == 77, "the default stream"
            calls.append("capture" if machine.capturing is not None else "execute")
            if machine.capturing is not None and "refused capture" in faults:
                return False
            if machine.capturing is not None:
                machine.capturing.append(self._compute)
                return True
            return "execute" not in faults and self._compute()

        def _compute(self) -> bool:
            session = self.engine_.session
            given, made = (port.name for port in self.engine_.ports)
            x = _memory(self.addresses[given], self.shape, np.float32)
            answers = session.run([made], {given: x})[0]
            _memory(self.addresses[made], answers.shape, answers.dtype)[...] = answers
            return True

    class EngineInspector(Counted):
        execution_context = None

        def __init__(self, engine: ICudaEngine) -> None:
            self.engine_ = engine

        def get_engine_information(self, format: LayerInformationFormat) -> str:
            model = onnx.load_from_string(self.engine_.model)
            if not self.engine_.detailed:
                return json.dumps({"Layers": [node.name for node in model.graph.node]})
            listed = list(layer_information(model.graph, new=machine.version.startswith("11")))
            return json.dumps({"Layers": listed, "Bindings": ["image", "logits"]})

    class ICudaEngine(Counted):
        def __init__(self, written: dict, runtime: Runtime) -> None:
            self.alive = runtime
            self.model, self.detailed = bytes.fromhex(written["model"]), written["detailed"]
            self.formats = written["formats"]
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
            self.ports = [self.session.get_inputs()[0], self.session.get_outputs()[0]]

        @property
        def num_io_tensors(self) -> int:
            return 2

        @property
        def device_memory_size_v2(self) -> int:
            return 5_000_000_000

        def get_tensor_name(self, index: int) -> str:
            return self.ports[index].name

        def get_tensor_mode(self, name: str) -> TensorIOMode:
            return TensorIOMode.INPUT if name == self.ports[0].name else TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> Dims:
            port = next(one for one in self.ports if one.name == name)
            return Dims([size if isinstance(size, int) else -1 for size in port.shape])

        def get_tensor_format(self, name: str) -> TensorFormat:
            return TensorFormat(self.formats[[one.name for one in self.ports].index(name)])

        def get_tensor_dtype(self, name: str) -> DataType:
            port = next(one for one in self.ports if one.name == name)
            kind = {"float": "float32"}.get(port.type[7:-1], port.type[7:-1])
            return DataType[NAMES[kind]]

        def create_execution_context(self) -> IExecutionContext | None:
            return None if "context memory" in faults else IExecutionContext(self)

        def create_engine_inspector(self) -> EngineInspector:
            return EngineInspector(self)

    class Runtime(Counted):
        def __init__(self, logger: ILogger) -> None:
            self.logger_ = logger
            _require_driver(logger)

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            if "deserialize" in faults:
                self.logger_.log(ILogger.Severity.ERROR, "Error Code 1: Serialization assertion failed")
                return None
            return ICudaEngine(json.loads(serialized_engine), self)

    for name, value in list(locals().items()):
        if isinstance(value, type) and name != "Counted":
            setattr(module, name, value)
    module.__version__ = machine.version
    return module


def _memory(address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def layer_information(graph: onnx.GraphProto, *, new: bool) -> Iterator[dict]:
    """What an inspector says of a graph whose INT8 layers all run in INT8, in the layout of TensorRT 11 or 10."""
    makers = {output: node for node in graph.node for output in node.output}

    def type_of(name: str) -> str:
        node = makers.get(name)
        while node is not None and node.op_type in ("Concat", "Reshape", "Transpose", "MaxPool"):
            node = makers.get(node.input[0])
        return "Int8" if node is not None and node.op_type == "DequantizeLinear" else "Float"

    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        both = {type_of(name) for name in node.input[:2]}
        kind = "Int8" if both == {"Int8"} else "Float"
        tensor = {"Name": node.input[0], "Dimensions": [1, 2, 3, 4, 5]}
        shown = f"{'Thirty-two wide channel vectorized row major Int8' if kind == 'Int8' else 'Row major linear FP32'} format"
        tensor |= {"Format": shown, "Datatype": kind} if new else {"Format/Datatype": shown}
        layer = {
            "Name": f"w + {node.name} + PWN(relu)",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32"
            if kind == "Int8"
            else "sm80_xmma_f32f32",
            "Metadata": f"[ONNX Layer: {node.name}]\x1e[ONNX Layer: relu]",
        }
        if node.op_type == "Conv":
            layer["Weights"] = {"Type": kind, "Count": 864}
        yield layer
