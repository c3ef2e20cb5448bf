"""Files that are whole or not there, and tensors in them: the safetensors layout, read and written without its package."""
from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import struct

import torch
from torch import Tensor


def sha256_of(path: os.PathLike | str) -> str:
    """Of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: os.PathLike | str, chunks) -> None:
    """Write the byte strings `chunks` to `path`: all of them, on the disk, or nothing."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say where it was
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: os.PathLike | str) -> None:
    """Force renames inside `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------------------------- safetensors

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}


def write_safetensors(tensors: dict[str, Tensor], path: os.PathLike | str, metadata: dict[str, str] | None = None):
    """The safetensors layout: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, offset = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8

    def chunks():
        yield struct.pack("<Q", len(text)) + text
        for tensor in tensors.values():
            if tensor.numel():
                yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    write_atomically(path, chunks())


def read_safetensors(path: os.PathLike | str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Nothing in the file can run code.

    Raises ValueError, naming the file, when the header is no JSON object, its offsets leave the file, overlap,
    leave gaps, or do not fit dtype and shape.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
        if length > min(size - 8, 100_000_000):
            raise ValueError(f"{path}: not a safetensors file, or cut off (its header would be longer than the file)")
        try:
            header = json.loads(file.read(length))
            entries = []
            for name, e in header.items():
                if name != "__metadata__":
                    start, stop = map(int, e["data_offsets"])
                    entries.append((name, _DTYPES[e["dtype"]], [int(n) for n in e["shape"]], start, stop))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: the safetensors header cannot be read ({type(error).__name__}: {error})") from None
        tensors, end = {}, 0
        for name, dtype, shape, start, stop in sorted(entries, key=lambda e: (e[3], e[4])):
            wanted = math.prod(shape) * dtype.itemsize
            if start != end or stop - start != wanted or stop > size - 8 - length or not all(0 <= n < 2 ** 31 for n in shape):
                raise ValueError(f"{path}: the header gives {name} the bytes {start} to {stop}, which do not fit "
                                 f"its shape {shape}, its neighbour or the file; the file is damaged")
            data = bytearray(file.read(wanted))
            tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)
            end = stop
        if 8 + length + end != size:
            raise ValueError(f"{path}: {size - 8 - length - end} bytes after the last tensor; the file is damaged")
    return tensors
