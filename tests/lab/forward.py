"""The host's way in: listens on the host's 127.0.0.1 and connects from inside the node's network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket

from lab.settings import HOST_PORT

CLONE_NEWNET = 0x40000000
API_SERVER = ("127.0.0.1", 6443)


def run(init: int) -> None:
    """Forwards until the node's first process ends."""
    listener = socket.create_server(("127.0.0.1", HOST_PORT))
    namespace = os.open(f"/proc/{init}/ns/net", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    # the listening socket stays in the namespace where it was made
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    asyncio.run(_serve(listener, init))


async def _serve(listener: socket.socket, init: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(os.pidfd_open(init), ended.set)
    async with await asyncio.start_server(_handle, sock=listener):
        await ended.wait()
        os._exit(0)


async def _handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        inner_reader, inner_writer = await asyncio.open_connection(*API_SERVER)
        await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        inner_writer.close()
    writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except (OSError, asyncio.CancelledError):
        writer.close()
