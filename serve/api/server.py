"""The server process: it checks what is asked, opens the port and starts the engines."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import torch

from qwen_ds import dist
from qwen_ds.errors import EXIT_USER, Failed, UserError
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.runlog import say
from serve.api.answering import Answering
from serve.api.app import Front, create_app
from serve.api.engines import EnginePool
from serve.api.gate import Gate, Log
from serve.api.keys import read_keys
from serve.api.listening import (
    LAST_WORDS_SECONDS,
    Port,
    Server,
    configured,
    listening,
    on_signals,
    url_of,
)
from serve.api.metrics import Metrics
from serve.api.options import ApiOptions
from serve.api.served import Served, knows_turns
from serve.api.worker import EngineSettings, memory_each
from serve.engine.adapters import DEFAULT
from serve.engine.loading import find_adapters


def serve(options: ApiOptions) -> int:
    """Serve until a signal ends it.

    UserError: no such model or adapter, a port in use, keys or certificates that cannot be read.
    """
    if dist.world_size() > 1:
        raise UserError(f"{dist.world_size()} ranks; expected one process, and --engines N")
    keys = read_keys(options)
    folder = find_model(options.model)
    adapters = find_adapters(options.adapter, folder, options.allow_pickle)
    with listening(options) as port:
        served = _served(options, folder, tuple(adapters))
        settings = _settings(options, folder, adapters)
        return asyncio.run(_serve(options, served, settings, keys, port))


def _served(options: ApiOptions, folder: ModelFolder, adapters: tuple[str, ...]) -> Served:
    names = tuple(options.served_model_name) or (folder.path.resolve().name,)
    named = tuple(name for name in adapters if name != DEFAULT)
    if both := sorted(set(names) & set(named)):
        raise UserError(f"{both[0]} names the model and an adapter; expected different names")
    context, chats = folder.family.context(folder.config), knows_turns(folder, bool(adapters))
    return Served(names, named, folder.encoding, context, chats)


def _settings(
    options: ApiOptions, folder: ModelFolder, adapters: dict[str, Path]
) -> tuple[EngineSettings, int]:
    o, gpus = options, torch.cuda.device_count() if options.device != "cpu" else 0
    number = int(o.engines or max(gpus, 1))
    if gpus and number > gpus:
        raise UserError(f"--engines {number} with {gpus} GPUs; expected one for each at most")
    # A core is left to this process: threads that wait for one of their own spin meanwhile.
    threads = None if gpus else max(1, (len(os.sched_getaffinity(0)) - 1) // number)
    memory = None if o.memory_gb is None else float(o.memory_gb)
    if memory is None and not gpus and number > 1:
        memory = memory_each(folder, number)
    folders = {name: str(place) for name, place in adapters.items()}
    # Plain numbers: the parser's own kinds do not pickle.
    settings = EngineSettings(
        str(folder.path), folders, o.device, o.dtype, o.allow_pickle, int(o.slots),
        int(o.prefill_tokens), memory, threads,
    )  # fmt: skip
    return settings, number


async def _serve(
    options: ApiOptions,
    served: Served,
    engines: tuple[EngineSettings, int],
    keys: list[str],
    port: Port,
) -> int:
    pool = EnginePool(*engines)
    metrics = Metrics(pool, (*served.names, *served.adapters))
    most = engines[1] * options.slots + options.max_queue
    text_of = served.encoding.decode if options.log_text else None
    answering = Answering(pool, metrics, most, options.request_seconds, text_of)
    app = create_app(Front(served, pool, metrics, answering))
    most_bytes, seconds = int(options.max_body_mb * 1e6), options.body_seconds
    log = Log()
    gate = Gate(app, keys, most_bytes, seconds, log.put, options.cors_origins, options.host)
    server = Server(configured(options, gate, port.most_clients, log.put))
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(port.take_error)

    def end() -> None:
        if not answering.is_draining:
            answering.is_draining = True
            # Whoever still waits by then is told that its engine has ended.
            loop.call_later(options.drain_seconds, pool.close)
        server.should_exit = True

    on_signals(end, log)
    pool.start()
    try:
        serving = asyncio.ensure_future(server.serve(sockets=[port]))
        loading = asyncio.ensure_future(pool.wait_until_ready())
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and (refused := loading.result()) is not None:
            end()
            await serving
            failure = UserError if refused.exit_code == EXIT_USER else Failed
            raise failure(refused.message)
        if not serving.done():
            _say_ready(options, served, pool, port)
        await serving
    finally:
        pool.close()
        log.close(LAST_WORDS_SECONDS)
    return 0


def _say_ready(options: ApiOptions, served: Served, pool: EnginePool, port: socket.socket) -> None:
    ready = pool.engines[0].ready
    assert ready is not None
    room = f"room for {ready.room:,} tokens of keys and values ({ready.gigabytes:.3g} GB)"
    each = "" if len(pool.engines) == 1 else f"{len(pool.engines)} engines, each with "
    say(f"{', '.join((*served.names, *served.adapters))}: {each}{room}")
    say(f"ready at {url_of(options, port.getsockname()[1])}")
