"""The recorder's JSON in words, as NCCL and gloo write it, and two ranks that truly hang."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ds import dist
from qwen_ds.train.survive.collectives import by_rank, describe
from qwen_ds.train.survive.watchdog import Watchdog
from tests.jobs import free_port


def entry(number: int, name: str, state: str, **other: Any) -> dict[str, Any]:
    """As in a dump of torch 2.13, keys that nobody reads left out."""
    retired = state == "completed"
    plain: dict[str, Any] = {
        "collective_seq_id": number, "profiling_name": name, "state": state, "is_p2p": False,
        "input_sizes": [[2, 12288]], "process_group": ["0", "default_pg"], "retired": retired,
        "time_created_ns": 1000 * number,
    }  # fmt: skip
    return plain | other


def dump(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"version": "2.10", "entries": entries}).encode()


def test_nccl_has_enqueued_more_than_it_has_finished() -> None:
    """Forward has run ahead of the GPU. What has timed out is retired and not finished."""
    ring = dump(
        entry(7, "nccl:all_reduce", "completed", retired=False),  # not seen by its watchdog yet
        entry(8, "nccl:_all_gather_base", "started", retired=True, input_sizes=[[5], [3, 2]]),
        entry(9, "nccl:reduce_scatter_tensor_coalesced", "scheduled"),
        entry(1, "nccl:send", "scheduled", is_p2p=True, collective_seq_id=99),
    )
    assert describe([ring, dump()]) == (
        "reduce_scatter_tensor_coalesced 9 (24,576 elements) is the last enqueued, all_reduce 7 "
        "(24,576 elements) is the last finished"
    )


def test_each_process_group_that_waits_is_named_and_no_other() -> None:
    other = {"process_group": ["3", "undefined"]}
    ring = dump(
        entry(4, "nccl:broadcast", "completed"),
        entry(1, "nccl:_all_gather_base", "started", input_sizes=[[5]], **other),
    )
    waits = "all_gather_base 1 (5 elements) is the last enqueued, none is the last finished"
    assert describe([ring]) == f"{waits} in process group 3"
    ended = dump(entry(4, "nccl:broadcast", "completed"), entry(1, "nccl:barrier", "completed"))
    assert describe([ended]) == (
        "broadcast 4 (24,576 elements) is the last enqueued and is finished"
    )
    assert describe([dump()]) == "", "before the first collective"


def test_ranks_that_say_the_same_are_named_together() -> None:
    assert by_rank(["a", "a", "b", "a", ""]) == "ranks 0-1, 3: a; rank 2: b; rank 4: not known"


def _rank(rank: int, port: int, out: Path) -> None:
    """A rank of two whose collectives are unequal: the first begins one more than the other."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }  # fmt: skip
    dist.record_collectives()
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    watchdog = Watchdog(4 / 60, launched=False)
    watchdog.start()
    watchdog.at(1, "micro-batch 1 of 2")
    torch.distributed.all_reduce(torch.ones(3))
    if rank == 0:
        watchdog.at(1, "updating the weights")
        with contextlib.suppress(RuntimeError):  # the other rank leaves first
            torch.distributed.all_reduce(torch.ones(2, 4))
    time.sleep(60)


@pytest.mark.job
def test_two_ranks_that_hang_name_what_each_waits_for(tmp_path: Path) -> None:
    port, files = free_port(), [tmp_path / "0", tmp_path / "1"]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                _rank(rank, port, files[rank])
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [1, 1]
    for file in files:
        told = file.read_text()
        assert "rank 1 on " in told and "is behind, at step 1 (micro-batch 1 of 2)" in told
        assert (
            "collectives: rank 0: all_reduce 2 (8 elements) is the last enqueued, all_reduce 1 (3 "
            "elements) is the last finished; rank 1: all_reduce 1 (3 elements) is the last "
            "enqueued and is finished"
        ) in told, told
