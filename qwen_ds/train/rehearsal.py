"""The largest micro-batch before the first step, and the words for a run that is out of memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from qwen_ds import dist
from qwen_ds.data.batches import StepSampler, make_batch
from qwen_ds.errors import OutOfMemory
from qwen_ds.page.html import count
from qwen_ds.plan.remedy import remedy
from qwen_ds.plan.run import Run
from qwen_ds.train.session import Session
from qwen_ds.train.setup import Data

log = logging.getLogger(__name__)

# Steps that are cut into micro-batches to find the largest: those whose rows make it likely.
STEPS_TRIED = 16
# In the errors of an allocator other than torch's own for GPUs: CUDA's, cuBLAS's, and the CPU's.
_SIGNS = ("out of memory", "cublas_status_alloc_failed", "can't allocate memory")


def rehearse(session: Session) -> None:
    """Run the largest micro-batch of the run forward and backward, as all will run (a collective).

    What a lack of memory would end hours later ends here. No number changes: the gradient is zero,
    and is added to that of the first step. AdamW's moments are made first, to be in the memory.

    Compiled code is made once for a single row and once for several rows, so the largest of the
    other kind runs, too.
    """
    with ExitStack() as at_an_error:
        at_an_error.push(session.observer)  # or its bar would stand before the error's line
        _rehearse(session)
        at_an_error.pop_all()


def _rehearse(session: Session) -> None:
    engine, watchdog = session.engine, session.saver.watchdog
    step = session.start[0]
    watchdog.at(step, "choosing the largest micro-batch")
    largest, other = largest_rows(session.data.sampler, step, session.steps)
    chosen = {"the largest micro-batch": largest}
    if session.recipe.model.compile and other is not None:
        kind = "several rows" if len(other) > 1 else "a single row"
        chosen[f"the largest micro-batch of {kind}"] = other
    engine.train(True)
    engine.state.make_moments()
    on_gpu = engine.device.type == "cuda"
    # All ranks, once: whoever lacks memory ends, and one that is not here yet would only see that.
    dist.barrier()
    with torch.random.fork_rng([engine.device] if on_gpu else []):
        for name, row_ids in chosen.items():
            width = session.data.sampler.width(row_ids)
            batch = make_batch(session.data.train, row_ids, width)
            rows, length = batch.ids_BT.shape
            size = f"{count(rows, 'row')} of {length} tokens"
            watchdog.at(step, f"trying {name}, {size}")
            loss = engine.loss_sum(batch.ids_BT, batch.labels_BT, batch.places_P)
            # All ranks. 0 times infinity is not 0: the step that has these rows names them.
            if dist.max_floats(float(not torch.isfinite(loss)))[0]:
                return
            # All ranks, under ZeRO-2 and 3: the average of the gradients, but of an adapter's.
            engine.backward(0.0 * loss, last_of_step=False)
            log.info("%s ran: %s", name, size)


def largest_rows(
    sampler: StepSampler, begun: int, steps: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows of the largest micro-batch after step `begun`, of any rank, in padded tokens; and of
    the largest of the other kind, with several rows or with one (or none, which runs as one). None:
    the steps looked at have none. Alike on every rank."""
    size = _expected_sizes(sampler, range(begun, steps))
    per_epoch = sampler.steps_per_epoch
    # The last step of an epoch may have few rows, and so a single one in a micro-batch.
    short = min(steps, (begun // per_epoch + 1) * per_epoch) - 1
    tried = sorted({short, *(np.argsort(-size, kind="stable")[:STEPS_TRIED] + begun).tolist()})
    plans = (sampler.plan(*divmod(step, per_epoch)) for step in tried)
    parts = [part for ranks in plans for of_rank in ranks for part in of_rank]
    largest = max(parts, key=sampler.size)
    others = (part for part in parts if (len(part) > 1) != (len(largest) > 1))
    return largest, max(others, key=sampler.size, default=None)


def _expected_sizes(sampler: StepSampler, steps: range) -> np.ndarray:
    """About the padded tokens of the largest micro-batch of each step: an even share of the tokens,
    if it holds the longest row."""
    sizes = []
    for step in steps:
        lens = sampler.padded_lens[sampler.step_rows(*divmod(step, sampler.steps_per_epoch))]
        tokens = int(lens.sum())
        parts = -(-tokens // (sampler.budget * sampler.world)) * sampler.world
        sizes.append(max(tokens / parts, int(lens.max())))
    return np.array(sizes)


@contextmanager
def memory_is_told(run: Run, data: Data, doing: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory into OutOfMemory, one line that says which settings fit; `doing` tells
    what the rank did."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        of = "GPU memory" if run.machine.on_gpu else "memory"
        what = f" (tried to allocate {asked[1]})" if asked else ""
        fits = remedy(run, *data.sizes)
        raise OutOfMemory(f"out of {of}{what} {doing()}; expected {fits}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found no memory, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error).lower() for sign in _SIGNS)
