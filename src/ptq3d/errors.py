"""Every error ptq3d raises on purpose.

Ptq3dError                 exit 1: a fault that is not the user's
├── EngineError            a runtime refused to build or run a network
└── InputError             exit 2: what was given cannot be used, and the message says how to mend it
    ├── FileError          missing, unreadable, truncated, of the wrong format or rank
    │   └── NoSeriesError  a place without DICOM images, or without the series that is asked for
    ├── GeometryError      singular affine, zero spacing, image and label on different grids
    ├── IntensityError     NaN or infinite voxels, an intensity rule that cannot be applied
    ├── LabelError         label values outside the classes, an image without its label
    ├── CheckpointError    weights of another network, or a file that needs code to load
    ├── GraphError         an ONNX graph that is invalid, dynamic where it must not be, or of the wrong channels
    ├── ManifestError      a manifest that is missing, of another version, or does not match its files
    ├── CalibrationError   windows of another shape, non-finite values, a tensor without a range
    ├── ShapeError         an array of another shape or dtype than the one wanted
    ├── BudgetError        no INT8 engine keeps the budget of disagreement
    ├── OptionError        a combination of options that has no meaning
    └── UnavailableError   an engine, device or library that is not on this machine
"""

from __future__ import annotations

from collections.abc import Iterable


class Ptq3dError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class EngineError(Ptq3dError):
    """A runtime refused to build or run a network."""


class InputError(Ptq3dError):
    """What was given cannot be used."""

    exit_code = 2


class FileError(InputError):
    """A file is missing, unreadable, truncated, or of the wrong format or rank."""


class NoSeriesError(FileError):
    """A place holds no DICOM images, or not the series that is asked for."""


class GeometryError(InputError):
    """A grid is singular, has zero spacing, or differs from the grid it must share."""


class IntensityError(InputError):
    """Voxels are NaN or infinite, or an intensity rule cannot be applied."""


class LabelError(InputError):
    """Labels lie outside the classes, or an image has none where one is needed."""


class CheckpointError(InputError):
    """Weights belong to another network, or their file needs code to load."""


class GraphError(InputError):
    """An ONNX graph is invalid or does not fit what is asked of it."""


class ManifestError(InputError):
    """A manifest is missing, of another version, or does not match its files."""


class CalibrationError(InputError):
    """Calibration windows or the ranges drawn from them cannot be used."""


class ShapeError(InputError):
    """An array has another shape or dtype than the one wanted."""


class BudgetError(InputError):
    """No INT8 engine of the network keeps the budget of disagreement."""


class OptionError(InputError):
    """A combination of options has no meaning."""


class UnavailableError(InputError):
    """An engine, device or library is not on this machine."""


def line_of(error: Exception, number: int = 0) -> str:
    """One line of a message: the first says what, the last (-1) why where TorchScript prints its trace before it."""
    return clipped((str(error).strip() or type(error).__name__).splitlines()[number])


def clipped(value: object, longest: int = 200) -> str:
    """What a file says, fit for a message: on one line, not longer than this, and of letters that a terminal can show."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value)[: longest + 1])
    return text if len(text) <= longest else f"{text[:longest]}..."


def numbered(number: int, thing: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def few(things: Iterable[object], number: int = 3) -> str:
    """The first of many things: "a, b, c and 4 more"."""
    told = [str(thing) for thing in things]
    more = len(told) - number
    return ", ".join(told[:number]) + (f" and {more} more" if more > 0 else "")
