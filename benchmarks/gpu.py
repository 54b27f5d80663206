"""The Triton engine on an NVIDIA GPU beside PyTorch: latency, throughput, operations against the peak, bytes against the bandwidth.

    python benchmarks/gpu.py GRAPHS [--networks unet ...] [--batches 1 8] [--baselines fp16 tf32 fp32] [--starts unet] [--report gpu.json]

GRAPHS is a folder that benchmarks/gpu_graphs.py wrote. Needs torch, triton, numpy and onnx only, and no installation: the package is
found beside this folder. Starts are measured with empty caches first; then everything is compiled side by side, and every network
measured in a process of its own, so that one that fails costs no other; what it had measured is kept. Figures are medians of CUDA
events around replays of CUDA graphs after warm-up, PyTorch's as well; TOP/s count two operations for a multiplication of the
network, whatever computes it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from types import MappingProxyType
from typing import Any

import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_ahead import fp16_network, prepare
from gpu_networks import Network, filled, told, volume
from gpu_tables import BASELINES, shown, table_of_steps

from ptq3d.errors import EngineError, Ptq3dError
from ptq3d.windows import gaussian_importance, window_starts

NAMES = ("unet", "nnunet", "segresnet", "transunet", "swinunetr", "mlperf", "meshnet")
DATASHEET = {"H100": 1979e12, "H200": 1979e12}  # dense INT8 operations a second, SXM; NVIDIA's data sheets
REPLAYS, WARM = 25, 5
LIMIT_S = 420  # for one network, compiling included
# voxels; all others have a CT of the abdomen at 1.5 x 1.5 x 2 mm
CASES = {"mlperf": (320, 320, 200), "meshnet": (256, 256, 256)}
CASE = (158, 198, 164)
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    NotImplementedError,
    Ptq3dError,
)


@dataclass(eq=False)
class Runner:
    """What both sides are measured through: a CUDA graph with its input and its answer.

    Args:
        x: (N, C, X, Y, Z) float32, read by every replay.
        y: (N, F, X, Y, Z) of any type and strides, written by every replay.
        replay: launches the graph.
        step: the real value of one integer of `y`, 1 for floats.
        zero: the integer that stands for 0.
        engine: ours, None for PyTorch.
    """

    x: torch.Tensor
    y: torch.Tensor
    replay: Callable[[], object]
    step: float = 1.0
    zero: int = 0
    engine: Any = None


def opened(model: onnx.ModelProto, batch: int) -> Runner:
    """Ours: the only place that knows the engine's interface."""
    from ptq3d.engines.triton.engine import TritonEngine

    engine = TritonEngine(model, batch=batch, device=torch.device("cuda"))
    out = engine.program.output
    return Runner(engine.static_input, engine.static_output, engine.replay, *out.scale, engine)


def compiled(model: onnx.ModelProto, batch: int, kind: str) -> Runner:
    """PyTorch's: FP32 and TF32 as they are, FP16 channels last and compiled; cuDNN chooses its kernels by trying them."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    run: torch.nn.Module
    if kind == "fp16":
        network, run = fp16_network(model, batch)
    else:
        run = network = Network(model, batch).cuda().eval()
    x = torch.zeros(network.shape, device="cuda")
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x)
    return Runner(x, y, graph.replay)


def timed(run: Callable[[], object], replays: int = REPLAYS, warm: int = WARM) -> float:
    """Median milliseconds of one run."""
    for _ in range(warm):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for began, ended in pairs:
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return median(began.elapsed_time(ended) for began, ended in pairs)


def ceilings() -> dict[str, Any]:
    """What the device can do: INT8 operations and bytes a second, as its data sheet says and as PyTorch measures here."""
    name = torch.cuda.get_device_name()
    a = torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda")
    product = timed(lambda: torch._int_mm(a, a.t()))
    h = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    halves = timed(lambda: h @ h)
    one, two = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = timed(lambda: two.copy_(one))
    sheet = next((peak for key, peak in DATASHEET.items() if key in name), 0.0)
    return {
        "int8_datasheet": sheet,
        "int8_measured": 2 * 8192**3 / product * 1e3,
        "fp16_measured": 2 * 8192**3 / halves * 1e3,
        "bytes_measured": 2 * one.numel() / copy * 1e3,
    }


def machine() -> dict[str, Any]:
    """Where and with what it ran."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "replays": REPLAYS,
        "warm_up": WARM,
    }


def real(runner: Runner) -> torch.Tensor:
    """A copy of the answer in float32."""
    return (runner.y.to(torch.float32, copy=True) - runner.zero) * runner.step


