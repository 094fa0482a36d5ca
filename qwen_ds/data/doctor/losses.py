"""Rows ranked by the loss that a model has on their answers after training.

Rows that a trained model still finds unlikely are read first: wrong labels are among them.

Shapes: B rows of a batch, T longest row in it.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from qwen_ds.data.doctor.examine import TRAIN, Pass
from qwen_ds.data.doctor.options import CheckCommand
from qwen_ds.data.doctor.output import LOSSES, CheckOutputs, writing
from qwen_ds.data.doctor.spans import Shown
from qwen_ds.data.rows.token_rows import TokenRows, prepare
from qwen_ds.data.windows import cut_windows
from qwen_ds.errors import UserError
from qwen_ds.model.adapter import check_adapter_fits, read_adapter
from qwen_ds.model.adapter_loading import check_copies, put_adapter
from qwen_ds.model.chatml import IGNORE
from qwen_ds.model.device import take_device
from qwen_ds.model.family import LanguageModel
from qwen_ds.model.folder import ModelFolder
from qwen_ds.model.loading import load_base
from qwen_ds.model.token_loss import token_losses
from qwen_ds.terminal import show

TOKENS_A_BATCH = 4096  # padded


def rank(
    options: CheckCommand, folder: ModelFolder, gathered: Pass, places: CheckOutputs
) -> dict[str, Any]:
    """Rank the training rows by their mean loss a target token, encoded as training encodes them.

    The worst are findings; losses.jsonl has all rows, the worst first. Returns a few numbers for
    summary.json. UserError: an adapter that is not the base's, rows that cannot be trained on.
    """
    data = replace(options.data, weights=None, eval=[], eval_fraction=0.0, bad_rows="skip")
    try:
        rows = prepare(data, folder.encoding, folder.config.seq_length).train
    except UserError as error:  # which the findings explain
        show(f"the rows are not ranked by loss: {error}", err=True)
        return {"not_ranked": str(error), "mean": None}
    model = loaded(options, folder)
    device = next(model.parameters()).device
    means = mean_losses(model, rows, device)
    order = np.argsort(-means, kind="stable")
    records = _records(gathered, rows)
    for place, row in enumerate(order[: options.worst].tolist(), 1):
        if (record := records[row]) is not None:
            detail = f"number {place} of {len(rows):,}: {means[row]:.3f} nats a token"
            gathered.tally.add("high-loss", record, Shown(detail=detail))
    if places.folder is not None:
        with writing(places.folder / LOSSES) as file:
            for place, row in enumerate(order.tolist(), 1):
                record = records[row]
                told = rows.source(row) if record is None else gathered.tally.places.text(record)
                about = {"rank": place, "source": told}
                about |= {"loss": round(float(means[row]), 6), "tokens": int(rows.learnt[row])}
                file.write(f"{json.dumps(about, ensure_ascii=False)}\n")
    return {"rows": len(rows), "mean": round(float(means.mean()), 6)}


def _records(gathered: Pass, rows: TokenRows) -> list[int | None]:
    """The record of each token row. Both are in the order of the sources, so those that share a
    line are told apart by their order; None where a line lost rows when it was encoded, and which
    of them is not known."""
    places = gathered.tally.places
    of_line: dict[str, list[int]] = defaultdict(list)
    for record in gathered.record_N:
        if gathered.files[places.path_of(record)][0] == TRAIN:
            of_line[places.source(record)].append(record)
    sources = [rows.source(row) for row in range(len(rows))]
    encoded = Counter(sources)
    met: Counter[str] = Counter()
    found: list[int | None] = []
    for source in sources:
        records = of_line[source]
        is_whole = len(records) == encoded[source]
        is_one = len(set(records)) == 1
        found.append(records[met[source] if is_whole else 0] if is_whole or is_one else None)
        met[source] += 1
    return found


def loaded(options: CheckCommand, folder: ModelFolder) -> LanguageModel:
    """The model, with its adapter if there is one, on the GPU if there is one. UserError: a GPU
    that torch cannot use."""
    transformers_logging.disable_progress_bar()
    # peft asks transformers for a name that is going away.
    warnings.simplefilter("ignore", FutureWarning)
    device = take_device("auto")
    model = load_base(folder, "auto" if device.type == "cuda" else torch.float32)
    if options.adapter is not None:
        adapter = read_adapter(options.adapter)
        check_adapter_fits(adapter, folder.stored.shapes)
        check_copies(adapter, dict(model.named_parameters()))
        put_adapter(model, adapter)
    return model.to(device).eval()  # type: ignore[arg-type]


def mean_losses(model: LanguageModel, rows: TokenRows, device: torch.device) -> np.ndarray:
    """The mean loss of each row's target tokens in nats, float64 [rows]."""
    means = np.zeros(len(rows))
    for window in cut_windows(rows.lens, 1, TOKENS_A_BATCH):
        batch = window.tolist()
        longest = max(int(rows.lens[row]) for row in batch)
        ids_BT = np.full((len(batch), longest), rows.pad_id, np.int64)
        labels_BT = np.full((len(batch), longest), IGNORE, np.int64)
        for place, row in enumerate(batch):
            ids, labels = rows[row]
            ids_BT[place, : len(ids)], labels_BT[place, : len(ids)] = ids, labels
        losses_BT = token_losses(
            model.base_model,
            model.get_output_embeddings(),
            torch.from_numpy(ids_BT).to(device),
            torch.from_numpy(labels_BT).to(device),
        )
        counts = np.maximum((labels_BT[:, 1:] != IGNORE).sum(axis=1), 1)
        means[batch] = losses_BT.sum(dim=1).cpu().numpy() / counts
    return means
