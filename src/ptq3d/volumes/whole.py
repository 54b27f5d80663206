"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from ptq3d.errors import FileError


@contextlib.contextmanager
def written_whole(path: Path, suffix: str) -> Iterator[Path]:
    """A name to write to, beside `path`, that takes its place at the end, or is gone where something went wrong.

    Args:
        path: its folder is made if missing, an older file is replaced.
        suffix: of both names, for writers that go by it.

    Raises:
        FileError: the folder cannot be made, or the file not be written.
    """
    partial = path.with_name(f".{path.name[:40]}.{uuid4().hex}{suffix}")  # shorter than the longest name that fits
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder could not be made, that has been said already
            partial.unlink()
