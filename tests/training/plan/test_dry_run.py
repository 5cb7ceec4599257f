"""The dry run: sizes, tokens, memory and time of a run, from the base's config and tokenizer."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny_runs import FULL, LORA, make_base_and_data, run_config

import pshare_jax as ps
from pshare_jax.settings import to_yaml
from pshare_jax.share.model import read_outline
from pshare_jax.share.quantize import quantize
from pshare_jax.training.cli import main
from pshare_jax.training.config import EvaluationConfig, MeshConfig, TrainConfig
from pshare_jax.training.data.batches import TwoStreamBatch
from pshare_jax.training.data.config import DataConfig, RowsConfig
from pshare_jax.training.data.loader import training_batches
from pshare_jax.training.objective_config import ObjectiveConfig
from pshare_jax.training.plan import short_models
from pshare_jax.training.plan.memory import BatchShape, held_memory, step_shapes
from pshare_jax.training.plan.short_models import Pair, extrapolate
from pshare_jax.training.run import read_data
from pshare_jax.training.step.mesh import shard_batch, training_mesh
from pshare_jax.training.step.objective import init_trainable, trainable_module
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.steps import train_steps

LENGTHS = RowsConfig(rows=4, context_len=448, answer_len=64)
HELD = (
    "base weights",
    "trained weights in float32",
    "optimizer state, counters",
    "gradients",
    "batch",
)
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def base_and_data(tmp_path_factory):
    return make_base_and_data(tmp_path_factory.mktemp("base_and_data"), num_layers=1)


def without_weights(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def model_folder(tmp_path: Path, content: dict) -> Path:
    """A folder with config.json only."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def dry(config: TrainConfig, tmp_path: Path, capsys, *options: str) -> tuple[int, str, str]:
    """Exit status, the output after the config, and errors."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    status = main(["--config", str(tmp_path / "config.yaml"), "--dry-run", *options])
    printed = capsys.readouterr()
    assert printed.out.startswith(to_yaml(config))
    return status, printed.out.removeprefix(to_yaml(config)), printed.err


def mib(out: str, name: str) -> float:
    (found,) = re.findall(rf"^  {re.escape(name)} +([\d,.]+)", out, re.MULTILINE)
    return float(found.replace(",", ""))


def planned_config(base: Path, **changes) -> TrainConfig:
    """For a base without a tokenizer; the data file is not read."""
    config = run_config((base, "nowhere.jsonl"), Path("runs/none"))
    return replace(config, steps=100, data=replace(config.data, batch=LENGTHS), **changes)


def test_the_plan_is_what_a_run_does(base_and_data, tmp_path, capsys):
    base = without_weights(base_and_data[0], tmp_path / "base")
    config = run_config((base, base_and_data[1]), tmp_path / "run")
    # An existing run is neither an obstacle nor changed.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a run")
    status, out, _ = dry(config, tmp_path, capsys)
    assert status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "config.yaml", "run"}
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["a run"]
    outline = read_outline(base_and_data[0])
    assert outline.tokenizer is not None
    data = read_data(config, outline.tokenizer, outline.stop_ids, outline.config)
    with training_batches(data.train, config.data, config.layout) as batches:
        arrays = [batch.arrays for batch in batches if isinstance(batch.arrays, TwoStreamBatch)]
    read = sum(int((batch.context_segments > 0).sum() + (batch.decode_segments > 0).sum()) for batch in arrays)
    targets = sum(int(batch.weights.sum()) for batch in arrays)
    assert (
        f"a batch                           2 rows of 64 context and {arrays[0].targets.shape[1]} answer tokens\n"
        in out
    )
    assert f"the run                           {-(-len(arrays) // 2)} steps, about {read:,} tokens\n" in out
    assert f" batches, {read // 3:,} tokens, {targets // 3:,} of them targets\n" in out
    assert re.search(r"a step +[\d.e-]+ s: 2 x [\d.e-]+ s .* [\d.e-]+ s for the update", out)
    assert "on 1 x cpu, the whole model" in out
    held = sum(mib(out, name) for name in HELD)
    asked = max(mib(out, "in a batch"), mib(out, "in the update"))
    assert mib(out, "held between steps") == pytest.approx(held, abs=0.3)
    assert asked > 0
    # The table of the compiled step is the last with these rows.
    assert mib(out.rpartition("as compiled by XLA")[2], "peak") == pytest.approx(held + asked, abs=0.4)


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "eight"])
@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "int8"])
def test_held_bytes_are_those_of_the_real_arrays(base_and_data, tmp_path, kind, mesh, quantised):
    folder = base_and_data[0]
    if quantised:
        quantize(folder, tmp_path / "int8")
        folder = tmp_path / "int8"
    base = ps.load(folder, mesh=training_mesh(mesh))
    module = trainable_module(base, "prefillshare", kind, "float32")
    config = run_config(base_and_data, Path("none"))
    rule = update_rule(config.optimizer, 9)
    steps = train_steps(module.objective, rule, 0)
    state, sums = steps.init(init_trainable(module, 0)), steps.no_sums()
    batch = BatchShape("two_stream", 4, 32, 8)
    arrays = shard_batch(batch.arrays(base.config.vocab_size), base.mesh)

    def on_first_device(tree) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    held = held_memory(step_shapes(module.objective, rule.transform, batch, 2))
    assert tuple(held) == HELD
    trained = on_first_device(state.trainable)
    real = [
        on_first_device(base.params),
        trained,
        on_first_device(state) - trained,
        *map(on_first_device, (sums, arrays)),
    ]
    assert list(held.values()) == real
    single = BatchShape("one_stream", 2, 32, 40).arrays(320)
    assert single.weights.sum() == 2 * 32


@pytest.mark.parametrize(
    ("content", "parameters", "mesh"),
    [(QWEN3, 1_720_574_976, MeshConfig(fsdp=2)), (LLAMA3, 8_030_261_248, MeshConfig(data=16, fsdp=8, tensor=2))],
    ids=["qwen3", "llama3"],
)
def test_large_models_on_more_devices_than_available(content, parameters, mesh, tmp_path, capsys):
    base = model_folder(tmp_path, content)
    batch = replace(LENGTHS, rows=128)
    config = planned_config(base, module=FULL, mesh=mesh, dtype="bfloat16")
    config = replace(config, data=replace(config.data, batch=batch))
    status, out, _ = dry(config, tmp_path, capsys)
    assert status == 0
    assert f"parameters                        {parameters:,}\n" in out
    assert f"trained                           {parameters:,} (prefillshare, full)\n" in out
    assert re.search(rf"not measured +the mesh has {mesh.size} devices", out)
    # Only norms are replicated.
    share = parameters / (mesh.fsdp * mesh.tensor) / 2**20
    assert mib(out, "base weights") == pytest.approx(2 * share, rel=1e-3)
    assert mib(out, "trained weights in float32") == pytest.approx(4 * share, rel=1e-3)
    assert mib(out, "optimizer state, counters") == pytest.approx(8 * share, rel=1e-3)
    assert mib(out, "gradients") == pytest.approx(4 * share, rel=1e-3)
    # A layer's and the head's: an embedding that is not also the head stays in float32.
    tied, head = content.get("tie_word_embeddings", False), content["vocab_size"] * content["hidden_size"]
    in_layers = parameters - head * (1 if tied else 2)
    cast = 2 * (head + in_layers / content["num_hidden_layers"]) / (mesh.fsdp * mesh.tensor) / 2**20
    assert mib(out, "in a batch: trained weights in bfloat16") == pytest.approx(cast, rel=1e-3)
    rows = 128 // (mesh.data * mesh.fsdp)
    layers, hidden = content["num_hidden_layers"], content["hidden_size"]
    assert mib(out, "in a batch: layers' inputs") == pytest.approx(layers * rows * 64 * hidden * 2 / 2**20, abs=0.1)
    kv = 2 * layers * rows * 448 * 8 // mesh.tensor * 128 * 2
    assert mib(out, "in a batch: base's KV") == pytest.approx(kv / 2**20, abs=0.1)
    items = {
        name: float(size.replace(",", "")) for name, size in re.findall(r"^  ([\w' :,]+?) +([\d,]+\.\d)$", out, re.M)
    }
    assert len(items) == 12
    in_batch = sum(size for name, size in items.items() if name.startswith("in a batch"))
    held = sum(size for name, size in items.items() if not name.startswith("in "))
    assert mib(out, "peak") == pytest.approx(held + max(in_batch, items["in the update: the largest array"]), abs=1)
    # Tokens at all positions of 100 steps of two batches.
    assert f"100 steps, about {100 * 2 * 128 * 512:,} tokens" in out


def test_a_model_that_does_not_fit_is_not_timed(base_and_data, tmp_path, capsys, monkeypatch):
    """The short model is compiled for its memory and not run."""
    monkeypatch.setattr("pshare_jax.training.plan.dry_run.free_memory", lambda: 0)
    base = without_weights(base_and_data[0], tmp_path / "base")
    status, out, _ = dry(run_config((base, base_and_data[1]), tmp_path / "run"), tmp_path, capsys)
    assert status == 0
    assert re.search(r"not measured +1 of its layers need 0\.0 GiB", out)


def test_memory_is_linear_in_the_number_of_layers(base_and_data, tmp_path, monkeypatch):
    """XLA's memory for 4 layers is the extrapolation from 2 and 3 layers."""
    assert extrapolate({2: 10.0, 6: 30.0}, 30) == 150.0
    assert extrapolate({2: 7.0}, 2) == 7.0
    base, _ = make_base_and_data(tmp_path, num_layers=4, records=2)
    config = run_config((base, "none"), tmp_path / "run")
    loaded = ps.load(base, mesh=training_mesh(MeshConfig()))
    objective = trainable_module(loaded, "prefillshare", LORA, "float32").objective
    batch = BatchShape("two_stream", 2, 64, 16)
    monkeypatch.setattr(short_models, "NUM_LAYERS", (2, 3))
    models = short_models.short_models(objective, config, batch)
    assert list(models) == [2, 3]
    asked = {number: model.temporaries().accumulate for number, model in models.items()}
    whole = short_models.ShortModel(objective, 4, config, batch).temporaries()
    assert extrapolate(asked, 4) == pytest.approx(whole.accumulate, rel=0.05)
    assert asked[3] > asked[2] > 0
    monkeypatch.setattr(short_models, "RUNS", 1)
    assert isinstance(models[2].seconds(), Pair)


