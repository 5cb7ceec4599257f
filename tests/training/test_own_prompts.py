"""A base without a chat template: a module's own template, or text prompt, is one in training, evaluation and serving."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from fake_server import answering
from tiny import edit_json
from tiny_runs import FULL, LORA, make_base_and_data, run_config
from training_data import chat, write_jsonl

import pshare_jax as ps
from pshare_jax.engine.config import BatchConfig, KVConfig, placed
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.evaluate import evaluate
from pshare_jax.evaluation.tasks import gym_item, open_task
from pshare_jax.server import startup
from pshare_jax.server.config import ServeConfig
from pshare_jax.share.decode_module import load_module, read_manifest
from pshare_jax.text.chat_style import TEMPLATES
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.config import EvaluationConfig
from pshare_jax.training.data.config import RowsConfig
from pshare_jax.training.run import read_data, train
from pshare_jax.training.run_folder import RunFolder, claim

END = "<|eom_id|>"
"""A control token that does not end generation with the base."""
OWN = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
QUESTION, ANSWER = "1+1?", "two"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base without a template, a module of each style, and their configs; the template's file has gone since."""
    root = tmp_path_factory.mktemp("world")
    base, _ = make_base_and_data(root, num_layers=1)
    edit_json(base / "tokenizer_config.json", chat_template=None)
    data = write_jsonl(root / "a.jsonl", [{"messages": chat(QUESTION, ANSWER)}] * 4)
    (root / "own.jinja").write_text(OWN)
    modules = {
        "plain": dataclasses.replace(LORA, chat_template="plain"),
        "file": dataclasses.replace(FULL, chat_template=str(root / "own.jinja")),
        "text": dataclasses.replace(LORA, text_prompt="Q: {prompt}\n"),
    }
    configs = {}
    for name, module in modules.items():
        config = run_config((base, data), root / name, module=module, steps=1, evaluation=EvaluationConfig())
        data_config = dataclasses.replace(config.data, eval_fraction=0.0, batch=RowsConfig(rows=4))
        configs[name] = dataclasses.replace(config, data=data_config)
        train(configs[name])
    (root / "own.jinja").unlink()
    return base, configs


@pytest.fixture(scope="module")
def server(world):
    base, configs = world
    tasks = {name: f"{config.output}/module" for name, config in configs.items()}
    config = ServeConfig(
        base=str(base),
        tasks={"base": "base", **tasks},
        placement=placed([[0]], [[1]]),
        kv=KVConfig(page_size=4, pages=64),
        batch=BatchConfig(prefill_tokens=16, decode_rows=2),
    )
    served, _ = startup.build(config, lambda line: None)
    served.engine.start()
    with answering(served) as (client, _):
        yield served, client


def trained(config) -> tuple[list[int], list[int]]:
    """Prompt and answer of the run's first sample, as its folder describes it."""
    base = ps.load(config.base)
    run = RunFolder(Path(config.output)).read_config()
    sample = read_data(run, base.tokenizer, base.stop_ids, base.config).train.store[0]
    [(start, end)] = sample.turns
    return list(sample.ids[:start]), list(sample.ids[start:end])


def asked(served, client, monkeypatch, path, **body):
    """The engine's request for a call."""
    made, submit = [], served.engine.submit_all
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "submit_all", lambda new, takers: made.extend(new) or submit(new, takers))
        response = client.post(path, json={"max_tokens": 2, **body})
    assert response.status_code == 200, response.text
    return made[0]


@pytest.mark.parametrize("name", ["plain", "file"])
def test_a_served_module_answers_chats_with_its_template(world, server, monkeypatch, name):
    base, configs = world
    served, client = server
    prompt, answer = trained(configs[name])
    source = TEMPLATES["plain"] if name == "plain" else OWN
    assert read_manifest(Path(configs[name].output) / "module").style.template == source
    request = asked(served, client, monkeypatch, "/v1/chat/completions", model=name, messages=chat(QUESTION))
    assert list(request.prompt) == prompt
    tokenizer = Tokenizer.from_folder(base)
    assert tokenizer.decode(answer[:-1]) == ANSWER
    # What ends an answer in training ends it in serving, and only for this module.
    assert answer[-1] in request.stop_ids
    base_request = asked(served, client, monkeypatch, "/v1/completions", model="base", prompt=QUESTION)
    assert (answer[-1] in base_request.stop_ids) is (name == "plain")
    tokens = client.post("/tokenize", json={"model": name, "messages": chat(QUESTION)}).json()["tokens"]
    assert tokens == prompt
    refused = client.post("/v1/chat/completions", json={"model": "base", "messages": chat(QUESTION)})
    assert refused.status_code == 400
    assert "no chat template" in refused.json()["error"]["message"]


