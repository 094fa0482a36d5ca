"""The last collective that a rank has enqueued and finished, from torch's flight recorder.

On a GPU a rank enqueues its collectives long before they run, so its place in the training does not
say which one it waits for. torch records the newest 2,000 with their numbers, which all ranks of a
process group count alike (torch/csrc/distributed/c10d/FlightRecorder.hpp): those of NCCL in one
ring, those of gloo in another.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch._C import _distributed_c10d as c10d

log = logging.getLogger(__name__)

_RINGS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # a build without NCCL has no first one
_MOST_GROUPS = 3
Entry = dict[str, Any]


class LastCollectives:
    """Reader of the recorder. `text` is what it read last; empty before that."""

    def __init__(self) -> None:
        self.text = ""
        self._thread: threading.Thread | None = None

    def read(self) -> None:
        """Begin to read, unless a thread still does: torch asks CUDA about each entry."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, name="collectives", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        try:
            dumps = [vars(c10d)[name]() for name in _RINGS if name in vars(c10d)]
            self.text = describe(dumps)
        # CUDA failed, or a later torch writes otherwise.
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            log.info("torch's flight recorder cannot be read: %r", error)


def describe(dumps: Iterable[bytes | str]) -> str:
    """The recorder's JSON in words: of each process group that waits for a collective, the last one
    that was enqueued and the last one that is finished; where none waits, of the newest alone."""
    groups: defaultdict[str, list[Entry]] = defaultdict(list)
    for dump in dumps:
        for entry in json.loads(dump)["entries"]:
            if not entry["is_p2p"]:
                groups[entry["process_group"][0]].append(entry)
    # One collective may have several entries: those of a coalesced one have its number.
    last = {name: max(found, key=_number) for name, found in groups.items()}
    waiting = [name for name in groups if not all(map(_is_finished, groups[name]))]
    if not waiting:
        waiting = sorted(groups, key=lambda name: int(last[name]["time_created_ns"]))[-1:]
    texts = [_of_group(groups[name], last[name]) for name in waiting[:_MOST_GROUPS]]
    return " and ".join(texts)


def _of_group(entries: list[Entry], last: Entry) -> str:
    number, description = last["process_group"]
    where = "" if description == "default_pg" else f" in process group {number}"
    if all(map(_is_finished, entries)):
        return f"{_name(last)} is the last enqueued and is finished{where}"
    finished = [entry for entry in entries if _is_finished(entry)]
    done = f"{_name(max(finished, key=_number))} is" if finished else "none is"
    return f"{_name(last)} is the last enqueued, {done} the last finished{where}"


def _number(entry: Entry) -> int:
    return int(entry["collective_seq_id"])


def _is_finished(entry: Entry) -> bool:
    # gloo keeps no events to tell the state by: it retires an entry once its wait is over. NCCL
    # also retires what has timed out.
    ended = entry["retired"] and not entry["profiling_name"].startswith("nccl")
    return bool(ended or entry["state"] == "completed")


def _name(entry: Entry) -> str:
    """Such as "all_reduce 6 (24,576 elements)"."""
    name = entry["profiling_name"].partition(":")[2].lstrip("_")
    elements = sum(math.prod(sizes) for sizes in entry["input_sizes"])
    return f"{name} {_number(entry)} ({elements:,} elements)"


def by_rank(texts: Iterable[str]) -> str:
    """The ranks' texts, in rank order, each text once: "rank 0: ...; ranks 1-7: ..."."""
    ranks: defaultdict[str, list[int]] = defaultdict(list)
    for rank, text in enumerate(texts):
        ranks[text or "not known"].append(rank)
    return "; ".join(f"{_ranges(found)}: {text}" for text, found in ranks.items())


def _ranges(ranks: list[int]) -> str:
    """rank 3; ranks 0-2, 5"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"
