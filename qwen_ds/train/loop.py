"""The training loop: one iteration per optimizer step, every collective visible.

Shapes: B rows of a micro-batch, T its longest row.
"""

from __future__ import annotations

import torch

from qwen_ds import dist
from qwen_ds.data.ahead import Window, WindowsAhead
from qwen_ds.train.garbage import HeldCollection
from qwen_ds.train.not_finite import NotFinite, bad_rows, raise_not_finite, stop_not_finite
from qwen_ds.train.observe.evaluation import BestLoss
from qwen_ds.train.observe.metrics import Step
from qwen_ds.train.observe.summary import RunSummary
from qwen_ds.train.schedule import dropout_seed, lr_at
from qwen_ds.train.session import Session
from qwen_ds.train.survive.stop import StopRequest


def train(session: Session) -> RunSummary:
    """Run the steps that are left; write metrics, checkpoints and the result into the run folder.

    Raises UserError if the loss or the gradient is not finite (the weights of the last good step
    are saved) or the disk does not take the result; OSError if the run was asked to stop, and its
    state could not be saved.
    """
    recipe, engine, saver, steps = session.recipe, session.engine, session.saver, session.steps
    observer, patience = session.observer, recipe.eval.patience
    begun, best, evaluated = session.start
    windows = WindowsAhead(session.data.sampler, steps, pinned=engine.device.type == "cuda")
    request = StopRequest(dist.job_ends_at(), recipe.save.before_minutes)
    engine.train(True)
    with observer, windows, request, HeldCollection() as garbage:
        # All ranks, once a run, however often it resumes.
        if begun == 0 and not observer.progress.has_token_losses:
            observer.progress.measured(session.token_losses(engine, "start", 0))
        # All ranks, once: the run had stopped before an evaluation that was due.
        if not evaluated:
            best, stop_because = evaluate(session, begun, best, request)
            if best.step == begun:
                saver.add_model(engine, begun)
            if stop_because:  # again: the checkpoint of this step is as it should be
                return stopped(session, stop_because)
            evaluated = True

        for number in range(begun + 1, steps + 1):  # one optimizer step
            if best.out_of_patience(patience):
                break
            observer.begin_step(number)
            observer.at(number, "reading the batch")
            with observer.part("data"):
                window = windows.take(number - 1)
            try:
                step, stop_because = train_step(session, number, window, request)
            except NotFinite as error:
                # All ranks, once: they save the weights of the last good step, and end.
                state = session.state(number - 1, best, evaluated=evaluated)
                stop_not_finite(error, engine, saver, state)
            observer.end_step(step)
            if number == steps:  # nothing is left to stop
                stop_because = None

            # All ranks, every eval.every_steps. A run that is asked to stop has little time: it
            # saves first, and makes up for the evaluation when it resumes.
            due = session.evaluates_after(number)
            if due and stop_because is None:
                best, stop_because = evaluate(session, number, best, request)
            evaluated = not due or stop_because is None

            # All ranks, every save.every_steps, after the best evaluation so far, and at the end:
            # they give their state. For LoRA rank 0 then writes it while the training continues.
            last = number == steps or best.out_of_patience(patience)
            on_time = number % recipe.save.every_steps == 0
            saves = bool(stop_because) or last or on_time or best.step == number
            if saves:
                observer.at(number, "saving")
                state = session.state(number, best, evaluated=evaluated)
                saver.save(engine, state, stopping=bool(stop_because))
            if stop_because:
                return stopped(session, stop_because)
            garbage.after_step(number, quiet=due or saves)
        return finished(session, best)


