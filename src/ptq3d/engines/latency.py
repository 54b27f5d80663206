"""How long an engine takes for windows, by the clock of its device."""

from __future__ import annotations

from time import perf_counter

import torch

from ptq3d.engines.base import Engine, Windows


def latency_ms(engine: Engine, windows: Windows) -> float:
    """Milliseconds from windows in the engine's memory to answers there.

    On a GPU by CUDA events, without the copies from and to the host, which a case does not make either; elsewhere by the host's
    clock, from array to array.

    Args:
        engine: it should have run before.
        windows: (n, C, X, Y, Z) float32.
    """
    if engine.device.type != "cuda":
        start = perf_counter()
        engine(windows)
        return (perf_counter() - start) * 1e3
    pieces = [torch.from_numpy(window).to(engine.device) for window in windows]
    with torch.cuda.device(engine.device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        for _ in engine.stream(pieces):
            pass
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
