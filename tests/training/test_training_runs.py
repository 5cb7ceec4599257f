"""Whole runs on tiny models: a resumed run equals an uninterrupted run; signals, checkpoints, run folders."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import edit_json, tiny_folder
from tiny_runs import (
    LORA,
    all_metrics,
    assert_same_steps,
    exported_alone,
    killed,
    make_base_and_data,
    metrics,
    moments,
    run_config,
    stop_after,
)
from training_data import chat, write_jsonl

import pshare_jax.text.chat_template as chat_template_module
import pshare_jax.training.result as result_module
import pshare_jax.training.run as run_module
import pshare_jax.training.run_folder as run_folder_module
import pshare_jax.training.trainer as trainer_module
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.tasks import open_task
from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.share.decode_module import read_manifest
from pshare_jax.share.model import load
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.cli import main
from pshare_jax.training.config import CheckpointConfig, EvaluationConfig, MeshConfig, TrainConfig
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.loader import evaluation_batches
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.run import train
from pshare_jax.training.run_folder import RunFolder, claim, locked
from pshare_jax.training.trainer import num_steps


@pytest.fixture(scope="module")
def base_and_data(tmp_path_factory):
    return make_base_and_data(tmp_path_factory.mktemp("base_and_data"), num_layers=1)


@pytest.fixture(scope="module")
def straight(base_and_data, tmp_path_factory):
    """An uninterrupted run: its config, outcome and steps. Never written to."""
    config = run_config(base_and_data, tmp_path_factory.mktemp("straight") / "run", module=replace(LORA, dropout=0.1))
    _, outcome = train(config)
    return config, outcome, metrics(config.output)


def with_workers(config: TrainConfig, count: int) -> TrainConfig:
    return replace(config, data=replace(config.data, num_workers=count))


def same_state(ours, theirs) -> None:
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-7)


def test_a_run_and_its_folder(straight):
    config, outcome, steps = straight
    run = Path(config.output)
    assert outcome.finished
    assert [line["step"] for line in steps] == list(range(1, outcome.step + 1))
    # Premise of the tests below: three epochs of seven batches, two per step. So the first epoch ends within a step, and the
    # last step has one batch.
    assert [line["epoch"] for line in steps] == pytest.approx([*np.arange(2, 21, 2) / 7, 3], abs=1e-4)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) == {
        *("step", "loss", "tokens", "input_tokens", "correct", "grad_norm", "learning_rate", "seconds"),
        *("tokens_per_second", "epoch", "applied", "bad_steps", "samples"),
    }
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "data_report.txt", "metrics.jsonl", "tensorboard", "checkpoints", "loss.png", "module"),
        ".lock",
    }
    stored = load_settings(TrainConfig, run / "config.yaml")
    assert stored.data.time is not None
    assert replace(stored, data=replace(stored.data, clock=None)) == config
    assert read_manifest(run / "module").training["clock"] == stored.data.clock
    assert "19 of 19 records used" in (run / "data_report.txt").read_text()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    evaluated = [line for line in all_metrics(run) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [*range(3, outcome.step, 3), outcome.step]
    assert outcome.tokens == sum(line["tokens"] for line in steps)


def test_tensorboard_reads_the_events(straight):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    messages: Any = event_pb2

    (file,) = (Path(straight[0].output) / "tensorboard").glob("events.*")
    data, found = file.read_bytes(), []
    while data:
        # TFRecord: length, its checksum, content, its checksum.
        length = int.from_bytes(data[:8], "little")
        content = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(content)
        event = messages.Event.FromString(content)
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "train/loss"]
        data = data[16 + length :]
    assert [step for step, _ in found] == [line["step"] for line in straight[2]]
    np.testing.assert_allclose([loss for _, loss in found], [line["loss"] for line in straight[2]], rtol=1e-6)


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_run(straight, tmp_path, monkeypatch, capsys):
    config, expected, lines = straight
    config = replace(config, output=str(tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    # JAX has already started.
    monkeypatch.setattr(run_module, "prepare_jax", lambda config: None)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for step in (1, 5):
            with monkeypatch.context() as patch:
                stop_after(patch, step)
                assert main(["--config", str(tmp_path / "config.yaml"), *(["--resume"] if step > 1 else [])]) == 0
            # The signal may arrive while the next step is pending, which is completed first.
            printed = capsys.readouterr().out
            assert any(f"stopped after step {at} of 11" in printed for at in (step, step + 1))
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
            assert not (tmp_path / "run" / "module").exists()
    finally:
        signal.signal(signal.SIGTERM, handler)
    _, outcome = train(config, resume=True)
    assert outcome.finished
    assert_same_steps(metrics(config.output), lines)
    same_state(outcome.state, expected.state)
    assert outcome.tokens == expected.tokens
    assert outcome.evaluation == pytest.approx(expected.evaluation, rel=1e-6)


def test_a_template_with_a_date_does_not_break_a_resume(tmp_path, monkeypatch):
    """The run goes on the next day with the prompts of its start."""
    base, data = make_base_and_data(tmp_path, num_layers=1)
    template = f"{{{{ strftime_now('%d %b %Y') }}}}{Tokenizer.from_folder(base).chat_template}"
    (base / "chat_template.jinja").write_text(template)
    edit_json(base / "tokenizer_config.json", chat_template=None)
    config = run_config((base, data), tmp_path / "run")

    def on_day(day: int):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime(2026, 1, day, 12)

        for module in (run_folder_module, chat_template_module):
            monkeypatch.setattr(module, "datetime", Clock)

    on_day(1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        _, outcome = train(config)
    assert not outcome.finished
    on_day(2)
    _, outcome = train(config, resume=True)
    assert outcome.finished
    assert read_manifest(Path(config.output) / "module").training["clock"] == "2026-01-01T12:00:00"
    with pytest.raises(PshareError, match=r"data\.clock"):
        train(replace(config, data=replace(config.data, clock="2026-01-02T12:00:00")), resume=True)


class Endless:
    """Held-out data with a stop after the first batch, which must end the evaluation."""

    def __init__(self, batches):
        self._batches = batches

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._batches.close()

    def __iter__(self):
        batch = next(self._batches)
        yield batch
        os.kill(os.getpid(), signal.SIGTERM)
        yield batch
        raise AssertionError("the evaluation continued")


def test_a_stop_ends_an_evaluation_and_the_step_is_saved(straight, tmp_path, monkeypatch):
    """In the middle of a run, at a step with a regular checkpoint, and at its end, before the module is written."""
    config, expected, lines = straight
    config = replace(config, output=str(tmp_path / "run"), checkpoint=CheckpointConfig(every=3))
    for step, resume in ((3, False), (expected.step, True)):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "evaluation_batches", lambda *args: Endless(evaluation_batches(*args)))
            _, outcome = train(replace(config, evaluation=EvaluationConfig(None if resume else 3)), resume=resume)
        assert (outcome.step, outcome.finished, outcome.evaluation) == (step, False, {})
        with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
            assert checkpoints.steps[-1] == step
            assert checkpoints.progress(step).eval_loss is None
    assert all_metrics(config.output) == metrics(config.output)
    assert not (tmp_path / "run" / "module").exists()
    assert_same_steps(metrics(config.output), lines)


def test_a_stop_while_the_result_is_written(straight, tmp_path, monkeypatch):
    """The result is completed: exit status 0 means a complete result or a run that can be resumed."""
    config = replace(straight[0], output=str(tmp_path / "run"))
    shutil.copytree(straight[0].output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "module")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(run_module, "prepare_jax", lambda config: None)
    save = result_module.save_module

    def save_and_stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args, **kwargs)

    monkeypatch.setattr(result_module, "save_module", save_and_stop)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--config", str(tmp_path / "config.yaml"), "--resume"]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert read_manifest(tmp_path / "run" / "module").kind == "lora"


def test_an_extended_run_uses_every_batch(straight, tmp_path):
    """The last step had one batch instead of two; it is unchanged, and all batches of the new epoch are used."""
    config, expected, _ = straight
    shutil.copytree(config.output, tmp_path / "run")
    longer = replace(config, output=str(tmp_path / "run"), data=replace(config.data, epochs=4))
    _, outcome = train(longer, resume=True)
    assert outcome.tokens * 3 == expected.tokens * 4
    assert metrics(tmp_path / "run")[-1]["epoch"] == 4


def test_kill_9_during_or_after_a_save(straight, tmp_path):
    """pshare-train is killed at a random step and resumed here with another number of workers; it equals the uninterrupted
    run, across an epoch's end within a step, with packed rows and dropout.
    """
    config, expected, lines = straight
    draw = np.random.default_rng()
    step, in_save, workers = int(draw.choice([4, 6, 8])), bool(draw.integers(2)), int(draw.choice([0, 2]))
    print(f"{step=}, {in_save=}, {workers=}")
    config = replace(config, output=str(tmp_path / "run"))
    died = killed(with_workers(config, workers), tmp_path, step, in_save)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        # The kill usually interrupts this save; the previous save is complete, since orbax saves sequentially.
        assert step - 2 <= checkpoints.steps[-1] <= step
    _, outcome = train(with_workers(config, 2 - workers), resume=True)
    assert_same_steps(metrics(config.output), lines)
    same_state(outcome.state, expected.state)


def test_a_partial_checkpoint_is_ignored(straight, tmp_path):
    config, _, lines = straight
    shutil.copytree(config.output, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    config = replace(config, output=str(tmp_path / "run"))
    last = max(int(path.name) for path in folder.iterdir())
    # As after a kill: orbax's temporary folder with some of its files, and an incomplete last line of the metrics.
    half = folder / f"{last + 1}.orbax-checkpoint-tmp"
    shutil.copytree(folder / str(last), half)
    shutil.rmtree(half / "optimizer")
    shutil.rmtree(folder / str(last))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps
        assert max(checkpoints.steps) < last
    _, outcome = train(config, resume=True)
    assert outcome.step == last
    assert_same_steps(metrics(config.output), lines)
    assert not half.exists()


def test_a_run_without_a_checkpoint_starts_again(straight, tmp_path):
    config, _, lines = straight
    shutil.copytree(config.output, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    train(replace(config, output=str(tmp_path / "run")), resume=True)
    assert_same_steps(metrics(tmp_path / "run"), lines)


@pytest.mark.parametrize("steps", [None, 2])
def test_resuming_a_finished_run_only_writes_the_module(straight, tmp_path, steps):
    """Also with fewer steps than are done."""
    config, expected, lines = straight
    config = replace(config, steps=steps)
    shutil.copytree(straight[0].output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "module")
    config = replace(config, output=str(tmp_path / "run"))
    _, outcome = train(config, resume=True)
    assert outcome.finished
    assert metrics(config.output) == lines
    assert outcome.evaluation == pytest.approx(expected.evaluation)
    assert (tmp_path / "run" / "module" / "decode_module.json").is_file()


def test_a_run_resumes_on_another_mesh(straight, tmp_path):
    config, expected, lines = straight
    shutil.copytree(config.output, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    last = max(int(path.name) for path in folder.iterdir())
    shutil.rmtree(folder / str(last))
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    _, outcome = train(replace(config, output=str(tmp_path / "run"), mesh=mesh), resume=True)
    ours = metrics(tmp_path / "run")
    assert [line["samples"] for line in ours] == [line["samples"] for line in lines]
    # Sums over devices have another order.
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in lines], rtol=1e-5)
    for path, array in expected.state.trainable.items():
        np.testing.assert_allclose(
            np.asarray(outcome.state.trainable[path]), np.asarray(array), atol=1e-5, err_msg=path
        )
    # A of q is sharded over fsdp, A of down over tensor.
    for path, parts in (
        ("layers.0:1:1.attention.q.lora_a", 2),
        ("layers.0:1:1.mlp.down.lora_a", 2),
        ("layers.0:1:1.mlp.down.lora_b", 2),
    ):
        array = outcome.state.trainable[path]
        moment = moments(outcome.state).mu[path]
        for x in (array, moment):
            assert len(x.sharding.device_set) == 4
            assert x.addressable_shards[0].data.size * parts == x.size, path
    assert read_manifest(tmp_path / "run" / "module").kind == "lora"
    # Four devices saved the last checkpoint; a process with one device exports it (A5-14).
    alone = exported_alone(tmp_path / "run", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    name = "adapter_model.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "run" / "module" / name).read_bytes()


def test_the_best_checkpoint_is_kept(base_and_data, tmp_path, monkeypatch):
    """With the lowest held-out loss set at step 2, its checkpoint is kept. A loss that is not finite is never the best."""
    losses = iter([float("nan"), 1.0, 2.0, float("nan"), float("inf")])
    evaluated = trainer_module.Trainer._evaluate
    monkeypatch.setattr(
        trainer_module.Trainer, "_evaluate", lambda self: {**(evaluated(self) or {}), "eval_loss": next(losses)}
    )
    config = run_config(
        base_and_data,
        tmp_path / "run",
        steps=5,
        accumulation=1,
        checkpoint=CheckpointConfig(every=100, keep=1),
        evaluation=EvaluationConfig(every=1),
    )
    train(config)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps == [2, 5]
        assert (checkpoints.best, checkpoints.best_loss) == (2, 1.0)
        assert checkpoints.progress(5).eval_loss is None


def test_a_folder_with_another_run_is_refused(straight, tmp_path):
    config = straight[0]
    with pytest.raises(PshareError, match=r"--resume"):
        train(config)
    with pytest.raises(PshareError, match=r" optimizer\.learning_rate;"):
        train(replace(config, optimizer=replace(config.optimizer, learning_rate=1.0)), resume=True)
    shutil.copytree(config.output, tmp_path / "run")
    config = replace(config, output=str(tmp_path / "run"))
    content = json.loads(Path(config.data.sources[0].path).read_text().splitlines()[0])
    other = tmp_path / "other.jsonl"
    other.write_text(Path(config.data.sources[0].path).read_text() + json.dumps(content) + "\n")
    saved = (tmp_path / "run" / "config.yaml").read_text().replace(config.data.sources[0].path, str(other))
    (tmp_path / "run" / "config.yaml").write_text(saved)
    with pytest.raises(PshareError, match="samples"):
        train(replace(load_settings(TrainConfig, tmp_path / "run" / "config.yaml"), output=config.output), resume=True)


def test_an_early_failure_leaves_the_folder_unused(base_and_data, tmp_path):
    config = run_config(base_and_data, tmp_path / "run")
    broken = replace(config, data=DataConfig([replace(config.data.sources[0], path=str(tmp_path / "none.jsonl"))]))
    with pytest.raises(PshareError, match=r"evaluation|none\.jsonl"):
        train(replace(broken, evaluation=EvaluationConfig()))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not claim(config, resume=False)[0].config.exists()


def test_one_process_at_a_time(straight):
    config, _, lines = straight
    with locked(RunFolder(Path(config.output))), pytest.raises(PshareError, match="Another process"):
        train(config, resume=True)
    assert metrics(config.output) == lines


def test_on_a_cpu_a_program_waits_for_its_arguments(base_and_data, tmp_path, monkeypatch):
    """There XLA allocates temporaries at dispatch, so two dispatched programs would hold theirs at once."""
    waited, ready = [], []
    wait, make_steps = jax.block_until_ready, trainer_module.train_steps

    def recorded(values):
        waited.extend(jax.tree.leaves(values))
        return wait(values)

    def checked(program):
        def call(*values):
            known = set(map(id, waited))
            ready.append(all(id(leaf) in known for leaf in jax.tree.leaves(values[:2])))
            return program(*values)

        return call

    def checked_steps(*arguments):
        steps = make_steps(*arguments)
        return replace(steps, accumulate=checked(steps.accumulate), apply=checked(steps.apply))

    monkeypatch.setattr(jax, "block_until_ready", recorded)
    monkeypatch.setattr(trainer_module, "train_steps", checked_steps)
    train(run_config(base_and_data, tmp_path / "run", steps=2, evaluation=EvaluationConfig()))
    # Two batches and an update, twice.
    assert ready == [True] * 6


def test_each_step_is_reported_with_its_own_time(base_and_data, tmp_path, monkeypatch):
    make_steps = trainer_module.train_steps

    def slow_steps(*arguments):
        steps = make_steps(*arguments)

        def accumulate(*values):
            time.sleep(0.05)
            return steps.accumulate(*values)

        return replace(steps, accumulate=accumulate)

    monkeypatch.setattr(trainer_module, "train_steps", slow_steps)
    config = run_config(base_and_data, tmp_path / "run", steps=3, evaluation=EvaluationConfig())
    train(config)
    lines = metrics(config.output)
    # Two batches a step.
    assert [line["seconds"] >= 0.1 for line in lines] == [True] * 3
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["input_tokens"] / line["seconds"])


@pytest.mark.parametrize(
    ("steps", "batches", "accumulation", "expected"),
    [(None, 5, 2, 3), (2, 5, 2, 2), (9, 5, 1, 5), (7, None, 4, 7), (None, 4, 4, 1)],
)
def test_the_number_of_steps(base_and_data, tmp_path, steps, batches, accumulation, expected):
    config = run_config(base_and_data, tmp_path, steps=steps, accumulation=accumulation)
    assert num_steps(config, batches) == expected
    assert num_steps(replace(config, steps=None), 3, done=7) == 7 + -(-3 // accumulation)


@pytest.mark.parametrize("form", ["chat", "text"])
def test_tokens_without_an_embedding_are_counted(tmp_path, form):
    """For an added token without a row in the embedding XLA would read the last row."""
    size = Tokenizer.from_folder(tiny_folder("llama", tmp_path / "other", num_hidden_layers=1)).vocab_size
    base = tiny_folder("llama", tmp_path / "base", num_hidden_layers=1, vocab_size=size)
    content = json.loads((base / "tokenizer.json").read_text())
    new = {"id": size, "content": "<new>", "special": False}
    new |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit_json(base / "tokenizer.json", added_tokens=[*content["added_tokens"], new])
    answers = ["good", "a <new> one", "good again"]
    lines = [
        {"prompt": "q", "completion": text} if form == "text" else {"messages": chat("q", text)} for text in answers
    ]
    config = DataConfig([SourceConfig(write_jsonl(tmp_path / "a.jsonl", lines))], format=form)
    tok = Tokenizer.from_folder(base)
    found = prepare(config, tok, tok.eos_ids, vocab_size=size)
    assert [sample.line for sample in found.train.store] == [1, 3]
    (reason,) = found.report.sources[0].dropped.values()
    assert reason.lines == [2]
    assert all(fact in reason.detail for fact in (str(size), "'<new>'", f"0 to {size - 1}"))
    assert len(prepare(config, tok, tok.eos_ids, vocab_size=size + 1).train) == 3
    # Runs and evaluations pass the vocabulary size.
    with open_task(str(tmp_path / "a.jsonl"), load(base)) as task:
        assert [item.expected for item in task.items] == [answers[0], answers[2]]
    only = DataConfig([SourceConfig(write_jsonl(tmp_path / "b.jsonl", lines[1:2]))], format=form)
    with pytest.raises(PshareError, match=r"1 records .*<new>"):
        train(TrainConfig(str(base), only, str(tmp_path / "run")))
