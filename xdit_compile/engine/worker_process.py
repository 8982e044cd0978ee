"""The process of one rank: ``python -m`` of this module, which nothing imports."""

from __future__ import annotations

import os
import socket
import sys
import threading

from xdit_compile.engine.channel import DESCRIPTOR, Channel
from xdit_compile.engine.failures import told
from xdit_compile.engine.worker import Worker
from xdit_compile.errors import XditError
from xdit_compile.runtime.launch import become_rank


def main() -> None:
    """A process of its own, with the environment of a rank, which ends with the handle's."""
    channel = Channel(socket.socket(fileno=int(os.environ.pop(DESCRIPTOR))))
    hello = channel.receive()
    try:
        place = become_rank({}, hello["device"], hello["threads"])
        worker = Worker(place, channel.send)
    except Exception as error:
        channel.send({**told(error, True, 0), "number": hello["number"]})
        sys.exit(1)
    threading.Thread(target=_listen, args=(channel, worker), daemon=True, name="xdit-listens").start()
    worker.work()
    # Without ceremony: ranks do not all come here at once, and a group that is destroyed may wait for others.
    os._exit(0)


def _listen(channel: Channel, worker: Worker) -> None:
    try:
        while True:
            message = channel.receive()
            worker.take(None if message["do"] == "end" else message)
    except XditError:
        # The handle is gone, or its messages cannot be read.
        os._exit(1)


if __name__ == "__main__":
    main()