def fill(runner: Runner, *, seed: int = 0) -> None:
    """Windows of an image each; the first and the last are the same."""
    shape = tuple(runner.x.shape)
    windows = [volume(shape[2:], seed + place) for place in range(min(shape[0], 3))]
    for place in range(shape[0]):
        runner.x[place].copy_(windows[0 if place == shape[0] - 1 else place % len(windows)][0].expand(shape[1:]))


def repeats(runner: Runner) -> bool:
    """Whether replays answer alike, bit for bit, and the same window alike at two places of the batch."""
    fill(runner)
    answers = []
    for _ in range(2):
        runner.replay()
        torch.cuda.synchronize()
        answers.append(runner.y.clone())
    return torch.equal(*answers) and torch.equal(answers[0][0], answers[0][-1])


def whole_case(runner: Runner, shape: Sequence[int], classes: int) -> dict[str, Any]:
    """Seconds from an image on the host to its labels on the host: windows, Gaussian blending, head and argmax on the GPU."""
    batch, features = len(runner.x), runner.y.shape[1]
    window = tuple(int(one) for one in runner.x.shape[2:])
    starts = window_starts(tuple(shape), window, 0.5)  # type: ignore[arg-type]
    importance = gaussian_importance(window).cuda()[..., None]  # type: ignore[arg-type]
    image = volume(tuple(shape))[0].pin_memory()
    head = torch.randn(features, classes, device="cuda", dtype=torch.float16) if classes else None
    sums = torch.empty((*shape, features), device="cuda")
    weights = torch.empty((*shape, 1), device="cuda")

    def run() -> torch.Tensor:
        on_device = image.to("cuda", non_blocking=True)
        sums.zero_()
        weights.zero_()
        for first in range(0, len(starts), batch):
            boxes = [tuple(slice(a, a + w) for a, w in zip(one, window, strict=True)) for one in starts[first:][:batch]]
            for place, box in enumerate(boxes):
                runner.x[place].copy_(on_device[:, *box])
            runner.replay()
            for place, box in enumerate(boxes):
                centred = runner.y[place].movedim(0, -1).float() - runner.zero
                sums[box].addcmul_(centred, importance, value=runner.step)
                weights[box] += importance
        labels = torch.empty(tuple(shape), dtype=torch.uint8, device="cuda")
        for plane, total, weight in zip(labels, sums, weights, strict=True):
            mean = total / weight
            plane.copy_((mean.half() @ head if head is not None else mean).argmax(-1))
        return labels.cpu()

    run()
    torch.cuda.synchronize()
    began = perf_counter()
    run()
    torch.cuda.synchronize()
    return {"seconds": perf_counter() - began, "voxels": list(shape), "windows": len(starts), "batch": batch}


