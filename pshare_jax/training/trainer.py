"""The loop: batches in, steps on the device, reports, evaluations and checkpoints out.

The host runs one step ahead of what it reports, so that it makes the next batch while the device computes (on CPU too, but
there a step is given out only when the one before is done: `Trainer._settle`). A stop (a signal)
takes effect between two steps or two batches of an evaluation: everything is saved and the run can go on later.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params
from pshare_jax.training.checkpoint import Checkpoints, Progress
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.batches import OneStreamBatch, TwoStreamBatch
from pshare_jax.training.data.epochs import Batch
from pshare_jax.training.data.loader import Batches
from pshare_jax.training.progress import Reporter, StepReport
from pshare_jax.training.step.mesh import put_batch
from pshare_jax.training.step.objective import Trainee, first_values
from pshare_jax.training.step.optimizer import make_optimizer, make_schedule
from pshare_jax.training.step.steps import StepResult, TrainState, TrainSteps, train_steps

MakeBatches = Callable[[], Batches]
ModuleEvaluation = Callable[[Trainee, Params], Mapping[str, float]]
"""More to measure of the module at each evaluation, such as task accuracy: (trainee, trained parameters) -> name -> value,
names starting with eval_."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the state, steps done, whether they and the last evaluation are all, and what that one gave."""

    state: TrainState
    step: int
    tokens: int
    finished: bool
    evaluation: Mapping[str, float]


@dataclass
class _Pending:
    """A step on its way through the device, and what is known of it already."""

    result: StepResult
    step: int
    epoch: float
    samples: str
    input_tokens: int


