"""Tensors in files, read in pieces: a slice of an SAE never holds the whole of it.

safetensors, NumPy's npz, and torch's zip files with nothing but weights; never pickled objects.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.errors import SAEError

BLOCK = 8 << 20
"""Bytes held at once while single columns are picked from a matrix."""

SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NUMPY = {
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16,
    "<i8": torch.int64, "<i4": torch.int32, "<i2": torch.int16, "|i1": torch.int8,
    "|u1": torch.uint8, "|b1": torch.bool,
}  # fmt: skip


class Stored(Protocol):
    """A tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor:
        """All of it, on the CPU, in the file's precision."""

    def take(self, ids: Sequence[int], axis: int) -> Tensor:
        """Some rows (axis 0) or columns (axis 1) of a matrix, in the order given."""

    @property
    def in_parts(self) -> bool:
        """Whether some of it can be read without what lies before."""

    def between(self, own: slice, axis: int) -> Tensor:
        """Rows (axis 0) or columns (axis 1) of a matrix from own.start on, and before own.stop."""

    def parts(self) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Where each part of a matrix lies in it, and the part; together they are all of it. A part
        may be overwritten when the next is asked for."""


def read_tensors(path: Path) -> Mapping[str, Stored]:
    """The tensors of a file by name.

    Raises SAEError if the file is missing, is not what its name says, or would need pickle.
    """
    readers: dict[str, Callable[[Path], Mapping[str, Stored]]] = {
        ".safetensors": _safetensors, ".npz": _npz, ".pt": _torch, ".pth": _torch,
    }  # fmt: skip
    if path.suffix not in readers:
        raise SAEError(
            f"{path.name}: expected one of {', '.join(readers)}; other formats are not read, and "
            "pickles never are"
        )
    if not path.is_file():
        raise SAEError(f"{path.name} is not there")
    return readers[path.suffix](path)


@dataclass(frozen=True)
class InFile:
    """A tensor as plain bytes of a file, or of a compressed member of a zip file.

    start: the byte it begins at. fortran: the first index runs fastest.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    fortran: bool = False
    member: str | None = None

    def read(self) -> Tensor:
        shape = self.shape[::-1] if self.fortran else self.shape
        out = torch.empty(shape, dtype=self.dtype)
        with ExitStack() as stack:
            self._fill(self._open(stack), out)
        return out.T if self.fortran and len(shape) > 1 else out

    def take(self, ids: Sequence[int], axis: int) -> Tensor:
        if self.fortran:
            return self._turned.take(ids, 1 - axis).T
        with ExitStack() as stack:
            file = self._open(stack)
            if axis == 0 and self.member is None:
                return self._rows(file, ids)
            if isinstance(ids, range) and ids.step == 1 and self.member is None:
                return self._neighbors(file, ids)
            return self._blocks(file, ids, axis)

    @property
    def in_parts(self) -> bool:
        return self.member is None

    def between(self, own: slice, axis: int) -> Tensor:
        if self.fortran:
            return self._turned.between(own, 1 - axis).T
        n_rows, n_columns = self.shape
        first, n = own.start, own.stop - own.start
        out = torch.empty((n, n_columns) if axis == 0 else (n_rows, n), dtype=self.dtype)
        with ExitStack() as stack:
            file = self._open(stack)
            if axis == 0:
                file.seek(self.start + first * n_columns * self.dtype.itemsize)
                self._fill(file, out)
            else:
                self._strips(file, out, first)
        return out

    def parts(self) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        n_rows, n_columns = self.shape[::-1] if self.fortran else self.shape
        height = max(1, BLOCK // max(1, n_columns * self.dtype.itemsize))
        buffer = torch.empty(min(height, n_rows), n_columns, dtype=self.dtype)
        with ExitStack() as stack:
            file = self._open(stack)
            for first in range(0, n_rows, height):
                block = buffer[: min(height, n_rows - first)]
                self._fill(file, block)
                rows, columns = slice(first, first + len(block)), slice(0, n_columns)
                yield ((columns, rows), block.T) if self.fortran else ((rows, columns), block)

    @property
    def _turned(self) -> InFile:
        """The same bytes, with the last index running fastest."""
        return InFile(self.path, self.start, self.shape[::-1], self.dtype, member=self.member)

    def _strips(self, file: BinaryIO, out: Tensor, first: int) -> None:
        """Read columns from `first` on of every row into out [n_rows n]."""
        row, width = self.shape[1] * self.dtype.itemsize, out.shape[1] * self.dtype.itemsize
        view = out.view(torch.uint8).numpy().reshape(-1).data
        start = self.start + first * self.dtype.itemsize
        for index in range(len(out)):
            file.seek(start + index * row)
            # Short only at the file's end, and for more than 2 GiB, which no strip has.
            n = file.readinto(view[index * width : (index + 1) * width])  # type: ignore[attr-defined]
            if n != width:
                self._fill(file, out[index, max(n, 0) // self.dtype.itemsize :])

    def _rows(self, file: BinaryIO, ids: Sequence[int]) -> Tensor:
        out = torch.empty(len(ids), self.shape[1], dtype=self.dtype)
        for row, i in zip(out, ids, strict=True):
            file.seek(self.start + i * row.nbytes)
            self._fill(file, row)
        return out

    def _neighbors(self, file: BinaryIO, ids: range) -> Tensor:
        """Columns that stand next to each other: a piece of every row, and nothing between."""
        n_rows, n_columns = self.shape
        out = torch.empty(n_rows, len(ids), dtype=self.dtype)
        for i, row in enumerate(out):
            file.seek(self.start + (i * n_columns + ids.start) * self.dtype.itemsize)
            self._fill(file, row)
        return out

    def _blocks(self, file: BinaryIO, ids: Sequence[int], axis: int) -> Tensor:
        """Read from front to back, keeping what is asked for of each block of rows."""
        n_rows, n_columns = self.shape
        index = torch.as_tensor(list(ids), dtype=torch.long)
        shape = (len(ids), n_columns) if axis == 0 else (n_rows, len(ids))
        out = torch.empty(shape, dtype=self.dtype)
        height = max(1, BLOCK // max(1, n_columns * self.dtype.itemsize))
        buffer = torch.empty(min(height, n_rows), n_columns, dtype=self.dtype)
        for first in range(0, n_rows, height):
            block = buffer[: min(height, n_rows - first)]
            self._fill(file, block)
            if axis == 1:
                out[first : first + len(block)] = block[:, index]
            else:
                inside = (index >= first) & (index < first + len(block))
                out[inside] = block[index[inside] - first]
        return out

    def _open(self, stack: ExitStack) -> BinaryIO:
        """The file, at the tensor's first byte."""
        if self.member is None:
            # Unbuffered: reads go straight into the tensor.
            file: BinaryIO = stack.enter_context(self.path.open("rb", buffering=0))
        else:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            file = stack.enter_context(archive.open(self.member))  # type: ignore[assignment]
        file.seek(self.start)
        return file

    def _fill(self, file: BinaryIO, out: Tensor) -> None:
        """Read the next bytes into a contiguous tensor. Raises SAEError at the file's end."""
        view = out.reshape(-1).view(torch.uint8).numpy().data
        filled = 0
        try:
            while filled < len(view):
                # ZipExtFile reads no more at once than it has decompressed, Linux at most 2 GiB.
                n = file.readinto(view[filled:])  # type: ignore[attr-defined]
                if not n:
                    raise SAEError(f"{self.path.name} ends too early; fetch it again")
                filled += n
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise SAEError(f"{self.path.name} is damaged: {error}; fetch it again") from None


@dataclass(frozen=True)
class Mapped:
    """A tensor as a map of its file: pages that are touched stay until the map is dropped."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.clone()  # a view would keep the file open

    def take(self, ids: Sequence[int], axis: int) -> Tensor:
        return self.tensor.index_select(axis, torch.as_tensor(list(ids), dtype=torch.long))

    in_parts = True

    def between(self, own: slice, axis: int) -> Tensor:
        return self.tensor[own] if axis == 0 else self.tensor[:, own]

    def parts(self) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        yield (slice(None), slice(None)), self.tensor


def whole(stored: Stored, turned: bool = False, exact: bool = False) -> Tensor:
    """All of a matrix, contiguous, turned if asked for, with no more of the file than a block
    beside it; in float32, or, if that is less and `exact`, in the precision of the file."""
    half = exact and stored.dtype in (torch.bfloat16, torch.float16)
    dtype = stored.dtype if half else torch.float32
    out = torch.empty(stored.shape[::-1] if turned else stored.shape, dtype=dtype)
    into = out.T if turned else out
    for where, part in stored.parts():
        into[where] = part
    return out


def _safetensors(path: Path) -> dict[str, InFile]:
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:  # checks the header
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise SAEError(f"{path.name} is no whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    out = {}
    for name, said in header.items():
        if said["dtype"] not in SAFETENSORS:
            raise SAEError(
                f"{path.name}: {name} is stored as {said['dtype']}; convert it to float32"
            )
        begin = 8 + length + said["data_offsets"][0]
        out[name] = InFile(path, begin, tuple(said["shape"]), SAFETENSORS[said["dtype"]])
    return out


def _torch(path: Path) -> dict[str, Stored]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise SAEError(
            f"{path.name} holds more than tensors, and reading it would run code of whoever made "
            "it; convert it to safetensors where you trust it"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise SAEError(
            f"{path.name} is no whole file of torch.save in its zip form ({reason}); save its "
            "tensors again as safetensors"
        ) from None
    if not isinstance(loaded, dict):
        raise SAEError(f"{path.name} holds a {type(loaded).__name__}, not tensors by name")
    tensors = {str(name): t for name, t in loaded.items() if isinstance(t, Tensor)}
    if not tensors:
        raise SAEError(f"{path.name} holds no tensors by name, only {sorted(map(str, loaded))}")
    base = _base(path, [t.untyped_storage() for t in tensors.values()])
    return {name: _placed(path, tensor, base) for name, tensor in tensors.items()}


def _base(path: Path, storages: Sequence[torch.UntypedStorage]) -> int | None:
    """The address that the file is mapped at, None if it does not follow from the records in it."""
    with zipfile.ZipFile(path) as archive:
        records = {
            _start(path, i): i.file_size for i in archive.infolist() if "/data/" in i.filename
        }
    mapped = {storage.data_ptr(): storage.nbytes() for storage in storages}
    first = min(mapped)
    bases = [
        first - start
        for start in records
        if all(records.get(at - first + start) == size for at, size in mapped.items())
    ]
    return bases[0] if len(bases) == 1 else None


def _placed(path: Path, tensor: Tensor, base: int | None) -> Stored:
    """A mapped tensor as bytes of its file, which can be read without keeping pages."""
    turned = not tensor.is_contiguous() and tensor.dim() == 2 and tensor.T.is_contiguous()
    if base is None or not (turned or tensor.is_contiguous()):
        return Mapped(tensor)
    return InFile(path, tensor.data_ptr() - base, tuple(tensor.shape), tensor.dtype, turned)


def _npz(path: Path) -> dict[str, InFile]:
    out = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                out[info.filename.removesuffix(".npy")] = _member(path, archive, info)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, struct.error) as error:
        raise SAEError(f"{path.name} is no whole npz file of plain arrays: {error}") from None
    return out


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> InFile:
    """One array of an npz file. Raises ValueError if it is not one of plain numbers."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is written in version {version} of the npy format")
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(member)
        begin = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects, which would need pickle")
    if dtype.str not in NUMPY:
        raise ValueError(f"{info.filename} holds {dtype}, not floating-point numbers")
    if info.compress_type != zipfile.ZIP_STORED:
        return InFile(path, begin, shape, NUMPY[dtype.str], fortran, info.filename)
    return InFile(path, _start(path, info) + begin, shape, NUMPY[dtype.str], fortran)


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """The byte of a zip file that a member's data begins at.

    It lies behind the member's own header, whose extra field the central directory does not know.
    """
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        n_name, n_extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(n_name) + int(n_extra)
