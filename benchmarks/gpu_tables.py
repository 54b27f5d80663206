"""What benchmarks/gpu.py says of a network: its steps with what bounds them, and its tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptq3d.engines.triton import steps as kinds

BASELINES = ("fp16", "tf32", "fp32")


def macs_of(step: kinds.Step) -> int:
    """Multiplications of one step, of all its windows."""
    values = int(np.prod(step.out.shape))
    if isinstance(step, kinds.Convolve):
        return values * int(np.prod(step.weight.shape[1:]))
    if isinstance(step, kinds.Upsample):
        return int(np.prod(step.x.shape)) * int(np.prod(step.weight.shape[1:]))
    if isinstance(step, kinds.Attend):
        return 2 * int(np.prod(step.query.shape)) * step.key.shape[-2]
    weights = [one for one in getattr(step, "inputs", ()) if isinstance(one, np.ndarray) and one.ndim > 1]
    if isinstance(step, kinds.Float) and step.op == "Conv" and weights:
        return values * int(np.prod(weights[0].shape[1:]))
    return 0


def bytes_of(step: kinds.Step) -> int:
    """Bytes that one step must move: what it reads and writes, and its weights, once each."""
    views = {(one.buffer, one.offset, one.shape): one for one in (*step.reads, step.out)}
    moved = sum(int(np.prod(one.shape)) * kinds.BYTES[one.dtype] for one in views.values())
    weight = getattr(step, "weight", None)
    constants = [one for one in getattr(step, "inputs", ()) if isinstance(one, np.ndarray)]
    return moved + sum(one.nbytes for one in (*constants, *([weight] if weight is not None else [])))


def table_of_steps(engine: Any, limits: dict[str, Any]) -> list[dict[str, Any]]:
    """Every step with what bounds it: the measured peak of its type, and the measured bandwidth."""
    rows = []
    for step, ms in engine.step_times():
        integer = isinstance(step, (kinds.Convolve, kinds.Upsample)) and step.x.dtype == "int8"
        peak = limits["int8_measured" if integer else "fp16_measured"]
        macs, moved = macs_of(step), bytes_of(step)
        bounds = {"arithmetic": 2e3 * macs / peak, "bytes": 1e3 * moved / limits["bytes_measured"]}
        bound = max(bounds, key=lambda one: bounds[one])
        row = {"name": step.name, "kind": type(step).__name__, "ms": ms, "gmac": macs / 1e9, "mbytes": moved / 1e6}
        rows.append(row | {"roofline_ms": bounds[bound], "bound": bound, "out": list(step.out.shape)})
    return rows


def runs_of(found: dict[str, Any], kind: str) -> dict[int, dict[str, Any]]:
    """Batch -> what was measured of one kind."""
    return {int(key.split(" x")[1]): one for key, one in found.items() if key.startswith(f"{kind} x")}


def shown(found: dict[str, Any]) -> str:
    """The tables of one network."""
    lines = [f"\n{found['network']}"]
    first, limits = found.get("first", {}), found.get("limits", {})
    if first:
        said = f"{first['gmac']:.1f} GMAC a window, {100 * first['int8_share']:.1f} % INT8"
        said += f", error {first['relative_error']:.4f}, equal argmax {first['equal_argmax']:.4f}"
        lines[0] += f": {said}"
    if began := found.get("starts"):
        whole = f"whole processes {began['first_process']:.1f} and {began['later_process']:.1f} s"
        lines.append(f"  first start {began['first']:.1f} s, a later one {began['later']:.1f} s ({whole})")
    rates: dict[str, float] = {}
    lines.append(f"  {'':6}{'batch':>6}{'ms':>10}{'windows/s':>11}{'TOP/s':>8}{'sheet':>7}{'_int_mm':>8}  repeats")
    for kind in ("int8", *BASELINES):
        for batch, one in runs_of(found, kind).items():
            rates[kind] = max(rates.get(kind, 0.0), one["windows_s"])
            tops = 2e9 * first.get("gmac", 0.0) * one["windows_s"]
            shares = [tops / limits[key] if limits.get(key) else 0.0 for key in ("int8_datasheet", "int8_measured")]
            line = f"  {kind:6}{batch:6}{one['ms']:10.3f}{one['windows_s']:11.1f}{tops / 1e12:8.1f}"
            line += f"{100 * shares[0]:6.1f}%{100 * shares[1]:7.1f}%"
            lines.append(line + (f"  {one['repeats']}" if "repeats" in one else ""))
    if "int8" in rates and "fp16" in rates:
        lines.append(f"  INT8 is {rates['int8'] / rates['fp16']:.2f} times the best FP16")
    fp16_case = [one["case"] for one in runs_of(found, "fp16").values() if "case" in one]
    for label, case in [("int8", found.get("case")), *(("fp16", one) for one in fp16_case)]:
        if case:
            lines.append(
                f"  whole case {label}: {case['seconds']:.3f} s, {case['voxels']} voxels, {case['windows']} windows"
            )
    lines += table(found.get("steps", []))
    lines += [f"  {part} failed: {why}" for part, why in found["errors"].items()]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Steps with what bounds them."""
    if not rows:
        return []
    lines = [f"  {'step':44}{'kind':14}{'ms':>9}{'GMAC':>9}{'MB':>9}{'roofline':>9}{'share':>7}  bound"]
    for row in rows:
        share = row["roofline_ms"] / row["ms"] if row["ms"] else 0.0
        line = f"  {row['name'][-43:]:44}{row['kind']:14}{row['ms']:9.4f}{row['gmac']:9.2f}{row['mbytes']:9.1f}"
        lines.append(f"{line}{row['roofline_ms']:9.4f}{100 * share:6.0f}%  {row['bound']}")
    total, bound = (sum(row[key] for row in rows) for key in ("ms", "roofline_ms"))
    lines.append(f"  {'all':58}{total:9.4f}{'':18}{bound:9.4f}{100 * bound / total:6.0f}%")
    return lines
