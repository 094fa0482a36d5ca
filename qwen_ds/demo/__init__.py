"""The embedded default: a tiny Qwen, a small corpus, and the tour of the project's commands (`make
demo`). `prepare` makes the files that a run with `model.path: demo` starts from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from qwen_ds.demo import corpus
from qwen_ds.disk.write import publish, unfinished_name


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """The base's checkpoint folder, and the training and evaluation rows as JSON lines."""

    model: Path
    train: Path
    eval: Path


def prepare(target: Path) -> DemoPaths:
    """Make base and data under `target`, unless they are there already.

    Their folder is named after their content, so that versions never mix. Any number of processes
    may call this at once: the first to finish wins. Raises UserError without the vocabulary.
    """
    from qwen_ds.demo import base

    train_rows, eval_rows = corpus.train_rows(), corpus.eval_rows()
    digest = hashlib.sha256(base.PACKED_FILE.read_bytes())
    settings = [base.CONFIG, base.GENERATION_CONFIG, base.TOKENIZER_CONFIG, base.ROW_STD]
    digest.update(json.dumps([settings, train_rows, eval_rows]).encode())
    folder = target / digest.hexdigest()[:12]
    paths = DemoPaths(folder / "base", folder / "train.jsonl", folder / "eval.jsonl")
    if folder.is_dir():
        return paths
    unfinished = unfinished_name(folder, owner=uuid.uuid4().hex)
    unfinished.mkdir(parents=True)
    try:
        base.unpack_base(unfinished / "base")
        corpus.write_rows(train_rows, unfinished / "train.jsonl")
        corpus.write_rows(eval_rows, unfinished / "eval.jsonl")
        publish(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return paths