def test_a_text_module_is_asked_with_its_pattern(world, server, monkeypatch):
    """The pattern is in the model's card; the request's ids are those of training."""
    _, configs = world
    served, client = server
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert {name for name, card in cards.items() if "text_prompt" in card} == {"text"}
    text = cards["text"]["text_prompt"].replace("{prompt}", QUESTION)
    assert text == f"Q: {QUESTION}\n"
    request = asked(served, client, monkeypatch, "/v1/completions", model="text", prompt=text)
    prompt, answer = trained(configs["text"])
    assert list(request.prompt) == prompt
    assert answer[-1] in request.stop_ids


@pytest.mark.parametrize("name", ["plain", "file", "text"])
def test_an_evaluation_asks_in_the_style_of_the_module(world, name):
    _, configs = world
    base = ps.load(configs[name].base)
    module = load_module(Path(configs[name].output) / "module", base)
    prompt, _ = trained(configs[name])
    entry = {"question": QUESTION, "answer": ANSWER}
    assert list(gym_item("t", 0, entry, base.tokenizer, module.style).prompt_ids) == prompt
    (path,) = {source.path for source in configs[name].data.sources}
    with open_task(path, base, module.style) as task:
        assert [list(item.prompt_ids) for item in task.items] == [prompt] * 4
        result = evaluate(base, {"m": module}, task.items[:1], task.verifier, max_new_tokens=3)
    assert len(result["m"].answers) == 1


def test_a_full_module_is_a_checkpoint_with_its_template(world):
    """For programs that do not know the manifest."""
    _, configs = world
    module = ps.load(Path(configs["file"].output) / "module")
    assert module.tokenizer.chat_template == OWN
    prompt, answer = trained(configs["file"])
    assert module.tokenizer.encode_chat(chat(QUESTION)) == prompt
    assert answer[-1] in module.stop_ids


def test_a_resumed_run_keeps_its_template(world, tmp_path):
    """The file has gone or changed: the run's folder has its text."""
    _, configs = world
    config = configs["file"]
    with pytest.raises(PshareError, match=r"module\.chat_template must be .* No such file"):
        claim(config, resume=True)
    (tmp_path / "own.jinja").write_text(OWN)
    module = dataclasses.replace(config.module, chat_template=str(tmp_path / "own.jinja"))
    _, found = claim(dataclasses.replace(config, module=module), resume=True)
    assert found.module.chat_template == OWN
    (tmp_path / "own.jinja").write_text(OWN + "x")
    with pytest.raises(PshareError, match=r"another module\.chat_template"):
        claim(dataclasses.replace(config, module=module), resume=True)


@pytest.mark.parametrize("name", ["plain", "text"])
def test_such_a_module_does_not_depend_on_the_bases_template(world, name):
    """The base may get one later."""
    base, configs = world
    model = ps.load(base)
    later = dataclasses.replace(model, tokenizer=model.tokenizer.with_template(TEMPLATES["chatml"]))
    module = load_module(Path(configs[name].output) / "module", later)
    assert module.style == load_module(Path(configs[name].output) / "module", model).style


@pytest.mark.parametrize(
    ("template", "words"),
    [("{% for %}", "manifest .* not valid Jinja"), (TEMPLATES["chatml"], "does not fit this base.*no control token")],
)
def test_a_template_that_cannot_be_served_is_refused_when_it_is_loaded(world, tmp_path, template, words):
    base, configs = world
    folder = tmp_path / "module"
    shutil.copytree(Path(configs["plain"].output) / "module", folder)
    edit_json(folder / "decode_module.json", template=template)
    with pytest.raises(PshareError, match=rf"^[^\n]*{words}"):
        load_module(folder, ps.load(base))


@pytest.mark.parametrize(
    ("module", "data", "words"),
    [
        ({}, {"format": "chat"}, "set module.chat_template"),
        ({"text_prompt": "{prompt}"}, {"format": "chat"}, "exclude each other"),
        ({"chat_template": "plain"}, {"format": "text"}, "exclude each other"),
        ({"chat_template": "chatml"}, {}, "no control token of this base"),
    ],
)
def test_settings_that_do_not_go_together(world, module, data, words):
    _, configs = world
    config = configs["plain"]
    changed = dataclasses.replace(
        config,
        module=dataclasses.replace(LORA, **module),
        data=dataclasses.replace(config.data, **data),
    )
    base = ps.load(config.base)
    with pytest.raises(PshareError, match=words):
        read_data(changed, base.tokenizer, base.stop_ids, base.config)