def test_only_the_input_of_a_layer_is_kept(tmp_path):
    """Of a further layer, its input and, where gradients are summed over batches, its gradient."""
    base, _ = make_base_and_data(tmp_path, num_layers=11, records=2)
    config = run_config((base, "none"), tmp_path / "run")
    loaded = ps.load(base, mesh=training_mesh(MeshConfig()))
    objective = trainable_module(loaded, "full_ft", FULL, "float32").objective
    batch = BatchShape("one_stream", 4, 128, 16)
    few, whole = (short_models.ShortModel(objective, number, config, batch).temporaries() for number in (2, 11))
    layer_input = 4 * 128 * loaded.config.hidden_size * 4
    layer_gradient = 4 * sum(
        math.prod(x.shape) for path, x in objective.base.shapes.items() if path.startswith("layers.0.")
    )
    assert whole.accumulate - few.accumulate <= 9 * (layer_input + layer_gradient)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"data": DataConfig([], batch=LENGTHS)}, ["data.sources"]),
        ({"mesh": MeshConfig(tensor=3)}, ["3", "32"]),
        ({"data": None}, ["tokenizer", "data.batch.context_len", "data.batch.answer_len"]),
    ],
)
def test_wrong_configs_are_refused(changes, facts, tmp_path, capsys):
    base = model_folder(tmp_path, {**LLAMA3, "num_hidden_layers": 1})
    config = planned_config(base, evaluation=EvaluationConfig())
    if "data" in changes and changes["data"] is None:
        changes = {"data": replace(config.data, batch=RowsConfig(rows=4, context_len=448))}
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(replace(config, **changes)))
    assert main(["--config", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert all(fact in error for fact in facts)


def test_a_dry_run_cannot_resume(base_and_data, tmp_path, capsys):
    config = run_config(base_and_data, tmp_path / "run")
    status, out, error = dry(config, tmp_path, capsys, "--resume")
    assert (status, out) == (2, "")
    assert "--resume" in error


@pytest.mark.parametrize(
    ("objective", "method", "kind", "second"),
    [
        (ObjectiveConfig("distillation", "a fine-tune"), "prefillshare", LORA, True),
        (ObjectiveConfig("distillation", "a fine-tune", top_k=4), "full_ft", FULL, True),
        (ObjectiveConfig("dpo"), "prefillshare", FULL, False),
    ],
    ids=["distillation", "best", "dpo"],
)
def test_the_plan_counts_the_second_model(base_and_data, tmp_path, capsys, objective, method, kind, second):
    """Not one that is the base, which is there already. Its program is compiled and timed, too."""
    base = without_weights(base_and_data[0], tmp_path / "base")
    for file in base.glob("tokenizer*"):
        file.unlink()
    config = planned_config(base, objective=objective, method=method, module=kind)
    source = replace(config.data.sources[0], shape="preference" if objective.name == "dpo" else None)
    status, out, error = dry(replace(config, data=replace(config.data, sources=[source])), tmp_path, capsys)
    assert (status, error) == (0, "")
    assert f"objective                         {objective.name}\n" in out
    assert ("second model's weights" in out) is second
    if second:
        parameters = float(re.findall(r"^  parameters +([\d,]+)", out, re.MULTILINE)[0].replace(",", ""))
        assert mib(out, "second model's weights") == pytest.approx(4 * parameters / 2**20, abs=0.1)
    assert re.search(r"a step +[\d.e-]+ s: 2 x [\d.e-]+ s .* [\d.e-]+ s for the update", out)
