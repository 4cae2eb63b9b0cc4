"""What was acknowledged and is not in the database yet: a file in memory, which the death of the process leaves whole.

Bytes in a shared mapping belong to the operating system as soon as they are written, as those of a commit without a sync do; so a
record is as safe here as in the database, without a system call. Two halves take turns: one is filled while the other is written
to the database, and is free again when that is committed. After a death both are read.

    half     generation (4, and 4 unused), records
    record   length (4), CRC-32 of kind and body, begun at the generation (4), kind (1), body: MessagePack
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from zlib import crc32

import msgspec

from walras.errors import OutputError
from walras.ledger.entry import Entry, Hold, Record

HALF = 2 << 20
"""Bytes of a half: some two thousand requests. Where one is full, a record waits for its commit instead."""

_GENERATION = Struct("<I4x")
_HEAD = Struct("<II")
_encode = msgspec.msgpack.Encoder().encode
_KINDS = {Hold: b"h", Entry: b"e"}
_DECODERS = {ord(kind): msgspec.msgpack.Decoder(of).decode for of, kind in _KINDS.items()}


class Journal:
    """The file, made anew. Used under its writer's lock.

    Raises:
        OSError: it cannot be made or mapped here.
        AttributeError: this system cannot promise a file its room.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, 2 * HALF)  # so that a full disk cannot fail a write to memory
            self._map = mmap.mmap(file, 2 * HALF)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        self.path = path
        self._generations = [0, 0]
        self._half = 0
        """That is being filled."""
        self._end = _GENERATION.size

    def append(self, record: Record) -> bool:
        """Keep a hold or an entry; False where there is no room, or it is neither, or cannot be written down."""
        kind = _KINDS.get(type(record))
        if kind is None:
            return False
        try:
            body = kind + _encode(record)
        except (OverflowError, TypeError, ValueError):  # half a character among them
            return False
        framed = _HEAD.pack(len(body), crc32(body, self._generations[self._half])) + body
        end = self._end + len(framed)
        if end > HALF:
            return False
        start = self._half * HALF
        self._map[start + self._end : start + end] = framed
        self._end = end
        return True

    def turn(self) -> None:
        """Fill the other half from now on, which was drained."""
        self._half, self._end = 1 - self._half, _GENERATION.size

    def drained(self) -> None:
        """The half that is not being filled is in the database: its records count no more."""
        half = 1 - self._half
        self._generations[half] = (self._generations[half] + 1) % 2**32
        _GENERATION.pack_into(self._map, half * HALF, self._generations[half])

    def close(self, *, empty: bool) -> None:
        """`empty`: all of it is in the database."""
        self._map.close()
        if empty:
            self.path.unlink(missing_ok=True)


def left(path: Path) -> list[Record]:
    """What a process left behind: holds first, then entries. What was half written when it died was not acknowledged.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
    found = [record for start in range(0, len(data), HALF) for record in _records(data[start : start + HALF])]
    return sorted(found, key=lambda record: isinstance(record, Entry))


def _records(half: bytes) -> Iterator[Record]:
    if len(half) < _GENERATION.size:  # its process died while it was made
        return
    (generation,) = _GENERATION.unpack_from(half)
    at = _GENERATION.size
    while at + _HEAD.size < len(half):
        length, crc = _HEAD.unpack_from(half, at)
        at += _HEAD.size
        body = half[at : at + length]
        if not length or len(body) < length or crc32(body, generation) != crc:
            return
        try:
            yield _DECODERS[body[0]](body[1:])
        except msgspec.ValidationError as error:  # as the database would have refused it
            logging.getLogger("walras.ledger").error("%s", error)
        at += length
