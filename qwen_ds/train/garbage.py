"""Python's cyclic garbage collector, kept out of the training steps."""

from __future__ import annotations

import gc

# Cycles that hold tensors must not pile up between two evaluations or saves that lie far apart.
STEPS_BETWEEN_COLLECTIONS = 100


class HeldCollection:
    """Garbage collection at quiet points, on all ranks at the same step, never within a step.

    By itself the collector runs when a rank has made enough objects: in the middle of a step, on
    each rank at another moment, and the others wait for that rank in the next collective. Objects
    that exist at the start (modules, torch, DeepSpeed) are frozen, since they stay for the whole
    run: walking them took 0.23 s, and a collection without them 0.4 ms. On runs of small models the
    gain is lost in the noise.
    """

    def __enter__(self) -> HeldCollection:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def after_step(self, number: int, *, quiet: bool) -> None:
        """Collect after step `number` if the loop pauses there anyway (`quiet`), or it is time."""
        if quiet or number % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect()

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        gc.enable()
