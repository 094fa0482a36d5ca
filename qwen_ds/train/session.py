"""Everything that the training loop works with, in one carrier."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ds.plan.run import Run
from qwen_ds.recipe.options import Recipe
from qwen_ds.train.engine.engine import TrainingEngine
from qwen_ds.train.observe.evaluation import BestLoss, Evaluator
from qwen_ds.train.observe.observer import Observer
from qwen_ds.train.observe.opening import open_progress
from qwen_ds.train.observe.profiler import StepProfiler
from qwen_ds.train.observe.token_losses import TokenLosses
from qwen_ds.train.schedule import lr_at, total_steps
from qwen_ds.train.setup import Data, Model
from qwen_ds.train.survive import resume
from qwen_ds.train.survive.checkpoint import Checkpoint
from qwen_ds.train.survive.checkpoint_writer import RunState, Saver
from qwen_ds.train.survive.identity import WholeFiles
from qwen_ds.train.survive.result import Output
from qwen_ds.train.survive.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Session:
    """One run, ready for its first or next step."""

    recipe: Recipe
    data: Data
    engine: TrainingEngine
    saver: Saver
    observer: Observer
    token_losses: TokenLosses
    evaluator: Evaluator | None  # None without evaluation data
    steps: int  # of the whole run

    @property
    def start(self) -> tuple[int, BestLoss, bool]:
        """Steps behind the run as it begins or resumes, best loss, and whether it is evaluated."""
        if self.saver.resumed is None:
            return 0, BestLoss(), True
        saved = self.saver.resumed.state
        return saved["step"], BestLoss(**saved["best"]), saved.get("evaluated", True)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after optimizer step `step` (1-based)."""
        every = self.recipe.eval.every_steps or self.data.sampler.steps_per_epoch
        due = step > 0 and (step % every == 0 or step == self.steps)
        return due and self.evaluator is not None

    def state(self, step: int, best: BestLoss, *, evaluated: bool) -> RunState:
        """The state after `step` optimizer steps, weights and moments excepted."""
        optim, steps = self.recipe.optim, self.steps
        schedule = {"name": optim.schedule, "steps": steps, "next_lr": lr_at(step, steps, optim)}
        per_epoch = self.data.sampler.steps_per_epoch
        return RunState(step, per_epoch, self.observer.progress.state(), schedule, best, evaluated)


def open_session(
    run: Run,
    data: Data,
    model: Model,
    watchdog: Watchdog,
    found: Checkpoint | None,
    whole: WholeFiles | None,
) -> Session:
    """Start DeepSpeed, restore the checkpoint `found`, open the metrics files (a collective)."""
    engine = TrainingEngine(model.training, run.recipe.optim, run.deepspeed)
    identity = resume.identity(run.recipe, run.deepspeed.stored_json(), data.sha256)
    output = Output(run.folder, run.base_folder, run.dtype, model.adapter_config)
    keep = run.recipe.save.keep
    assert keep is not None  # resolve() has set it
    saver = Saver(output, identity, keep, watchdog, found, whole)
    if found:
        resume.restore(engine, found)
    return assemble(run, data, engine, saver)


def assemble(run: Run, data: Data, engine: TrainingEngine, saver: Saver) -> Session:
    """Put a session around an engine that stands where the run begins or resumes."""
    recipe, folder = run.recipe, saver.output.folder
    steps = total_steps(recipe.optim, data.sampler.steps_per_epoch)
    saved = saver.resumed.state["progress"] if saver.resumed else None
    progress = open_progress(run, data, engine, steps, saved)
    profiler = StepProfiler(recipe.log.profile_steps, folder / "profile", engine.device)
    evaluator = None
    if data.eval is not None:
        evaluator = Evaluator(data.eval, run.base, recipe, data.sampler.budget, saver.watchdog)
    observer = Observer(saver.watchdog, profiler, progress)
    encoding = run.base.encoding
    assert encoding is not None
    rows, count = data.eval or data.train, recipe.log.token_losses_rows
    token_losses = TokenLosses(rows, count, encoding, saver.watchdog)
    return Session(recipe, data, engine, saver, observer, token_losses, evaluator, steps)
