"""The notebook runs from top to bottom on the real SmolLM2, and its output agrees with its text."""

import base64
import io
import os
import re
import shutil
from pathlib import Path

import jax
import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "factorize.ipynb"


@pytest.fixture(scope="module")
def cells(smollm2_gguf, tmp_path_factory):
    """The code cells of an executed copy, by id. The model is downloaded before, so that only the run is timed."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(shutil.copy(NOTEBOOK, folder), as_version=4)
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"])}
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def number(pattern, text):
    match = re.search(pattern, text)
    assert match, f"no {pattern} in: {text}"
    return float(match[1].replace(",", ""))


def test_committed_without_results():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_every_cell_runs_without_error_or_warning(cells):
    for cell in cells.values():
        assert cell.execution_count is not None
        assert all(output.output_type != "error" for output in cell.outputs)
        errors = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        assert not any("Warning" in text for text in errors)


def test_kv_is_made_on_one_device_and_read_on_another(cells):
    text = printed(cells["prefill"])
    made, moved = re.search(r"made on +(.+)", text), re.search(r"moved to +(.+)", text)
    assert made
    assert moved
    assert made[1] != moved[1]
    # 30 layers, keys and values, 3 kv heads of 64 float32 numbers.
    assert number(r"KV of one token: ([\d,]+) bytes", printed(cells["memory"])) == 30 * 2 * 3 * 64 * 4


def test_flax_shows_the_split_with_every_array_of_the_base_once(cells):
    text, loaded = printed(cells["flax"]), number(r"(\d+) weight arrays", printed(cells["load"]))
    # One projection of each of the 30 MLPs.
    assert (number(r"(\d+) arrays", text), number(r"(\d+) of them", text)) == (loaded + 30, 30)
    assert any("treescope" in output.get("data", {}).get("text/html", "") for output in cells["flax"].outputs)


def test_two_modules_give_two_answers_from_one_kv(cells):
    text = printed(cells["answers"])
    base, noisy = re.search(r"base: (.+)", text), re.search(r"noisy: (.+)", text)
    assert base
    assert noisy
    assert base[1] != noisy[1]
    assert "shared KV unchanged: True" in text
    mean, largest = (number(rf"{word} ([\d.]+)", printed(cells["distributions"])) for word in ("mean", "largest"))
    assert 0.01 < mean < largest <= 1


@pytest.mark.parametrize("name", ["figure", "top5"])
def test_figures_are_drawn(cells, name):
    images = [output.data["image/png"] for output in cells[name].outputs if "image/png" in output.get("data", {})]
    assert len(images) == 1
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(images[0])))
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 600
    assert pixels.std() > 0.05


def test_partial_prefill_equals_prefilling_everything(cells):
    text = printed(cells["grow"])
    assert number(r"= (\d+);", text) == number(r"at once: (\d+)", text)
    assert number(r"difference of the two KV: (\S+)", text) < 3e-4
