"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd): geometry and voxel type through SimpleITK.

Their voxels are read by `streams`, since ITK takes damaged ones silently: it returns other values where a compressed byte was
changed, and zeros where MetaImage's data end too soon.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, UnavailableError, line_of
from ptq3d.volumes.streams import Layout
from ptq3d.volumes.text_headers import TextHeader, metaimage_header, nrrd_header
from ptq3d.volumes.volume import Affine

if TYPE_CHECKING:
    import SimpleITK

TYPES = ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float32", "Float64")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def nrrd(path: Path) -> tuple[Layout, Affine]:
    """Where the voxels of a NRRD file lie, and their affine.

    Raises:
        FileError: no NRRD, not one volume of real numbers, in another encoding than raw or gzip, or its data lie elsewhere.
        GeometryError: its space is none of left-posterior-superior, right-anterior-superior and left-anterior-superior. (ITK
            takes other spaces, and none at all, for left-posterior-superior without a word.)
        UnavailableError: SimpleITK is not installed.
    """
    return _located(path, nrrd_header(path), "header.nrrd")


def metaimage(path: Path) -> tuple[Layout, Affine]:
    """Where the voxels of a MetaImage file lie, and their affine; as in ITK, without a matrix the axes are those of LPS.

    Raises:
        FileError: no MetaImage, not one volume of real numbers, or its data lie elsewhere or in several files.
        GeometryError: a spacing of zero or below.
        UnavailableError: SimpleITK is not installed.
    """
    return _located(path, metaimage_header(path), "header.mha")


def _located(path: Path, text: TextHeader, name: str) -> tuple[Layout, Affine]:
    """What the text says of the bytes, with what ITK says of voxels and geometry."""
    found = _information(path, text, name)
    if tuple(found.GetSize()) != text.shape:
        raise FileError(f"{path} is no readable volume: its header gives {text.shape} and ITK {found.GetSize()}.")
    dtype = _dtype(path, found).newbyteorder("<" if text.little_endian else ">")
    layout = Layout(text.shape, dtype, text.data, text.offset, text.encoding, text.start)
    if text.at_end:
        layout = Layout(text.shape, dtype, text.data, start=_start_at_end(path, layout))
    return layout, _affine(path, found)


def _start_at_end(path: Path, layout: Layout) -> int:
    try:
        size = layout.data.stat().st_size
    except OSError as error:
        raise FileError(f"{path}: its voxels in {layout.data.name} cannot be read ({error.strerror}).") from error
    return max(size - math.prod(layout.shape) * layout.dtype.itemsize, layout.start)


def _information(path: Path, text: TextHeader, name: str) -> SimpleITK.ImageFileReader:
    """ITK's reader, which has read the header written anew."""
    reader = _simpleitk().ImageFileReader()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, name)
        place.write_text(text.text, encoding="ascii")
        reader.SetFileName(str(place))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            reason = ascii(line_of(error, -1))[:200]
            raise FileError(f"{path}: its header is damaged ({reason}); copy it again.") from error
    return reader


def _dtype(path: Path, found: SimpleITK.ImageFileReader) -> np.dtype[Any]:
    sitk, pixel = _simpleitk(), found.GetPixelID()
    name = next((name for name in TYPES if getattr(sitk, f"sitk{name}") == pixel), None)
    if name is None or found.GetNumberOfComponents() != 1:
        what = sitk.GetPixelIDValueAsString(pixel)
        raise FileError(f"{path}: wanted one real number for each voxel, got {what}; convert it to grey values.")
    return np.dtype(name.lower())


def _affine(path: Path, found: SimpleITK.ImageFileReader) -> Affine:
    """ITK counts in LPS: origin, unit directions as columns, spacing."""
    spacing, number = np.array(found.GetSpacing()), found.GetDimension()
    if not (spacing > 0).all():
        raise GeometryError(
            f"{path}: zero, negative or broken spacing {spacing.tolist()} mm in its header; mend the header."
        )
    lps = np.eye(4)
    lps[:3, :3] = (np.array(found.GetDirection()).reshape(number, number) * spacing)[:3, :3]
    lps[:3, 3] = found.GetOrigin()[:3]
    return LPS_TO_RAS @ lps


def write_itk(path: Path, voxels: NDArray[Any], affine: Affine) -> None:
    """NRRD or MetaImage in one file, compressed.

    Args:
        path: .nrrd or .mha; written in place, so give a temporary name and rename it.
        voxels: (X, Y, Z) in the dtype to store.
        affine: (4, 4) voxel -> RAS+ mm.

    Raises:
        OSError: the file cannot be written.
        UnavailableError: SimpleITK is not installed.
    """
    sitk, lps = _simpleitk(), LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(line_of(error, -1)) from error


def _simpleitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise UnavailableError(
            "NRRD and MetaImage need SimpleITK; install it with pip install 'ptq3d[itk]'."
        ) from error
    return SimpleITK
