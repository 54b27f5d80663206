"""Convolutions of volumes as matrix products on tensor cores, their input gathered on the way (implicit GEMM).

Rows of the product are output voxels, or groups of P neighbours along z whose input is one run of memory; columns are output
channels (of each of the P voxels); the sum runs over kernel offsets and input channels. Both operands are int8 and sums int32, or
both are float16 and sums float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptq3d.engines.triton.arithmetic import ZEROS, finish
from ptq3d.engines.triton.rows import as_float


@triton.jit
def inside(first, count: tl.constexpr, spacing: tl.constexpr, size: tl.constexpr, bits):
    """For each row a bit for each of `count` positions first, first + spacing, ...: whether it lies in 0..size - 1."""
    tl.static_assert(count <= 31, "a bit for each offset")
    found = bits
    for place in tl.static_range(count):
        at = first + place * spacing
        found |= ((at >= 0) & (at < size)).to(tl.int32) << place
    return found


@triton.jit
def far(voxels, pitch: tl.constexpr, WIDE: tl.constexpr):
    """How many values lie before a voxel: int32, which is faster, but where WIDE."""
    return (tl.cast(voxels, tl.int64) if WIDE else voxels) * pitch


@triton.jit
def store(
    total, y, other, multiplier, bias, rows, keep, place, channel, scalars,
    y_pitch: tl.constexpr, other_pitch: tl.constexpr, channels: tl.constexpr,
    biased: tl.constexpr, kind: tl.constexpr, rounds: tl.constexpr, adds: tl.constexpr, last: tl.constexpr,
    integers: tl.constexpr, once: tl.constexpr, even: tl.constexpr,
    rounded_zero, other_zero, out_zero, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums through the epilogue into the output.

    Args:
        rows: of the output, in voxels, for each row of `total`.
        keep: (rows, columns) what there is; everything where `even`.
        place, channel: of each column.
        scalars: (rounded, other, out step, low, high, last low, last high).

    Returns:
        What was stored, 0 where nothing was.
    """
    real = channel < channels
    v = total.to(tl.float32) * tl.load(multiplier + channel, mask=real, other=0.0)[None, :]
    if biased:
        v = v + tl.load(bias + channel, mask=real, other=0.0)[None, :]
    if adds:
        at = far(rows, other_pitch, WIDE)[:, None] + (place * other_pitch + channel)[None, :]
        more = as_float(tl.load(other + at) if even else tl.load(other + at, mask=keep, other=0))
    else:
        more = v
    q = finish(
        v, more, scalars[0], scalars[1], scalars[2], kind, scalars[3], scalars[4],
        rounds, adds, last, scalars[5], scalars[6], integers, once, rounded_zero, other_zero, out_zero,
    )  # fmt: skip
    at = far(rows, y_pitch, WIDE)[:, None] + (place * y_pitch + channel)[None, :]
    if even:
        tl.store(y + at, q.to(y.dtype.element_ty))
        return q
    tl.store(y + at, q.to(y.dtype.element_ty), mask=keep)
    return tl.where(keep, q, 0)


@triton.jit
def first_sums(start, channel, live, BM: tl.constexpr, BN: tl.constexpr, SHIFTED: tl.constexpr, SUM: tl.constexpr):
    """(BM, BN) that sums begin with: minus the input's zero times the weights where it is not 0, so that (q - zero) is summed."""
    if SHIFTED:
        return tl.broadcast_to(tl.load(start + channel, mask=live, other=0)[None, :], (BM, BN))
    return tl.zeros((BM, BN), SUM)


@triton.jit
def gather(x, at, pad, there, ok, exists, WHOLE: tl.constexpr, FULL: tl.constexpr, SHIFTED: tl.constexpr):
    """Values at x + `at` where `there`, the input's zero elsewhere; anything in rows that are not `ok`, which nothing stores, and
    where not `exists`, whose weights are 0. All rows are ok where WHOLE, and everything exists where FULL.

    `pad` points to zeros: loads fill with another value than 0 only on the way through registers.
    """
    if SHIFTED:
        from_there = tl.where(there, x + at, pad)
        if WHOLE and FULL:
            return tl.load(from_there)
        return tl.load(from_there, mask=ok if FULL else ok & exists, other=0)
    return tl.load(x + at, mask=there if FULL else there & exists, other=0)


