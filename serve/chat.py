"""A chat in the terminal, with a model here or one at an endpoint.

    python -m serve.chat --model DIR_OR_HUB_ID [--adapter DIR | NAME=DIR ...]
    python -m serve.chat --endpoint URL [--endpoint_model NAME]
    echo "你好" | python -m serve.chat --model DIR               # an answer to each line

/help lists the commands. Ctrl-C stops the answer, Ctrl-D ends the chat.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout

from qwen_ds import dist
from qwen_ds.errors import UserError
from qwen_ds.model.folder import find_model
from qwen_ds.runlog import run_command
from qwen_ds.terminal import show
from serve.answering import room_in_words
from serve.endpoint.client import connect
from serve.engine.loading import find_adapters, load_engine, silence_libraries
from serve.options import parse
from serve.talk.history import History
from serve.talk.interrupts import Interrupts
from serve.talk.lines import PipeLines, TerminalLines
from serve.talk.loop import Chat
from serve.talk.options import ChatOptions
from serve.talk.talkers import EndpointTalker, EngineTalker, Talker

# Somebody is waiting, and can ask again.
PATIENCE_SECONDS = 20.0


def main() -> int:
    options = parse(ChatOptions, __doc__.split("\n\n")[0])
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

    UserError: no such model, adapter or server, or a structure that no answer can be held to.
    Failed: the server is down.
    """
    sampling, stop, structure = options.sampling(), tuple(options.stop), options.structure()
    if options.model is None:
        if structure is not None and structure.note is not None:
            _tell(structure.note)
        endpoint = connect(options, PATIENCE_SECONDS, _tell)
        _tell(f"{endpoint.url}: {endpoint.model}")
        return EndpointTalker(endpoint, sampling, interrupts, stop, structure)
    folder = find_model(options.model)
    options.check_tokens(folder.encoding.n_vocab)
    adapters = find_adapters(options.adapter, folder, options.allow_pickle)
    grammar = None if structure is None else structure.grammar(folder)
    engine = load_engine(
        folder, None, options.device, options.dtype, adapters=adapters,
        allow_pickle=options.allow_pickle,
    )  # fmt: skip
    talker = EngineTalker(engine, folder.encoding, sampling, options.memory_gb, stop, grammar)
    _tell(room_in_words(talker.decoding))
    _tell(f"{folder.path}: room for {talker.room:,} tokens of conversation")
    if talker.has_named_adapters:
        _tell(talker.use_adapter(""))
    return talker


def _tell(text: str) -> None:
    show(text, err=True)


if __name__ == "__main__":
    run_command(main)
