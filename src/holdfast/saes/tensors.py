"""Tensors in files, mapped and not copied: what is not touched is not read.

safetensors, NumPy's npz, and torch's zip files with nothing but weights; never pickled objects.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.errors import SAEError


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name, on the CPU, in the file's precision.

    Raises SAEError if the file is missing, is not what its name says, or would need pickle.
    """
    readers = {".safetensors": _safetensors, ".npz": _npz, ".pt": _torch}
    if path.suffix not in readers:
        raise SAEError(
            f"{path.name}: expected one of {', '.join(readers)}; other formats are not read, and "
            "pickles never are"
        )
    if not path.is_file():
        raise SAEError(f"{path.name} is not there")
    return readers[path.suffix](path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise SAEError(f"{path.name} is no safetensors file: {error}") from None


def _torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise SAEError(
            f"{path.name} holds more than tensors, and reading it would run code of whoever made "
            "it; convert it to safetensors where you trust it"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise SAEError(f"{path.name} is no file of torch.save in zip form: {error}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise SAEError(f"{path.name} holds no dictionary of tensors")
    return dict(loaded)


def _npz(path: Path) -> dict[str, Tensor]:
    out = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if info.compress_type == zipfile.ZIP_STORED:
                    array = _mapped(path, archive, info)
                else:
                    with archive.open(info) as member:
                        array = np.lib.format.read_array(member, allow_pickle=False)
                out[name] = torch.from_numpy(array)
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, TypeError) as error:
        raise SAEError(f"{path.name} is no npz file of plain arrays: {error}") from None
    return out


def _mapped(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An uncompressed member of a zip file as a map of the file itself."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(member)
        header = member.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    with path.open("rb") as file:
        # The member's data begins behind its local header, whose extra field the central directory
        # does not know.
        file.seek(info.header_offset + 26)
        n_name, n_extra = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + n_name + n_extra + header
    # Mode "c" maps copy-on-write: torch asks for memory that it may write to.
    return np.memmap(path, dtype, "c", start, shape, "F" if fortran else "C")
