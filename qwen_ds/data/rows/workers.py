"""Worker processes that turn conversations into token rows.

They are started as a program of their own: one fresh interpreter reads the vocabulary and then forks the rest, so
that they share its memory and its start-up time. (multiprocessing would either fork the training process, with its
threads and its GPU, or import the launch script once more in each worker.) A worker ends when its socket closes, so
none outlives a parent that was killed.

On the wire a message is its length (8 bytes, little-endian) and then: to a worker a JSON list of conversations as
[system, role, text, role, text ..], back a `Block`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.model.chatml import Conversation, Turn
from qwen_ds.model.tokenizer import Encoding, load_encoding

# Reading rows takes the parent about a third of the time that encoding them takes: more would wait for it.
MOST_WORKERS = 8


def default_workers() -> int:
    """One for each core that this process may use besides its own, 8 at most."""
    return min(len(os.sched_getaffinity(0)) - 1, MOST_WORKERS)


class Workers:
    """Encodes chunks of conversations in `count` processes, until `close`."""

    def __init__(self, vocabulary: Path, options: EncodeOptions, count: int) -> None:
        ends = [socket.socketpair() for _ in range(count)]
        theirs = [their.fileno() for _, their in ends]
        start = json.dumps(
            {
                "vocabulary": str(vocabulary),
                "options": dataclasses.asdict(options),
                "sockets": theirs,
            }
        )
        self._program = subprocess.Popen(
            [sys.executable, "-m", "qwen_ds.data.rows.workers", start],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            # The package may lie on this process's path only (a script in a checkout).
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        for _, their in ends:
            their.close()
        self._sockets = [ours for ours, _ in ends]
        self._idle: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        for ours in self._sockets:
            self._idle.put(ours)
        # One thread per worker: it sends, waits and receives.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encode")

    def submit(self, conversations: Sequence[Conversation]) -> Future[Block]:
        return self._threads.submit(self._call, _to_wire(conversations))

    def _call(self, request: bytes) -> Block:
        worker = self._idle.get()
        try:
            _send(worker, request)
            answer = _receive(worker)
        except ConnectionError:
            answer = None
        if answer is None:
            self._idle.put(worker)
            raise RuntimeError(
                "a process that encodes rows has died; its message stands above, if it left one"
            )
        self._idle.put(worker)
        return Block.from_bytes(answer)

    def close(self) -> None:
        """End the processes; what was submitted and has no result yet is lost."""
        for ours in self._sockets:
            ours.shutdown(socket.SHUT_RDWR)
        self._threads.shutdown(cancel_futures=True)
        for ours in self._sockets:
            ours.close()
        self._program.wait()


def _to_wire(conversations: Sequence[Conversation]) -> bytes:
    flat = [
        [c.system, *(part for turn in c.turns for part in (turn.role, turn.text))]
        for c in conversations
    ]
    return json.dumps(flat, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _from_wire(request: bytes) -> list[Conversation]:
    return [
        Conversation(
            flat[0],
            tuple(Turn(role, text) for role, text in zip(flat[1::2], flat[2::2], strict=True)),
        )
        for flat in json.loads(request.decode("utf-8", "surrogatepass"))
    ]


def _send(to: socket.socket, message: bytes) -> None:
    to.sendall(struct.pack("<Q", len(message)))
    to.sendall(message)


def _receive(source: socket.socket) -> bytes | None:
    """The next message; None when the other side has closed."""
    header = _receive_exactly(source, 8)
    return None if header is None else _receive_exactly(source, struct.unpack("<Q", header)[0])


def _receive_exactly(source: socket.socket, n_bytes: int) -> bytes | None:
    message = bytearray(n_bytes)
    view = memoryview(message)
    while view:
        received = source.recv_into(view)
        if not received:
            return None
        view = view[received:]
    return bytes(message)


def _serve(encoding: Encoding, options: EncodeOptions, parent: socket.socket) -> None:
    while (request := _receive(parent)) is not None:
        _send(parent, encode_block(encoding, _from_wire(request), options).to_bytes())


def main() -> None:
    start = json.loads(sys.argv[1])
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; workers end when the parent does
    encoding = load_encoding(start["vocabulary"])
    options = EncodeOptions(**start["options"])
    gc.freeze()  # a collection would touch, and so copy, every page that the forks share
    sockets = [socket.socket(fileno=number) for number in start["sockets"]]
    children = []
    while len(sockets) > 1:
        mine = sockets.pop()
        child = os.fork()
        if not child:
            # A worker that held a brother's socket would hide that brother's death from the parent.
            for other in sockets:
                other.close()
            _serve(encoding, options, mine)
            return
        children.append(child)
        mine.close()
    _serve(encoding, options, sockets[0])
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
