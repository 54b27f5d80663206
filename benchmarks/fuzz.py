"""Damaged files against the readers: each must be read, or refused with one clear error.

    python benchmarks/fuzz.py --minutes 10 --report fuzz.json [--formats .nii .nrrd ...] [--seed 0]

Files of every format are made and damaged: bytes flipped, ends cut, numbers of headers replaced by others (zero, negative,
huge, NaN), lines lost or doubled, blocks moved, pieces of other formats put in; what is compressed is damaged within, too. A
finding is whatever else comes of it than a sound volume or an `InputError` of one line that names the file: another error, a
warning, a crash of the process, more than 20 seconds, or memory beyond 2 GiB. The files of a finding are kept.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import resource
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from fuzz_seeds import SEEDS, Files, made

from ptq3d.compare import machine
from ptq3d.errors import InputError

MEMORY = 2 << 30
PATIENCE_S = 20.0
LONGEST_MESSAGE = 600  # beside the path in it
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    4,
    127,
    128,
    255,
    30000,
    32767,
    -32768,
    65535,
    2**31 - 1,
    -(2**31),
    1e30,
    1e-30,
    float("nan"),
    float("inf"),
)
TEXTS = (
    b"0",
    b"-1",
    b"2",
    b"4",
    b"30000",
    b"4294967296",
    b"99999999999999999999",
    b"nan",
    b"inf",
    b"1e400",
    b"",
    b"../../x",
    b"LIST",
)


def read_volume(path: Path) -> None:
    """Grid, image and labels; a finding where the image does not lie on the grid or is not finite."""
    from ptq3d.volumes.files import load_grid, load_image, load_labels

    image = load_image(path)
    shape, affine = load_grid(path)
    if shape != image.shape or not np.array_equal(affine, image.affine) or not np.isfinite(image.data).all():
        raise RuntimeError(f"unsound: {shape} and {image.shape}")
    if path.is_file() and path.suffix not in (".dcm", ".zip"):
        try:
            load_labels(path)
        except InputError as error:
            require_clear(path, error)


def read_dataset(path: Path) -> None:
    """A data set as `ptq3d data check` reads it; what is wrong with a case is in its problems."""
    from ptq3d.checking import case_facts
    from ptq3d.datasets.layouts import open_dataset

    found = open_dataset(path)
    for case in found.cases:
        for problem in case_facts(case, label_map=found.label_map).problems:
            if "\n" in problem.text:
                raise RuntimeError(f"unclear: {problem.text!r}")


READERS: Mapping[str, Callable[[Path], None]] = {"volume": read_volume, "dataset": read_dataset}
"""How an entry is read. Open: raises InputError, or returns."""


def damaged(content: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """One to three kinds of damage, within the compressed content in half of the cases."""
    if content[:2] == b"\x1f\x8b" and dice.random() < 0.5:
        return gzip.compress(damaged(gzip.decompress(content), dice, others), 1)
    if content[:2] == b"PK" and dice.random() < 0.5:
        return rezipped(content, dice, others)
    for _ in range(dice.randint(1, 3)):
        content = dice.choice(DAMAGES)(bytearray(content), dice, others)
    return content


def rezipped(content: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """A zip with one damaged member, sometimes under another name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(sorted(members))
    members[dice.choice((name, "../x.dcm", "/x.dcm", "1/" + name))] = damaged(members.pop(name), dice, others)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return buffer.getvalue()


def flip(content: bytearray, dice: random.Random, _: list[bytes]) -> bytes:
    """One to eight bytes anywhere, or in the header."""
    reach = dice.choice((len(content), min(len(content), 500)))
    for _step in range(dice.randint(1, 8) if reach else 0):
        content[dice.randrange(reach)] ^= 1 << dice.randrange(8) if dice.random() < 0.5 else dice.randint(1, 255)
    return bytes(content)


def cut(content: bytearray, dice: random.Random, _: list[bytes]) -> bytes:
    """The end is lost, or something follows it."""
    if dice.random() < 0.3:
        return bytes(content) + dice.randbytes(dice.randint(1, 2000))
    return bytes(content[: dice.randint(0, len(content))])


def renumber(content: bytearray, dice: random.Random, _: list[bytes]) -> bytes:
    """A binary number of the header is another."""
    format_, number = dice.choice("<>") + dice.choice("bhiqfd"), dice.choice(NUMBERS)
    try:
        packed = struct.pack(format_, number if format_[1] in "fd" else int(number))
    except (struct.error, OverflowError, ValueError):
        packed = b"\xff" * struct.calcsize(format_)
    place = dice.randrange(0, max(1, min(len(content), 600) - len(packed)), dice.choice((1, 2, 4)))
    content[place : place + len(packed)] = packed
    return bytes(content)