def agreement(ours: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """INT8 against FP32: root mean square of the error over that of the answer, and the share of equal largest channels."""
    error = (ours - exact).square().mean().sqrt() / exact.std()
    return {"relative_error": float(error), "equal_argmax": float((ours.argmax(1) == exact.argmax(1)).float().mean())}


class Row:
    """What is found of one network; written after every part, so that a failure loses nothing that was measured."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.found: dict[str, Any] = {"network": name, "machine": machine(), "limits": ceilings(), "errors": {}}

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of one part, None where it failed."""
        began = perf_counter()
        try:
            result = work()
        except FAILURES as error:
            traceback.print_exc()
            self.found["errors"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            result = None
        else:
            self.found[name] = result
        print(f"    {name}: {perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        self.path.write_text(json.dumps(self.found, indent=1))
        torch.cuda.empty_cache()
        return result


def measured(graphs: Path, name: str, options: argparse.Namespace) -> None:
    """One network, into the report of the options."""
    row = Row(options.report, name)
    int8, fp32 = (onnx.load(graphs / f"{name}.{kind}.onnx") for kind in ("int8", "fp32"))
    classes = told(int8)["classes"]
    int8, fp32 = filled(int8), filled(fp32)
    fixed = int8.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    batches = [fixed] if fixed else options.batches
    best: dict[str, Any] = {}

    def first() -> dict[str, Any]:
        runner = opened(int8, batches[0])
        layers = runner.engine.program.layers
        macs = sum(one.macs for one in layers)
        shares = sum(one.macs for one in layers if one.precision == "int8") / max(macs, 1)
        fill(runner)
        runner.replay()
        exact = Network(fp32, batches[0]).cuda()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.inference_mode():
            close = agreement(real(runner), exact(runner.x))
        return {"gmac": macs / 1e9, "int8_share": shares, **close, "repeats": repeats(runner)}

    def ours(batch: int) -> dict[str, Any]:
        runner = opened(int8, batch)
        same = repeats(runner)
        ms = timed(runner.replay)
        if not best or batch / ms > best["rate"]:
            best.update(rate=batch / ms, runner=runner)
        arena = runner.engine.program.arena_bytes
        return {"ms": ms, "windows_s": 1e3 * batch / ms, "repeats": same, "arena_mbytes": arena / 1e6}

    def theirs(kind: str, batch: int) -> dict[str, Any]:
        runner = compiled(fp32, batch, kind)
        fill(runner)
        ms = timed(runner.replay)
        found = {"ms": ms, "windows_s": 1e3 * batch / ms}
        if kind == "fp16" and batch == max(batches):
            found["case"] = whole_case(runner, CASES.get(name, CASE), classes)
        return found

    row.part("first", first)
    for batch in batches:
        row.part(f"int8 x{batch}", lambda batch=batch: ours(batch))
    if best:
        row.part("steps", lambda: table_of_steps(best["runner"].engine, row.found["limits"]))
        row.part("case", lambda: whole_case(best["runner"], CASES.get(name, CASE), classes))
    best.clear()
    for kind in options.baselines:
        for batch in batches:
            row.part(f"{kind} x{batch}", lambda kind=kind, batch=batch: theirs(kind, batch))
        torch._dynamo.reset()


def start(graphs: Path, name: str) -> float:
    """Seconds from a model in memory to its first answer, in a process that builds nothing but this."""
    model = filled(onnx.load(graphs / f"{name}.int8.onnx"))
    torch.zeros(1, device="cuda")
    began = perf_counter()
    runner = opened(model, model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1)
    runner.replay()
    torch.cuda.synchronize()
    return perf_counter() - began


def starts(graphs: Path, name: str, scratch: Path) -> dict[str, float]:
    """The first start with empty caches and a later one, in seconds; "process" counts imports and CUDA's own start."""
    with tempfile.TemporaryDirectory(dir=scratch) as caches:
        settings = {"TRITON_CACHE_DIR": f"{caches}/triton", "PTQ3D_CACHE": f"{caches}/ptq3d"}
        found = {}
        for which in ("first", "later"):
            began = perf_counter()
            text, failure = apart([str(graphs), "--networks", name, "--start"], settings)
            if failure:
                raise EngineError(f"{name} did not start: {failure}")
            found |= {which: float(text.splitlines()[-1]), f"{which}_process": perf_counter() - began}
    return found


def apart(arguments: Sequence[str], settings: Mapping[str, str] = MappingProxyType({})) -> tuple[str, str]:
    """What this file prints in a process of its own, and "" or how it ended."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **settings})
    except subprocess.TimeoutExpired:
        return "", f"stopped after {LIMIT_S} s"
    sys.stderr.write(done.stderr)
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return done.stdout, "" if done.returncode == 0 else f"{last[:300]} (exit code {done.returncode})"


def network(graphs: Path, name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All of one network, measured in processes of its own."""
    part = scratch / f"{name}.json"
    batches = [str(one) for one in options.batches]
    told_by = [
        str(graphs),
        "--networks",
        name,
        "--report",
        str(part),
        "--batches",
        *batches,
        "--baselines",
        *options.baselines,
        "--inner",
    ]
    _, failure = apart(told_by)
    found: dict[str, Any] = json.loads(part.read_text()) if part.exists() else {"network": name, "errors": {}}
    if failure:
        found["errors"]["process"] = failure
    return found


def main() -> None:
    """Print the tables and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NAMES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument(
        "--starts", nargs="*", default=["unet"], help="networks whose first and later start are measured"
    )
    parser.add_argument("--report", type=Path, default=Path("gpu.json"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        measured(options.graphs, options.networks[0], options)
    elif options.start:
        print(start(options.graphs, options.networks[0]))
    else:
        scratch = options.report.with_suffix(".parts")
        scratch.mkdir(parents=True, exist_ok=True)
        began = {name: starts(options.graphs, name, scratch) for name in options.starts}
        prepare(options.graphs, options.networks, options.batches, fp16="fp16" in options.baselines)
        rows = []
        for name in options.networks:
            rows.append(network(options.graphs, name, options, scratch) | {"starts": began.get(name)})
            print(shown(rows[-1]), flush=True)
            options.report.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