@triton.jit
def pads_of(pad, kk, BM: tl.constexpr, BK: tl.constexpr, PAGES: tl.constexpr):
    """(BM, BK) pointers to zeros, each row's and each program's own: what all read at one address waits in one corner of L2."""
    rows = tl.arange(0, BM) * BK
    return pad + ((tl.program_id(0) % PAGES) * (BM * BK)) + rows[:, None] + kk[None, :]


@triton.jit
def add_sums(sums, first, second, channel, live, n, K: tl.constexpr, SLOTS: tl.constexpr):
    """Add sums of each column to those of its channel; integers, so their order does not matter.

    Additions to one address wait for each other, so programs take turns among SLOTS copies.
    """
    samples = tl.num_programs(2)
    sums += ((tl.program_id(0) % SLOTS) * samples + n) * (K * 2)
    live = live & (channel < K)
    tl.atomic_add(sums + channel * 2, first.to(tl.int64), mask=live, sem="relaxed")
    tl.atomic_add(sums + channel * 2 + 1, second.to(tl.int64), mask=live, sem="relaxed")


@triton.jit(do_not_specialize=ZEROS)
def convolve(
    x, w, y, other, multiplier, bias, sums, pad, start,
    rounded_step, other_step, out_step, low, high, last_low, last_high, rounded_zero, other_zero, out_zero,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    x_pitch: tl.constexpr, y_pitch: tl.constexpr, other_pitch: tl.constexpr,
    x_sample: tl.constexpr, y_sample: tl.constexpr, other_sample: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    UX: tl.constexpr, UY: tl.constexpr, UZ: tl.constexpr,
    P: tl.constexpr, KP: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    biased: tl.constexpr, kind: tl.constexpr, rounds: tl.constexpr, adds: tl.constexpr, last: tl.constexpr,
    integers: tl.constexpr, summed: tl.constexpr, once: tl.constexpr, even: tl.constexpr, SLOTS: tl.constexpr,
    SHIFTED: tl.constexpr, PAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Any convolution without groups; `MODE` says what a run of `RUN` values of the sum is.

    "tap": the channels of one kernel offset; "line": those of the SPAN voxels along z that P outputs read; "all": everything, for
    images of few channels. Where UX x UY x UZ is not 1, it is the factor of a ConvTranspose: its kernel offsets are further columns,
    which are stored as the voxels that they are. OD, OH, OW count the rows of the product.
    """
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    G: tl.constexpr = (OW + P - 1) // P
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    n = tl.program_id(2).to(tl.int64)
    x += n * x_sample
    y += n * y_sample
    g = r % G
    h = (r // G) % OH
    d = r // (G * OH)
    ok = r < OD * OH * G
    ix = d * SD - PD
    iy = h * SH - PH
    iz = g * (P * SW) - PW
    base = far((ix * H + iy) * W + iz, x_pitch, WIDE)
    none = tl.zeros((BM,), tl.int32)
    in_x = tl.where(ok, inside(ix, KD, DD, D, none), 0)
    in_y = inside(iy, KH, DH, H, none)
    in_z = inside(iz, SPAN, DW if MODE == "tap" else 1, W, none)
    KO: tl.constexpr = KW if MODE == "tap" else 1
    NB: tl.constexpr = RUN // BK
    TAPS: tl.constexpr = 1 if MODE == "all" else KD * KH * KO
    kk = tl.arange(0, BK)
    weights = w + col[:, None] * BK + kk[None, :]
    columns = tl.num_programs(1) * BN
    place = col // KP
    channel = col % KP
    live = (channel < K) & (place < P * UX * UY * UZ)
    pads = pads_of(pad, kk, BM, BK, PAGES)
    FULL: tl.constexpr = MODE != "tap" or C % BK == 0
    WHOLE: tl.constexpr = (OD * OH * G) % BM == 0
    total = first_sums(start, channel + (place * K if UX * UY * UZ > 1 else 0), live, BM, BN, SHIFTED, SUM)
    for i in tl.range(0, TAPS * NB, num_stages=STAGES):
        k = (i % NB) * BK + kk
        if MODE == "all":
            voxel = k // C
            tz = voxel % SPAN
            ty = (voxel // SPAN) % KH
            tx = voxel // (SPAN * KH)
            there = (
                (in_x[:, None] >> tx[None, :]) & (in_y[:, None] >> ty[None, :]) & (in_z[:, None] >> tz[None, :])
            ) & 1
            at = far((tx * DD * H + ty * DH) * W + tz, x_pitch, WIDE) + k % C
            there = (there != 0) & (tx < KD)[None, :]
            a = gather(x, base[:, None] + at[None, :], pads, there, ok[:, None], there, WHOLE, FULL, SHIFTED)
        elif MODE == "line":
            tap = i // NB
            tx = tap // KH
            ty = tap % KH
            tz = k // C
            there = (((in_x >> tx) & (in_y >> ty) & 1)[:, None] & (in_z[:, None] >> tz[None, :])) != 0
            at = base + far((tx * DD * H + ty * DH) * W, x_pitch, WIDE)
            at = at[:, None] + (tz * x_pitch + k % C)[None, :]
            a = gather(x, at, pads, there, ok[:, None], there, WHOLE, FULL, SHIFTED)
        else:
            tap = i // NB
            tx = tap // (KH * KO)
            ty = (tap // KO) % KH
            tz = tap % KO
            there = ((in_x >> tx) & (in_y >> ty) & (in_z >> tz) & 1) != 0
            at = base + far((tx * DD * H + ty * DH) * W + tz * DW, x_pitch, WIDE)
            at = at[:, None] + k[None, :]
            a = gather(x, at, pads, there[:, None], ok[:, None], (k < C)[None, :], WHOLE, FULL, SHIFTED)
        b = tl.load(weights + i * columns * BK)
        total = tl.dot(a, b.T, total, out_dtype=SUM)
    keep = ok[:, None] & live[None, :]
    if OW % P != 0:
        keep = keep & ((g[:, None] * P + place[None, :]) < OW)
    if UX * UY * UZ > 1:
        place = ((place // (UY * UZ)) * (OH * UY) + (place // UZ) % UY) * (OW * UZ) + place % UZ
    q = store(
        total, y, other + n * other_sample, multiplier, bias,
        (d * UX * (OH * UY) + h * UY) * (OW * UZ) + g * (P * UZ), keep, place, channel,
        (rounded_step, other_step, out_step, low, high, last_low, last_high),
        y_pitch, other_pitch, K, biased, kind, rounds, adds, last, integers, once, even,
        rounded_zero, other_zero, out_zero, WIDE,
    )  # fmt: skip
    if summed > 0:
        add_sums(sums, tl.sum(q, axis=0), tl.sum(q * q, axis=0), channel, live, n, summed, SLOTS)


@triton.jit(do_not_specialize=ZEROS)
def convolve_lines(
    x, w, y, other, multiplier, bias, sums, pad, start,
    rounded_step, other_step, out_step, low, high, last_low, last_high, rounded_zero, other_zero, out_zero,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OD: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    x_pitch: tl.constexpr, y_pitch: tl.constexpr, other_pitch: tl.constexpr,
    x_sample: tl.constexpr, y_sample: tl.constexpr, other_sample: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    P: tl.constexpr, KP: tl.constexpr, SPAN: tl.constexpr, RUN: tl.constexpr, MODE: tl.constexpr, LINES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    biased: tl.constexpr, kind: tl.constexpr, rounds: tl.constexpr, adds: tl.constexpr, last: tl.constexpr,
    integers: tl.constexpr, summed: tl.constexpr, once: tl.constexpr, even: tl.constexpr, SLOTS: tl.constexpr,
    SHIFTED: tl.constexpr, PAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A convolution of stride 1 for LINES output lines along y at a time: each line of the input is read once for all of them, which is
    what the others pay for with bandwidth.

    A dilated convolution is a dense one of every DH-th line and every DW-th voxel: so far apart are the lines of a program, and the
    P voxels of a row.
    """
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    G: tl.constexpr = ((OW + DW - 1) // DW + P - 1) // P * DW
    HB: tl.constexpr = ((OH + DH - 1) // DH + LINES - 1) // LINES * DH
    KO: tl.constexpr = KW if MODE == "tap" else 1
    NB: tl.constexpr = RUN // BK
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    n = tl.program_id(2).to(tl.int64)
    x += n * x_sample
    y += n * y_sample
    g = r % G
    z = g // DW * (DW * P) + g % DW
    block = (r // G) % HB
    h = block // DH * (DH * LINES) + block % DH
    d = r // (G * HB)
    ok = r < OD * HB * G
    base = far(((d - PD) * H + h - PH) * W + z - PW, x_pitch, WIDE)
    none = tl.zeros((BM,), tl.int32)
    in_x = tl.where(ok, inside(d - PD, KD, DD, D, none), 0)
    in_y = inside(h - PH, LINES + KH - 1, DH, H, none)
    in_z = inside(z - PW, SPAN, DW, W, none)
    kk = tl.arange(0, BK)
    weights = w + col[:, None] * BK + kk[None, :]
    columns = tl.num_programs(1) * BN
    place = col // KP
    channel = col % KP
    live = (channel < K) & (place < P)
    pads = pads_of(pad, kk, BM, BK, PAGES)
    FULL: tl.constexpr = MODE != "tap" or C % BK == 0
    WHOLE: tl.constexpr = (OD * HB * G) % BM == 0
    totals = ()
    for _ in tl.static_range(LINES):
        totals = totals + (first_sums(start, channel, live, BM, BN, SHIFTED, SUM),)
    for i in tl.range(0, KD * KO * NB, num_stages=STAGES):
        k = (i % NB) * BK + kk
        tap = i // NB
        tx = tap // KO
        tz = tap % KO
        taps = ()
        for ty in tl.static_range(KH):
            taps = taps + (tl.load(weights + (i * KH + ty) * columns * BK).T,)
        for line in tl.static_range(LINES + KH - 1):
            at = base + far((tx * DD * H + line * DH) * W + tz * DW, x_pitch, WIDE)
            there = (in_x >> tx) & (in_y >> line)
            if MODE == "line":
                there = (there[:, None] & (in_z[:, None] >> (k // C)[None, :]) & 1) != 0
                at = at[:, None] + ((k // C) * (DW * x_pitch) + k % C)[None, :]
            else:
                there = ((there & (in_z >> tz) & 1) != 0)[:, None]
                at = at[:, None] + k[None, :]
            a = gather(x, at, pads, there, ok[:, None], (k < C)[None, :], WHOLE, FULL, SHIFTED)
            summed_up = ()
            for t in tl.static_range(LINES):
                if line - t >= 0 and line - t < KH:
                    summed_up = summed_up + (tl.dot(a, taps[line - t], totals[t], out_dtype=SUM),)
                else:
                    summed_up = summed_up + (totals[t],)
            totals = summed_up
    first = tl.zeros((BM, BN), tl.int32)
    second = tl.zeros((BM, BN), tl.int32)
    for t in tl.static_range(LINES):
        keep = (ok & (h + t * DH < OH))[:, None] & live[None, :]
        if OW % (P * DW) != 0:
            keep = keep & ((z[:, None] + place[None, :] * DW) < OW)
        q = store(
            totals[t], y, other + n * other_sample, multiplier, bias, (d * OH + h + t * DH) * OW + z, keep, place * DW, channel,
            (rounded_step, other_step, out_step, low, high, last_low, last_high),
            y_pitch, other_pitch, K, biased, kind, rounds, adds, last, integers, once, even,
            rounded_zero, other_zero, out_zero, WIDE,
        )  # fmt: skip
        if summed > 0:
            first += q
            second += q * q
    if summed > 0:
        add_sums(sums, tl.sum(first, axis=0), tl.sum(second, axis=0), channel, live, n, summed, SLOTS)