def retext(content: bytearray, dice: random.Random, _: list[bytes]) -> bytes:
    """A word or number of a text header is another, or a line is lost, doubled or moved."""
    lines = bytes(content[:1000]).split(b"\n")
    index = dice.randrange(len(lines))
    way = dice.randrange(5)
    if way <= 2:
        words = lines[index].split(b" ")
        words[dice.randrange(len(words))] = dice.choice(TEXTS) if dice.random() < 0.8 else b"9" * dice.randint(1, 5000)
        lines[index] = b" ".join(words)
    elif way == 3:
        lines.insert(dice.randrange(len(lines)), lines[index])
    else:
        lines.insert(dice.randrange(len(lines)), lines.pop(index))
    return b"\n".join(lines) + bytes(content[1000:])


def splice(content: bytearray, dice: random.Random, others: list[bytes]) -> bytes:
    """A block of this file or another stands somewhere, over what was there or between it."""
    source = dice.choice([bytes(content), *others]) or b"\0"
    first = dice.randrange(len(source))
    block = source[first : first + dice.randint(1, 400)]
    place = dice.randint(0, len(content))
    content[place : place + dice.choice((0, len(block)))] = block
    return bytes(content)


DAMAGES = (flip, cut, renumber, retext, splice)


def require_clear(path: Path, error: InputError) -> None:
    """One line that names the file.

    Raises:
        RuntimeError: it does not.
    """
    text = str(error)
    if "\n" in text or str(path) not in text or len(text.replace(str(path), "")) > LONGEST_MESSAGE:
        raise RuntimeError(f"unclear: {text!r}") from error


def work() -> None:
    """The worker: paths come in, one a line; what became of each goes out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("error")
    for format_, (_, entry, reader) in SEEDS.items():  # everything is imported before memory is capped
        seed = made(format_)
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch), seed.files)
            READERS[reader](Path(scratch, entry))
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        reader, path = json.loads(line)
        print(json.dumps(outcome(READERS[reader], Path(path))), file=answers, flush=True)


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """ "read", "refused", or a traceback."""
    try:
        read(path)
        return "read"
    except InputError as error:
        try:
            require_clear(path, error)
        except RuntimeError as unclear:
            return f"finding: {unclear}"
        return "refused"
    except BaseException:  # noqa: BLE001 whatever it is, it is what is looked for
        return f"finding: {traceback.format_exc()}"


class Worker:
    """A process that reads, started anew when it dies or hangs."""

    def __init__(self) -> None:
        self.process = self._start()

    def _start(self) -> subprocess.Popen[Any]:
        command = [sys.executable, __file__, "--worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, **pipes)
        if self._answer(process, 120) != "ready":
            raise SystemExit("the worker does not start: are all sound files read?")
        return process

    def _answer(self, process: subprocess.Popen[Any], patience_s: float) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(patience_s):
                return f"finding: no answer within {patience_s} s"
        line = process.stdout.readline()
        return str(json.loads(line)) if line else f"finding: the process died with {process.wait()}"

    def ask(self, reader: str, path: Path) -> str:
        """What became of a file."""
        self.process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        self.process.stdin.flush()
        answer = self._answer(self.process, PATIENCE_S)
        if answer.startswith(("finding: no answer", "finding: the process died")):
            self.close()
            self.process = self._start()
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def write(folder: Path, files: Files) -> None:
    """All files of a seed into a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def fuzz(options: argparse.Namespace) -> tuple[dict[str, Counter[str]], list[dict[str, str]]]:
    """Counts per format, and findings."""
    dice, seeds, worker = random.Random(options.seed), {name: made(name) for name in options.formats}, Worker()
    others = [content for seed in seeds.values() for content in seed.files.values()]
    counts: dict[str, Counter[str]] = {name: Counter() for name in seeds}
    findings: list[dict[str, str]] = []
    end = perf_counter() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        case = Path(scratch, "case")
        while perf_counter() < end:
            for name, seed in seeds.items():
                victim = dice.choice(sorted(seed.files))
                write(case, seed.files | {victim: damaged(seed.files[victim], dice, others)})
                answer = worker.ask(seed.reader, case / seed.entry)
                counts[name]["findings" if answer.startswith("finding") else answer] += 1
                if answer.startswith("finding"):
                    kept = options.keep / f"{len(findings):03}"
                    shutil.copytree(case, kept, dirs_exist_ok=True)
                    findings.append({"format": name, "kept": str(kept), "what": answer})
                    print(f"{name}: {answer.strip().splitlines()[-1][:200]} ({kept})", flush=True)
    worker.close()
    return counts, findings


def main() -> None:
    """Fuzz, print a table, write the report; exit 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=[*SEEDS], default=[*SEEDS])
    parser.add_argument("--report", type=Path, default=Path("fuzz.json"), help="JSON file to write")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for the files of findings")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    counts, findings = fuzz(options)
    print(f"{'format':20} {'inputs':>8} {'read':>8} {'refused':>8} {'findings':>8}")
    for name, count in counts.items():
        print(f"{name:20} {count.total():8} {count['read']:8} {count['refused']:8} {count['findings']:8}")
    versions = {package: version(package) for package in ("numpy", "nibabel", "SimpleITK")}
    report = {"counts": counts, "findings": findings, "minutes": options.minutes, "seed": options.seed}
    report |= {"machine": {**machine(), **versions}, "command": sys.argv}
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
