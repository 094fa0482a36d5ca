"""An HTTP server with OpenAI's API, the original project's route and a chat page.

    python -m serve.api --model DIR_OR_HUB_ID [--adapter NAME=DIR ...] [--host H] [--port 8044]

Each engine is a process of its own, one for each GPU; the front of them all is this process.
Clients ask for the model by its folder's name, or for an adapter by its own. SIGTERM lets answers
under way end. The log on standard output has one JSON line a request.
"""

from __future__ import annotations

import os
import sys

from qwen_ds.recipe.parser import parse_options
from qwen_ds.runlog import run_command
from serve.api.options import ApiOptions
from serve.api.server import serve


def main() -> None:
    code = serve(parse_options(ApiOptions, __doc__.split("\n\n")[0]))
    sys.stdout.flush()
    sys.stderr.flush()
    # The engines have ended and the log is written. Python would take seconds to give back all that
    # libraries hold, which the system does at once.
    os._exit(code)


if __name__ == "__main__":
    run_command(main)
