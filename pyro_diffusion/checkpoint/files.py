"""The file of a checkpoint: written all or nothing, read through one open file."""

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

if sys.platform != "win32":
    import fcntl

FORMAT = "pyro_diffusion"
VERSION = 1

# Limits on the header, checked before any of it is parsed: an object or list of JSON costs Python up to
# 30 times its text.
MAX_HEADER_BYTES = 2**25
MAX_HEADER_BRACKETS = 500_000

# How the files of torch.save start: zipped, and older ones.
PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


class CheckpointError(ValueError):
    """A file is no readable checkpoint, or is the checkpoint of something else."""


def write_file(path: Path, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a header and its tensors, all or nothing.

    Raises:
        ValueError: if the header is larger than :func:`read_file` accepts.
    """
    header = {"version": VERSION, **header}
    header["checksum"] = checksum(header, tensors)
    metadata = {FORMAT: json.dumps(header, allow_nan=False)}
    data = safetensors.torch.save(dict(tensors), metadata=metadata)
    length = int.from_bytes(data[:8], "little")
    problem = _excess(length, _brackets(data[8 : 8 + length]))
    if problem:
        raise ValueError(f"state: {problem} (long lists of numbers are better kept as tensors)")
    _replace(path, data)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_file` wrote: the header and the tensors, of one and the same file.

    Raises:
        OSError: if the file cannot be opened, ``FileNotFoundError`` if there is none.
        CheckpointError: if the file is truncated, damaged or no checkpoint.
    """
    with _open(path) as file:
        text = _read_metadata(path, file)
        file.seek(0)
        data = file.read()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: truncated, damaged or no safetensors: {error}") from error
    del data
    try:
        header = json.loads(text)
        version, stored = header["version"], header["checksum"]
        computed = checksum(header, tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from error
    if version != VERSION:
        raise CheckpointError(f"{path}: got format version {version}, expected {VERSION}")
    if stored != computed:
        raise CheckpointError(f"{path}: damaged, got checksum {computed}, expected {stored}")
    return header, tensors


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of everything a state is made of; safetensors itself notices only truncation."""
    parts = {key: header[key] for key in ("version", "description", "state")}
    crc = zlib.crc32(json.dumps(parts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(_bytes(tensor), crc)
    return crc


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the host, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; a pipe is refused instead of waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        message = "no such file, expected a checkpoint"
        raise FileNotFoundError(errno.ENOENT, message, str(path)) from error
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "a directory, expected a checkpoint", str(path))
    with open(descriptor, "rb", closefd=True) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: not a regular file, expected a checkpoint")
        yield file


def _read_metadata(path: Path, file: BinaryIO) -> str:
    """The package's entry in the header of safetensors, read before anything large is."""
    unreadable = f"{path}: truncated, damaged or no safetensors"
    start = file.read(8)
    length, rest = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size - 8
    if len(start) < 8 or length > rest:
        if start.startswith(PICKLES):
            raise CheckpointError(f"{path}: got a pickle, as torch.save writes; it is never loaded")
        raise CheckpointError(f"{unreadable}: got a header of {length} bytes in {rest}")
    if length > MAX_HEADER_BYTES:  # before it is in memory
        raise CheckpointError(f"{path}: {_excess(length, 0)}")
    text = file.read(length)
    problem = _excess(length, _brackets(text))
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    try:
        outer = json.loads(text)
        metadata = outer.get("__metadata__", {})
        found = FORMAT in metadata
        ends = [entry["data_offsets"][1] for key, entry in outer.items() if key != "__metadata__"]
        size = max(ends, default=0)
        complete = size == rest - length
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{unreadable}: {error}") from error
    if not complete:
        raise CheckpointError(f"{unreadable}: got {rest - length} bytes of tensors for {size}")
    if not found:
        raise CheckpointError(f"{path}: got safetensors without a {FORMAT} header")
    return str(metadata[FORMAT])


def _brackets(text: bytes) -> int:
    """At least the number of lists and objects in a text of JSON."""
    return text.count(b"[") + text.count(b"{")


def _excess(length: int, brackets: int) -> str:
    """What of a header is beyond the limits, if anything is."""
    if length > MAX_HEADER_BYTES:
        return f"got a header of {length} bytes, expected at most {MAX_HEADER_BYTES}"
    if brackets > MAX_HEADER_BRACKETS:
        return f"got {brackets} lists and mappings, expected at most {MAX_HEADER_BRACKETS}"
    return ""


def _replace(path: Path, data: bytes) -> None:
    """Give the file its new content in one step."""
    with _temporary(path) as (temporary, file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":  # which renames no open file, and has no lock to lose
            file.close()
        os.replace(temporary, path)
    if os.name == "posix":  # the new name, too, must survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside ``path`` that no other writer has, locked while it is written.

    What killed writers left there is removed first: their locks died with them.
    """
    _remove_left_over(path)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        # "x": a file of its own, never through a link that someone else put there
        with open(temporary, "xb") as file:
            if not _lock(file, wait=True) or os.fstat(file.fileno()).st_nlink:
                try:
                    yield temporary, file
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
                return


def _remove_left_over(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}(\.[0-9a-f]{{16}})?\.tmp")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        left = path.with_name(name)
        with contextlib.suppress(OSError), open(os.open(left, flags), "rb") as file:
            if _lock(file, wait=False):
                left.unlink()


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Whether this process now holds the file; no, where a file system has no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