def train_step(
    session: Session, number: int, window: Window, request: StopRequest
) -> tuple[Step, str | None]:
    """Optimizer step `number` (1-based) over all its micro-batches, and why to stop after it.

    A step without a target token leaves the weights alone: its loss and norm are 0. NotFinite is
    raised on every rank, with the rows that are to blame.
    """
    engine, rows, rank = session.engine, session.data.train, dist.rank()
    at, part = session.observer.at, session.observer.part
    lr = lr_at(number - 1, session.steps, session.recipe.optim)
    engine.set_lr(lr)
    loss = grad_norm = 0.0
    if window.targets:
        loss_sums = []
        for i, batch in enumerate(window.batches):
            at(number, f"micro-batch {i + 1} of {len(window.batches)}")
            torch.manual_seed(dropout_seed(session.recipe.seed, number - 1, rank, i))
            # All ranks under ZeRO-3, in each micro-batch: they gather the weights layer by layer.
            with part("forward"):
                loss_sum = engine.loss_sum(batch.ids_BT, batch.labels_BT, batch.places_P)
            # All ranks, in the step's last micro-batch, under ZeRO-2 and 3 in each: the average of
            # the gradients. Answers differ in length, so a mean of the ranks' means would let a
            # rank with few target tokens weigh as much as one with many: the sum is divided by the
            # whole step's token count, and DeepSpeed's average is cancelled by the world size.
            # Without it test_gradient_does_not_depend_on_the_split fails.
            with part("backward"):
                scale, last = dist.world_size() / window.targets, i + 1 == len(window.batches)
                engine.backward(loss_sum * scale, last_of_step=last)
            loss_sums.append(loss_sum.detach())

        at(number, "updating the weights")
        # All ranks, once a step, before the gradient can reach the weights: all stop, or none. All
        # that the CPU has to know is read here at once: each look makes it wait for the GPU. With
        # it goes a request to stop: launchers signal the ranks seconds apart, or only some.
        with part("optimizer"):
            totals = engine.totals(loss_sums, request.noted())
        if totals.bad:
            bad = bad_rows(window.batches, loss_sums, rows, engine)
            raise_not_finite(number, "loss is not finite, in", bad, rows)
        # All ranks under ZeRO, once a step: the updated weights.
        with part("optimizer"):
            result = engine.step(totals.grad_norm)
        if result.not_finite:  # on every rank alike
            of_step = [row for batch in window.batches for row in batch.row_ids]
            raise_not_finite(number, f"{result.not_finite} is not finite, among", of_step, rows)
        loss, grad_norm, stop_because = totals.loss, result.grad_norm, request.reason(totals.noted)
    else:
        stop_because = request.agreed()  # all ranks, in a step without a target token
    epoch = (number - 1) // session.data.sampler.steps_per_epoch
    step = Step(
        number, epoch, loss, window.targets, lr, grad_norm, engine.overflows, window.statistics
    )
    return step, stop_because


def evaluate(
    session: Session, step: int, best: BestLoss, request: StopRequest
) -> tuple[BestLoss, str | None]:
    """Loss and sampled answers after `step` (a collective): the best loss since then, and why it
    was given up, if the run is asked to stop. Nothing is left to stop after the last step."""
    evaluator, progress = session.evaluator, session.observer.progress
    assert evaluator is not None
    stop_because: str | None = None

    def asked_to_stop() -> bool:
        nonlocal stop_because
        stop_because = request.agreed() if step < session.steps else None
        return stop_because is not None

    loss = evaluator.loss(session.engine, step, asked_to_stop)
    if loss is None:
        return best, stop_because
    progress.evaluated(step, loss)
    progress.sampled(step, evaluator.samples(session.engine, step))
    return best.after(loss, step), None


def finished(session: Session, best: BestLoss) -> RunSummary:
    """The summary of a run whose steps are done, once its result is on the disk (a collective)."""
    saver, observer = session.saver, session.observer
    # All ranks, once: until the last save is on the disk, then for a few rows, then to gather the
    # result.
    saver.wait()
    observer.progress.flush()
    step = observer.progress.summary().steps
    observer.progress.measured(session.token_losses(session.engine, "end", step))
    observer.at(session.steps, "writing the result")
    saver.output.save_final(session.engine, saver.watchdog)
    summary = observer.progress.summary()
    summary.out_of_patience = best.out_of_patience(session.recipe.eval.patience)
    return summary


def stopped(session: Session, why: str) -> RunSummary:
    """The summary of a run that was asked to stop, once its state is on the disk (a collective)."""
    summary = session.observer.progress.summary()
    summary.stopped_by = why
    if not session.saver.wait(seconds_to_compare=0.0):
        raise OSError(f"stopped by {why}, and step {summary.steps} could not be saved")
    return summary
