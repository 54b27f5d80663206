"""Compile what benchmarks/gpu.py measures, all at once: the tilings of ours, and PyTorch's FP16 networks, each in a process of its own.

    python benchmarks/gpu_ahead.py GRAPHS tilings NAME ...
    python benchmarks/gpu_ahead.py GRAPHS fp16 NAME BATCH

Compiled kernels lie in the caches of Triton and of torch.compile, where the measuring process finds them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_networks import Network, filled


def fp16_network(model: onnx.ModelProto, batch: int) -> tuple[Network, torch.nn.Module]:
    """PyTorch's best: FP16, channels last, compiled; cuDNN chooses its kernels by trying them. With the network that it is made of."""
    torch.backends.cudnn.benchmark = True
    network = Network(model, batch, torch.float16, last=True).cuda().eval()
    return network, torch.compile(network, dynamic=False, fullgraph=True)


def compile_fp16(graphs: Path, name: str, batch: int) -> None:
    """Compile one network for so many windows at a time."""
    network, run = fp16_network(filled(onnx.load(graphs / f"{name}.fp32.onnx")), batch)
    with torch.inference_mode():
        run(torch.zeros(network.shape, device="cuda"))
    torch.cuda.synchronize()


def compile_tilings(graphs: Path, names: Sequence[str]) -> None:
    """Compile the tilings that will be tried, those of several networks once."""
    from ptq3d.engines.triton.lowering import lower
    from ptq3d.engines.triton.steps import Convolve, Upsample
    from ptq3d.engines.triton.tiles import worth_trying
    from ptq3d.engines.triton.tuning import compile_ahead, problem, product_of_step

    steps = {}
    for name in names:
        for step in lower(filled(onnx.load(graphs / f"{name}.int8.onnx")), 1).steps:
            if isinstance(step, Convolve | Upsample):
                steps.setdefault(problem(step), step)
    compile_ahead([(step, tile) for step in steps.values() for tile in worth_trying(product_of_step(step))])


def prepare(graphs: Path, names: Sequence[str], batches: Sequence[int], *, fp16: bool) -> None:
    """Compile everything, side by side; what fails here fails again where it is measured, and is reported there."""
    jobs = [["tilings", *names]]
    if fp16:
        jobs += [["fp16", name, str(batch)] for name in names for batch in batches]
    command = [sys.executable, __file__, str(graphs)]
    running = [subprocess.Popen([*command, *job], stderr=subprocess.DEVNULL) for job in jobs]
    for process in running:
        process.wait()


if __name__ == "__main__":
    folder, kind, *rest = sys.argv[1:]
    if kind == "tilings":
        compile_tilings(Path(folder), rest)
    else:
        compile_fp16(Path(folder), rest[0], int(rest[1]))
