"""The training loop: takes batches, dispatches device steps, and calls reporter, evaluation and checkpoints.

The host reports a step after it has dispatched the next, so that it makes batches while the device computes; on CPU, where it
waits for steps anyway, right after the step, so that each has its own time. All methods run in one thread; only `request_stop`
may interrupt, as a signal handler. A stop takes effect between two steps or two evaluation batches, with a checkpoint.
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
from pshare_jax.training.step.guide import Guide
from pshare_jax.training.step.mesh import shard_batch
from pshare_jax.training.step.objective import TrainableModule, init_trainable
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.steps import LossSteps, StepResult, TrainState, TrainSteps, train_steps

MakeBatches = Callable[[], Batches]
ModuleEvaluation = Callable[[TrainableModule, Params], Mapping[str, float]]
"""Further metrics at each evaluation, such as task accuracy: (module, trainable parameters) -> {"eval_...": value}."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run: state, steps, target tokens, whether it is complete, and the last evaluation."""

    state: TrainState
    step: int
    tokens: int
    finished: bool
    evaluation: Mapping[str, float]


@dataclass
class _Pending:
    """A dispatched step, with the metrics that the host knows."""

    result: StepResult
    step: int
    epoch: float
    samples: str
    input_tokens: int


def num_steps(config: TrainConfig, num_batches: int | None, done: int = 0) -> int:
    """Steps of a whole run after `done` steps with `num_batches` left (None: endless).

    The last step may have fewer batches than `accumulation`; so may the step after which a run was extended.
    """
    available = None if num_batches is None else done + -(-num_batches // config.accumulation)
    return min(count for count in (config.steps, available) if count is not None)


class Trainer:
    """A run from its start or its last checkpoint. `start` gives the parameters of a new run (None: those of
    `init_trainable`), `evaluation` makes one pass over the held-out data, if any, `guide` reads each batch before the module, if
    the objective needs it; `programs` None are those of the objective. The attribute `module` holds no unused weights: full
    fine-tuning drops the base.
    """

    def __init__(
        self,
        config: TrainConfig,
        module: TrainableModule,
        batches: Batches,
        checkpoints: Checkpoints,
        *,
        start: Callable[[], Params] | None = None,
        guide: Guide | None = None,
        programs: LossSteps | None = None,
        evaluation: MakeBatches | None = None,
        evaluate_module: ModuleEvaluation | None = None,
    ) -> None:
        """Raises PshareError if parameters are not finite, or the checkpoint has other data or another base."""
        self._config, self._batches, self._checkpoints = config, batches, checkpoints
        self._evaluation, self._evaluate_module, self._guide = evaluation, evaluate_module, guide
        self._progress = self._restored_progress(module)
        self.num_steps = num_steps(config, batches.num_batches(), self.step)
        rule = update_rule(config.optimizer, self.num_steps)
        self._steps: TrainSteps = train_steps(module.objective, rule, config.seed, programs)
        self._state = self._initial_state(module, start)
        self.module = module.without_base() if config.method == "full_ft" else module
        self._on_cpu = module.base.mesh.devices.flat[0].platform == "cpu"
        self._pending: _Pending | None = None
        self._stop = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self._progress.step

    def request_stop(self) -> None:
        """Ends the run after the current step or evaluation batch; may be called by a signal handler."""
        self._stop = True

    def run(self, reporter: Reporter) -> Outcome:
        """Trains to the last step or until a stop is requested.

        Raises:
            PshareError: too many consecutive steps were not finite, or the data loader failed.
        """
        self._reporter, self._clock = reporter, time.monotonic()
        while self.step < self.num_steps:
            if self._stop or not self._train_step():
                break
            if self.step < self.num_steps:
                self._between_steps()
        self._report_pending()
        # A run may be resumed with fewer steps than are done.
        evaluation = self._evaluate() if self.step >= self.num_steps else None
        self._save((evaluation or {}).get("eval_loss"))
        self._checkpoints.wait()
        return Outcome(self._state, self.step, self._progress.tokens, evaluation is not None, evaluation or {})

    # --- a step ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> bool:
        """One step; False if a stop interrupted the reading of its data."""
        try:
            window = self._window()
        except PshareError:
            # Ctrl-C also ends the loader's workers. The position in the data is still that of the last step.
            if self._stop:
                return False
            raise
        result = self._dispatch(window)
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
            _samples_hash(window),
            sum(_num_tokens(batch.arrays) for batch in window),
        )
        if not self._on_cpu:
            self._report_pending()
        self._pending = pending
        if self._on_cpu:
            self._report_pending()
        return True

    def _dispatch(self, window: list[Batch]) -> StepResult:
        """Dispatches a step and returns at once; on CPU, once the previous steps are complete."""
        sums = None if self._config.accumulation == 1 else self._steps.no_sums()
        for number, batch in enumerate(window, start=self.step * self._config.accumulation):
            self._wait_on_cpu(sums, self._state)
            arrays = self._on_device(batch)
            if self._guide is not None:
                self._wait_on_cpu(arrays)
            sums = self._steps.accumulate(sums, self._state.trainable, *self._fixed_params(), arrays, np.int32(number))
        assert sums is not None
        self._wait_on_cpu(sums)
        self._state, result = self._steps.apply(self._state, sums)
        return result

    def _wait_on_cpu(self, *arguments: Any) -> None:
        """On CPU, waits for a program's arguments: there XLA allocates temporaries at dispatch, so several dispatched
        programs would hold theirs at once. Other devices allocate when the program starts.
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
        """Waits for the pending step and reports it; ends the run after too many bad steps, or one that ruined the weights."""
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
                metrics={name: float(value) for name, value in result.metrics.items()},
            )
        )
        if not result.finite:
            raise PshareError(
                f"The run ends at step {pending.step}, whose update made weights that are not finite; lower "
                "optimizer.learning_rate, and --resume from the last checkpoint."
            )
        if int(result.bad) >= self._config.max_bad_steps:
            raise PshareError(
                f"The run ends at step {pending.step}: {int(result.bad)} consecutive steps were not finite "
                f"(max_bad_steps {self._config.max_bad_steps}); lower optimizer.learning_rate or set dtype: float32."
            )

    # --- between steps -----------------------------------------------------------------------------------------------

    def _between_steps(self) -> None:
        every = self._config.evaluation.every
        loss = None
        if every is not None and self.step % every == 0:
            loss = (self._evaluate() or {}).get("eval_loss")
        improved = loss is not None and self._config.checkpoint.keep_best and self._is_best(loss)
        if improved or self.step % self._config.checkpoint.every == 0:
            self._save(loss)

    def _is_best(self, loss: float) -> bool:
        best = self._checkpoints.best_loss
        return math.isfinite(loss) and (best is None or loss < best)

    def _evaluate(self) -> Mapping[str, float] | None:
        """Metrics on the held-out data; empty without such data, None if a stop interrupted the evaluation."""
        self._report_pending()
        if self._evaluation is None:
            return {}
        loss, tokens, correct, terms = 0.0, 0.0, 0.0, 0.0
        metrics = dict.fromkeys(self.module.objective.loss.metrics, 0.0)
        with self._evaluation() as batches:
            for batch in batches:
                if self._stop:
                    return None
                params = self._state.trainable, *self._fixed_params()
                value, tallies = self._steps.evaluate(*params, self._on_device(batch))
                loss += float(value)
                tokens += float(tallies.tokens)
                correct += float(tallies.correct)
                terms += float(tallies.terms)
                metrics = {name: total + float(tallies.metrics[name]) for name, total in metrics.items()}
        values = {"eval_loss": loss / terms, "eval_correct": correct / tokens}
        values |= {f"eval_{name}": total / terms for name, total in metrics.items()}
        if self._evaluate_module is not None:
            values |= self._evaluate_module(self.module, self._state.trainable)
        self._reporter.evaluation(self.step, values)
        self._clock = time.monotonic()
        return values

    def _save(self, eval_loss: float | None) -> None:
        self._report_pending()
        # A loss that is not finite could stay the best forever, and checkpoints hold finite numbers only.
        finite = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
        self._checkpoints.save(self._state, replace(self._progress, eval_loss=finite))

    # --- parts -------------------------------------------------------------------------------------------------------

    def _restored_progress(self, module: TrainableModule) -> Progress:
        """The progress of the last checkpoint, to which it also moves the data; else of a new run."""
        if not self._checkpoints.steps:
            return Progress(0, self._batches.get_state(), 0, module.base.fingerprint)
        progress = self._checkpoints.progress(self._checkpoints.steps[-1])
        if progress.base != module.base.fingerprint:
            raise PshareError(
                f"The base {self._config.base} has other weights than the run was started with; restore that base."
            )
        self._batches.set_state(progress.data)
        return progress

    def _initial_state(self, module: TrainableModule, start: Callable[[], Params] | None) -> TrainState:
        if self._checkpoints.steps:
            return self._checkpoints.restore(self.step, self._steps.state)
        state = self._steps.init(init_trainable(module, self._config.seed) if start is None else start())
        if not all(bool(jnp.isfinite(x).all()) for x in state.trainable.values()):
            source = self._config.module.init or self._config.base
            raise PshareError(f"{source} has weights that are not finite; start from others.")
        return state

    def _fixed_params(self) -> tuple[Params, Params]:
        return self.module.frozen, self.module.base_params

    def _on_device(self, batch: Batch) -> Any:
        return shard_batch(batch.arrays, self.module.base.mesh) if self._guide is None else self._guide(batch.arrays)

    def _epoch(self, batch: Batch) -> float:
        return round(batch.epoch + (batch.number + 1) / self._batches.epochs.num_batches(batch.epoch), 4)


def _samples_hash(window: list[Batch]) -> str:
    return hashlib.blake2b(repr([batch.samples for batch in window]).encode(), digest_size=8).hexdigest()


def _num_tokens(arrays: TwoStreamBatch | OneStreamBatch) -> int:
    if isinstance(arrays, TwoStreamBatch):
        return int((arrays.context_segments > 0).sum() + (arrays.decode_segments > 0).sum())
    return int((arrays.segments > 0).sum())