def num_steps(config: TrainConfig, num_batches: int | None, done: int = 0) -> int:
    """Steps of a whole run that has done `done` and has `num_batches` left (None: endless).

    The last one may have fewer batches than `accumulation`; so may one of those done, where a run goes on that was at its
    end before its data were made more.
    """
    available = None if num_batches is None else done + -(-num_batches // config.accumulation)
    return min(count for count in (config.steps, available) if count is not None)


class Trainer:
    """One run, from its start or from the last checkpoint. `evaluation` makes one pass over the held-out data, if there are
    any. Its own `trainee` holds no weights that are not read any more: full fine-tuning lets the base go.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainee: Trainee,
        batches: Batches,
        checkpoints: Checkpoints,
        *,
        evaluation: MakeBatches | None = None,
        evaluate_module: ModuleEvaluation | None = None,
    ) -> None:
        """Raises PshareError if the parameters are not finite, or a checkpoint does not fit the data or the base."""
        self._config, self._batches, self._checkpoints = config, batches, checkpoints
        self._evaluation, self._evaluate_module = evaluation, evaluate_module
        self._progress = self._reached(trainee)
        self.num_steps = num_steps(config, batches.num_batches(), self.step)
        optimizer = make_optimizer(config.optimizer, self.num_steps)
        schedule = make_schedule(config.optimizer, self.num_steps)
        self._steps: TrainSteps = train_steps(trainee.objective, optimizer, schedule, config.seed)
        self._state = self._start(trainee)
        self.trainee = trainee.without_base() if config.method == "full_ft" else trainee
        self._on_cpu = trainee.base.mesh.devices.flat[0].platform == "cpu"
        self._pending: _Pending | None = None
        self._stop = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self._progress.step

    def request_stop(self) -> None:
        """Ends the run after the step that is being computed, or in an evaluation; may be called by a signal handler."""
        self._stop = True

    def run(self, reporter: Reporter) -> Outcome:
        """Trains to the last step, or until a stop is asked for.

        Raises:
            PshareError: too many steps in a row were not finite, or the data loader failed.
        """
        self._reporter, self._clock = reporter, time.monotonic()
        while self.step < self.num_steps:
            if self._stop or not self._train_step():
                break
            if self.step < self.num_steps:
                self._between_steps()
        self._report_pending()
        # Resumed with fewer steps than were done, a run has nothing left to do.
        evaluation = self._evaluated() if self.step >= self.num_steps else None
        self._save((evaluation or {}).get("eval_loss"))
        self._checkpoints.wait()
        return Outcome(self._state, self.step, self._progress.tokens, evaluation is not None, evaluation or {})

    # --- a step ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> bool:
        """One step; False where a stop broke into the reading of its data."""
        try:
            window = self._window()
        except PshareError:
            # Ctrl-C also ends the loader's workers. The place in the data is still that of the last step.
            if self._stop:
                return False
            raise
        result = self._computed(window)
        targets = sum(int(batch.arrays.weights.sum()) for batch in window)
        self._progress = replace(
            self._progress,
            step=self.step + 1,
            data=self._batches.get_state(),
            tokens=self._progress.tokens + targets,
            eval_loss=None,
        )
        pending = _Pending(
            result,
            self.step,
            self._epoch(window[-1]),
            _named(window),
            sum(_num_tokens(batch.arrays) for batch in window),
        )
        self._report_pending()
        self._pending = pending
        return True

    def _computed(self, window: list[Batch]) -> StepResult:
        """Gives a step to the device and returns at once; on CPU, when the steps before it are done."""
        sums = None if self._config.accumulation == 1 else self._steps.no_sums()
        for number, batch in enumerate(window, start=self.step * self._config.accumulation):
            self._settle(sums, self._state)
            sums = self._steps.accumulate(
                sums, self._state.trainable, *self._fixed(), self._put(batch), np.int32(number)
            )
        assert sums is not None
        self._settle(sums)
        self._state, result = self._steps.apply(self._state, sums)
        return result

    def _settle(self, *arguments: Any) -> None:
        """On CPU, waits for what a program is to be given: XLA takes its temporaries there when it is dispatched, so programs
        on their way would all have theirs at once. Other devices take them when the program's turn comes.
        """
        if self._on_cpu:
            jax.block_until_ready(arguments)

    def _window(self) -> list[Batch]:
        window = []
        while len(window) < self._config.accumulation:
            batch = next(self._batches, None)
            if batch is None:
                break
            window.append(batch)
        assert window, "the data ended before the last step"
        return window

    def _report_pending(self) -> None:
        """Waits for the step on its way and tells it; ends the run after too many bad ones."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        result = jax.device_get(pending.result)
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        tokens = int(result.tokens)
        self._reporter.step(
            StepReport(
                step=pending.step,
                loss=float(result.loss),
                tokens=tokens,
                input_tokens=pending.input_tokens,
                correct=float(result.correct) / max(1, tokens),
                grad_norm=float(result.grad_norm),
                learning_rate=float(result.learning_rate),
                seconds=seconds,
                tokens_per_second=pending.input_tokens / seconds,
                epoch=pending.epoch,
                applied=bool(result.applied),
                bad_steps=int(result.all_bad),
                samples=pending.samples,
            )
        )
        if int(result.bad) >= self._config.max_bad_steps:
            raise PshareError(
                f"The loss or gradient of {int(result.bad)} steps in a row, up to step {pending.step}, was not finite, so "
                "the run ends (max_bad_steps); try a lower optimizer.learning_rate or dtype: float32."
            )

    # --- between steps -----------------------------------------------------------------------------------------------

    def _between_steps(self) -> None:
        every = self._config.evaluation.every
        loss = None
        if every is not None and self.step % every == 0:
            loss = (self._evaluated() or {}).get("eval_loss")
        improved = loss is not None and self._config.checkpoint.keep_best and self._is_best(loss)
        if improved or self.step % self._config.checkpoint.every == 0:
            self._save(loss)

    def _is_best(self, loss: float) -> bool:
        best = self._checkpoints.best_loss
        return math.isfinite(loss) and (best is None or loss < best)

    def _evaluated(self) -> Mapping[str, float] | None:
        """The module as it is, on the held-out data; nothing where there are none, None if a stop broke into it."""
        self._report_pending()
        if self._evaluation is None:
            return {}
        nll, tokens, correct = 0.0, 0.0, 0.0
        with self._evaluation() as batches:
            for batch in batches:
                if self._stop:
                    return None
                value, tallies = self._steps.evaluate(self._state.trainable, *self._fixed(), self._put(batch))
                nll, tokens, correct = (
                    nll + float(value),
                    tokens + float(tallies.tokens),
                    correct + float(tallies.correct),
                )
        values = {"eval_loss": nll / tokens, "eval_correct": correct / tokens}
        if self._evaluate_module is not None:
            values |= self._evaluate_module(self.trainee, self._state.trainable)
        self._reporter.evaluation(self.step, values)
        self._clock = time.monotonic()
        return values

    def _save(self, eval_loss: float | None) -> None:
        self._report_pending()
        # A checkpoint holds nothing that is not finite, and such a loss would be the best one for good.
        known = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
        self._checkpoints.save(self._state, replace(self._progress, eval_loss=known))

    # --- parts -------------------------------------------------------------------------------------------------------

    def _reached(self, trainee: Trainee) -> Progress:
        """Where the run is; the data go there, too."""
        if not self._checkpoints.steps:
            return Progress(0, self._batches.get_state(), 0, trainee.base.fingerprint)
        progress = self._checkpoints.progress(self._checkpoints.steps[-1])
        if progress.base != trainee.base.fingerprint:
            raise PshareError(
                f"The base {self._config.base} is not the one that the run began with: its weights differ."
            )
        self._batches.set_state(progress.data)
        return progress

    def _start(self, trainee: Trainee) -> TrainState:
        if self._checkpoints.steps:
            return self._checkpoints.restore(self.step, self._steps.state)
        state = self._steps.init(first_values(trainee, self._config.seed))
        if not all(bool(jnp.isfinite(x).all()) for x in state.trainable.values()):
            raise PshareError(f"The weights of the base {self._config.base} have values that are not finite.")
        return state

    def _fixed(self) -> tuple[Params, Params]:
        return self.trainee.frozen, self.trainee.base.params

    def _put(self, batch: Batch) -> Any:
        return put_batch(batch.arrays, self.trainee.base.mesh)

    def _epoch(self, batch: Batch) -> float:
        return round(batch.epoch + (batch.number + 1) / self._batches.epochs.num_batches(batch.epoch), 4)


def _named(window: list[Batch]) -> str:
    return hashlib.blake2b(repr([batch.samples for batch in window]).encode(), digest_size=8).hexdigest()


def _num_tokens(arrays: TwoStreamBatch | OneStreamBatch) -> int:
    if isinstance(arrays, TwoStreamBatch):
        return int((arrays.context_segments > 0).sum() + (arrays.decode_segments > 0).sum())
    return int((arrays.segments > 0).sum())
