"""A chat in the terminal, with a model here or one at an endpoint.

    python -m serve.chat --model DIR_OR_HUB_ID [--adapter DIR]
    python -m serve.chat --endpoint URL [--endpoint_model NAME]
    echo "你好" | python -m serve.chat --model DIR               # an answer to each line

/help lists the commands. Ctrl-C stops the answer, Ctrl-D ends the chat.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout

from qwen_ds import dist
from qwen_ds.disk.adapter_folder import tell_adapter
from qwen_ds.errors import UserError
from qwen_ds.model.folder import find_model
from qwen_ds.recipe.parser import parse_options
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show
from serve.endpoint.client import connect
from serve.engine.loading import load_engine, silence_libraries
from serve.talk.history import History
from serve.talk.interrupts import Interrupts
from serve.talk.lines import PipeLines, TerminalLines
from serve.talk.loop import Chat
from serve.talk.options import ChatOptions
from serve.talk.talkers import EndpointTalker, EngineTalker, Talker

# Somebody is waiting, and can ask again.
PATIENCE_SECONDS = 20.0


def main() -> int:
    options = parse_options(ChatOptions, __doc__.split("\n\n")[0])
    if dist.world_size() > 1:
        raise UserError(f"{dist.world_size()} ranks; expected one process for a chat")
    silence_libraries()
    interrupts = Interrupts()
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with redirect_stdout(sys.stderr):  # in a pipe the answers are all that there is on stdout
        talker = open_talker(options, interrupts)
    if on_terminal:
        show("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
    with interrupts.handled() if on_terminal else nullcontext():
        lines = TerminalLines(interrupts) if on_terminal else PipeLines()
        Chat(talker, History(options.system), lines, interrupts, on_terminal).run()
    return 0


def open_talker(options: ChatOptions, interrupts: Interrupts) -> Talker:
    """Load the model, or find the server.

    UserError: no such model, adapter or server. Failed: the server is down.
    """
    sampling = options.sampling()
    if options.model is None:
        endpoint = connect(options, PATIENCE_SECONDS, _tell)
        _tell(f"{endpoint.url}: {endpoint.model}")
        return EndpointTalker(endpoint, sampling, interrupts)
    folder = find_model(options.model)
    adapter = None if options.adapter is None else tell_adapter(options.adapter)
    engine = load_engine(
        folder, adapter, options.device, options.dtype, allow_pickle=options.allow_pickle
    )
    talker = EngineTalker(engine, folder.encoding, sampling, options.memory_gb)
    _tell(f"{folder.path}: room for {talker.room:,} tokens of conversation")
    return talker


def _tell(text: str) -> None:
    show(text, err=True)


if __name__ == "__main__":
    run_command(main)
