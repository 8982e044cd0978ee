"""Messages between two processes of one machine, over a socket that only they hold; tensors by shared memory."""

from __future__ import annotations

import math
import mmap
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import torch

from xdit_compile.engine.values import read, written
from xdit_compile.errors import XditError

DESCRIPTOR = "XDIT_COMPILE_ENGINE"
"""Environment variable that tells a worker of its end."""
LONGEST_TEXT = 256 * 2**20
"""Bytes of a message, without its tensors."""
# Tensors begin at multiples of this in the shared memory.
_ALIGNED = 64
# Seconds in which the other process takes a message; it reads in a thread that does nothing else.
_PATIENCE = 60


class ChannelClosed(XditError):
    """Raised where the process at the other end is gone."""


class Message:
    """A value that is ready to be sent, to one or to several: its text, and its tensors in shared memory.

    Raises:
        XditError: it holds what cannot be sent.
    """

    def __init__(self, value: Any) -> None:
        self.text, tensors = written(value)
        self.memory = _filled(tensors) if tensors else None

    def __enter__(self) -> Message:
        return self

    def __exit__(self, *_: object) -> None:
        if self.memory is not None:
            os.close(self.memory)


class Channel:
    """One end. Several threads may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        # Of the socket itself, as Python's own limit would be one of a reader in another thread too.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _PATIENCE, 0))
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, value: Any) -> None:
        """Send a value.

        Raises:
            XditError: it holds what cannot be sent. ChannelClosed: nobody takes it any more.
        """
        with Message(value) as message:
            self.post(message)

    def post(self, message: Message) -> None:
        """Send what is ready.

        Raises:
            ChannelClosed: nobody takes it any more.
        """
        try:
            with self._lock:
                header = struct.pack("!Q", len(message.text))
                if message.memory is None:
                    self._socket.sendall(header + message.text)  # at once: the reader wakes up once
                else:
                    socket.send_fds(self._socket, [header], [message.memory])
                    self._socket.sendall(message.text)
        except OSError as error:
            raise ChannelClosed(f"the other process takes no messages any more: {error}") from error

    def receive(self) -> Any:
        """The next value, waited for.

        Raises:
            ChannelClosed: the other process is gone. XditError: what it sent is no message.
        """
        try:
            header, handed, _, _ = socket.recv_fds(self._socket, 8, 1)
            header += self._bytes(8 - len(header)) if header else b""
            if not header:
                raise ChannelClosed("the other process is gone")
            (size,) = struct.unpack("!Q", header)
            if size > LONGEST_TEXT:
                raise XditError(f"a message of {size} bytes is longer than {LONGEST_TEXT}")
            text = self._bytes(size)
        except OSError as error:
            raise ChannelClosed(f"the other process is gone: {error}") from error
        return read(text, _Reader(handed[0]) if handed else _none)

    def close(self) -> None:
        self._socket.close()

    def _bytes(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            part = self._socket.recv(min(count - len(found), 2**20))
            if not part:
                raise ChannelClosed("the other process is gone")
            found += part
        return bytes(found)


def _filled(tensors: Sequence[torch.Tensor]) -> int:
    """A file without a name, in memory where the system can, with these tensors one behind the other."""
    descriptor = _unnamed()
    size = sum(_spanned(t.nbytes) for t in tensors)
    os.ftruncate(descriptor, max(size, 1))
    with mmap.mmap(descriptor, max(size, 1)) as mapped:
        offset = 0
        for tensor in tensors:
            if tensor.nbytes:
                mapped[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().data
            offset += _spanned(tensor.nbytes)
    return descriptor


def _unnamed() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("xdit_compile")
    with tempfile.TemporaryFile() as made:
        return os.dup(made.fileno())


class _Reader:
    """The tensors of one message, in their order, mapped: what is written into them stays in this process."""

    def __init__(self, descriptor: int) -> None:
        try:
            self._mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(descriptor)
        self._offset = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        made = torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=self._offset).reshape(shape)
        self._offset += _spanned(made.nbytes)
        return made


def _spanned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _none(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    raise XditError("a message without tensors speaks of one")
