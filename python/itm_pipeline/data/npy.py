"""Opening `.npy` files as memory maps, with one sentence for everything that can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a `.npy` file promises, and where the values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int


_format: Any = np.lib.format  # typed in NumPy 2.4, not before


def read_header(path: Path) -> NpyHeader:
    """Read the header of ``path`` and check that the file is long enough for what it promises.

    Raises
    ------
    UserError
        When the file is missing, is no `.npy` file, holds Python objects, or is shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            version = _format.read_magic(file)
            if version == (1, 0):
                shape, fortran_order, dtype = _format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, fortran_order, dtype = _format.read_array_header_2_0(file)
            else:
                raise UserError(
                    f"{path}: .npy format {version[0]}.{version[1]} is not supported; save it again with np.save"
                )
            offset = file.tell()
            size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the data folder and the name of the split") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not a .npy file ({error}); write it with np.save") from None
    if dtype.hasobject:
        raise UserError(f"{path}: holds Python objects instead of numbers; save a plain array with np.save")
    needed = offset + prod(shape) * dtype.itemsize
    if size < needed:
        raise UserError(
            f"{path}: truncated, its header promises {' x '.join(map(str, shape))} {dtype} ({needed:,} bytes) "
            f"but the file has {size:,}; copy or write it again"
        )
    return NpyHeader(shape, dtype, fortran_order, offset)


def open_npy(path: Path, *, dims: str, dtype: str | None = None) -> npt.NDArray[Any]:
    """Map ``path`` into memory, read-only, after its header passed every check.

    Parameters
    ----------
    path
        The file.
    dims
        Names of the dimensions, such as ``"rows, regions, width"``: their number must fit, none may be 0.
    dtype
        Required dtype in native byte order; None takes any real number.

    Raises
    ------
    UserError
        As :func:`read_header`, and for another number of dimensions, another dtype, or Fortran order.
    """
    header = read_header(path)
    expected = dims.count(",") + 1
    if len(header.shape) != expected or 0 in header.shape:
        raise UserError(f"{path}: must have the shape [{dims}] with no empty dimension, found {list(header.shape)}")
    if dtype is not None and header.dtype != np.dtype(dtype):
        raise UserError(
            f"{path}: must be {dtype}, found {header.dtype}; convert it with np.save(path, x.astype('{dtype}'))"
        )
    if header.dtype.kind not in "fiu":
        raise UserError(f"{path}: must hold real numbers, found {header.dtype}")
    if header.fortran_order:
        raise UserError(
            f"{path}: stored in Fortran order, which scatters a row over the whole file; save np.ascontiguousarray(x)"
        )
    return np.memmap(path, dtype=header.dtype, mode="r", offset=header.offset, shape=header.shape)
