"""A run from config to decode module: loads the base, prepares the data, trains, writes the result.

Called by the command line, in the main thread: it installs signal handlers.
"""

import functools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console

from pshare_jax.compilation_cache import cache_folder, keep_programs
from pshare_jax.errors import PshareError
from pshare_jax.mesh import virtual_cpu_devices
from pshare_jax.model.config import ModelConfig
from pshare_jax.share.model import load
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training import run_folder
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.loader import Batches, evaluation_batches, training_batches
from pshare_jax.training.data.prepare import PreparedData, prepare
from pshare_jax.training.guide import load_guide, loss_of
from pshare_jax.training.progress import Reporter, draw_loss
from pshare_jax.training.result import save_result, training_info
from pshare_jax.training.run_folder import RunFolder
from pshare_jax.training.start import initial_params
from pshare_jax.training.step.mesh import training_mesh
from pshare_jax.training.step.objective import StackedBase, decode_module, module_on, stacked_base
from pshare_jax.training.step.static import Objective
from pshare_jax.training.step.steps import LossSteps, loss_steps
from pshare_jax.training.trackers import Tracker, check_tracker
from pshare_jax.training.trainer import MakeBatches, ModuleEvaluation, Outcome, Trainer


def prepare_jax(config: TrainConfig) -> None:
    """Sets virtual CPU devices for the mesh and the compilation cache; must run before JAX starts."""
    virtual_cpu_devices(config.mesh.size)
    keep_programs(cache_folder())
    # Orbax and grain log tracebacks of errors that they also raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


class Session:
    """What runs of one process share (`keep`): the base in stacks, and compiled programs. One run keeps nothing, so that full
    fine-tuning can free the base.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._base: StackedBase | None = None
        self._programs: dict[tuple[Objective, int], LossSteps] = {}

    def base(self, config: TrainConfig, say: Callable[[str], None]) -> StackedBase:
        """The base of `config`, whose mesh and dtype are those of the session's first run."""
        if self._base is not None:
            return self._base
        say(f"opening and loading the base {config.base}")
        dtype = None if config.dtype == "auto" else config.dtype
        model = load(config.base, dtype=dtype, mesh=training_mesh(config.mesh))
        base = stacked_base(model, model.architecture.dtype, take=True)
        self._base = base if self._keep else None
        return base

    def programs(self, objective: Objective, seed: int) -> LossSteps:
        """The programs of losses and gradients."""
        if not self._keep:
            return loss_steps(objective, seed)
        if (objective, seed) not in self._programs:
            self._programs[objective, seed] = loss_steps(objective, seed)
        return self._programs[objective, seed]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    evaluate_module: ModuleEvaluation | None = None,
    session: Session | None = None,
) -> tuple[RunFolder, Outcome]:
    """Trains by `config`, or with `resume` continues the run, and writes the decode module if the run is complete.

    SIGTERM and SIGINT stop it with a checkpoint, after the current step or within an evaluation; a result that is being
    written is completed. `evaluate_module` adds metrics to each evaluation; runs of a `session` share the base.

    Raises:
        PshareError: an error in config, base, data or run folder.
    """
    check_tracker(config)
    run, config = run_folder.claim(config, resume)
    with run_folder.locked(run):
        return run, _train_in(run, config, evaluate_module, session or Session())


def _train_in(
    run: RunFolder, config: TrainConfig, evaluate_module: ModuleEvaluation | None, session: Session
) -> Outcome:
    started = time.monotonic()
    console = Console()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - started:5.1f} s] {line}", markup=False, highlight=False, soft_wrap=True)

    stacked = session.base(config, say)
    base = stacked.model
    say("reading the data")
    data = read_data(config, base.tokenizer, base.stop_ids, base.config)
    say(f"data:\n{data.report}")
    trained = module_on(stacked, config.method, config.module, remat=config.remat, loss=loss_of(config.objective))
    del stacked
    with (
        training_batches(data.train, config.data, config.layout) as batches,
        Checkpoints(run.checkpoints, config.checkpoint) as checkpoints,
    ):
        trainer = Trainer(
            config,
            trained,
            batches,
            checkpoints,
            start=functools.partial(initial_params, config, trained),
            guide=load_guide(config, trained),
            programs=session.programs(trained.objective, config.seed),
            evaluation=_held_out(config, data),
            evaluate_module=evaluate_module,
        )
        # Full fine-tuning does not read the base's weights again, so no reference to them may remain.
        trained = trainer.module
        run_folder.start(run, config, f"{data.report}\n", trainer.step)
        for line in _plan(config, trainer, batches):
            say(line)
        # Until after the result: a signal must not interrupt its writing.
        with _stopped_by_signals(trainer):
            tracker = Tracker(config, run.root, say)
            with Reporter(run, trainer.num_steps, trainer.step, console, tracker) as reporter:
                outcome = trainer.run(reporter)
            draw_loss(run.metrics, run.loss_figure)
            if outcome.finished:
                info = training_info(
                    config, outcome.step, int(outcome.state.applied), outcome.tokens, outcome.evaluation
                )
                save_result(run.module, decode_module(trained.objective, outcome.state.trainable), base, config, info)
                say(f"the decode module is in {run.module}")
            else:
                say(f"stopped after step {outcome.step} of {trainer.num_steps}; continue with --resume")
    return outcome


def read_data(config: TrainConfig, tokenizer: Tokenizer, stop_ids: frozenset[int], model: ModelConfig) -> PreparedData:
    """The training and evaluation samples of a run.

    Raises:
        PshareError: an error in the data.
    """
    # The server refuses sequences beyond the model's context, so they are not trained on either.
    data_config = replace(config.data, max_len=min(config.data.max_len, model.max_len))
    data = prepare(data_config, tokenizer, stop_ids, config.layout, model.vocab_size, config.module.style, config.pairs)
    if config.evaluation.every is not None and not len(data.evaluation):
        raise PshareError(
            "evaluation.every needs an evaluation sample, but none is left; raise data.max_len or add data."
        )
    return data


def _held_out(config: TrainConfig, data: PreparedData) -> MakeBatches | None:
    if not len(data.evaluation):
        return None
    return lambda: evaluation_batches(data.evaluation, config.data, config.layout)


def _plan(config: TrainConfig, trainer: Trainer, batches: Batches) -> Iterator[str]:
    base = trainer.module.base
    where = f"{base.mesh.size} {base.mesh.devices.flat[0].platform} devices in {base.architecture.dtype}"
    steps = f"steps {trainer.step + 1} to {trainer.num_steps}"
    yield f"training ({config.method}, {config.module.kind}, {config.objective.name}) on {where}: {steps}"
    yield f"{batches.epochs.fill():.0%} of the positions in a batch hold tokens"
    if config.steps is not None and trainer.num_steps < config.steps:
        yield f"the data end after {trainer.num_steps} of {config.steps} steps; data.epochs: null repeats them"


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and SIGINT ask the trainer to stop; a second Ctrl-C ends the process at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: object) -> None:
        trainer.request_stop()
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
