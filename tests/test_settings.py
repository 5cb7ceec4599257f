"""Settings: what a config file may contain, and the errors for everything else."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings, to_yaml

pytestmark = pytest.mark.host


@dataclass(frozen=True)
class Part:
    size: int
    names: Literal["all"] | list[str] = "all"


@dataclass(frozen=True)
class Inner:
    host: str = "here"
    rate: float = 0.5
    on: bool = False


@dataclass(frozen=True)
class Outer:
    base: str
    tasks: dict[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    maybe: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    by_name: dict[str, Inner] = field(default_factory=dict)
    pair: tuple[int, ...] = ()


def load(tmp_path, text, *overrides):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(Outer, path, overrides)


def test_defaults_nesting_and_types(tmp_path):
    text = "base: m\nparts: [{size: 1}, {size: 2, names: [a, b]}]\ninner: {rate: 2}\npair: [1, 2]\n"
    settings = load(tmp_path, text)
    assert settings.parts == [Part(1), Part(2, ["a", "b"])]
    assert settings.inner == Inner(rate=2.0)
    assert type(settings.inner.rate) is float
    assert settings.pair == (1, 2)


def test_yaml_1_2_core_schema(tmp_path):
    settings = load(tmp_path, "base: no\ninner: {rate: 1e-4, host: 12:30}\ntasks: {on: 2020-01-01, a: 010}\n")
    assert settings.base == "no"
    assert settings.inner.rate == 1e-4
    assert settings.inner.host == "12:30"
    assert settings.tasks == {"on": "2020-01-01", "a": "010"}


def test_overrides(tmp_path):
    settings = load(
        tmp_path,
        "base: m\nparts: [{size: 1}, {size: 2}]\n",
        "tasks.org/math-v1.5=base",
        "tasks.q:x=a=b",
        "parts.1.size=7",
        "parts.0.names=[x]",
        "inner.on=true",
        "maybe=3",
        "by_name.k.rate=1",
        "mode=slow",
    )
    assert settings.tasks == {"org/math-v1.5": "base", "q:x": "a=b"}
    assert settings.parts == [Part(1, ["x"]), Part(7)]
    assert settings.inner.on is True
    assert (settings.maybe, settings.mode, settings.by_name["k"].rate) == (3, "slow", 1.0)


def test_later_override_wins_and_an_empty_value_is_null(tmp_path):
    assert load(tmp_path, "base: m\nmaybe: 1\n", "maybe=2", "maybe=").maybe is None


FAULTS = [
    ("base: m\nbas: x\n", [], "Unknown key bas; the config takes base, tasks"),
    ("base: m\ninner: {hots: x}\n", [], "Unknown key inner.hots; inner takes host, rate, on"),
    ("base: m\nparts: [{size: 1, x: 2}]\n", [], "Unknown key parts.0.x; parts.0 takes size, names"),
    ("base: m\n", ["inner.hots=1"], "Unknown key inner.hots"),
    ("tasks: {}\n", [], "The key base is missing"),
    ("base: m\nparts: [{}]\n", [], "The key parts.0.size is missing"),
    ("base: 5\n", [], "base must be text, not the number 5"),
    ("base: m\nparts: [{size: true}]\n", [], "parts.0.size must be a whole number, not true"),
    ("base: m\nparts: [{size: 1.0}]\n", [], "parts.0.size must be a whole number, not the number 1.0"),
    ("base: m\nparts: [{size: '1'}]\n", [], "parts.0.size must be a whole number, not the text '1'"),
    ("base: m\ninner: {rate: true}\n", [], "inner.rate must be a number, not true"),
    ("base: m\ninner: {on: 1}\n", [], "inner.on must be true or false, not the number 1"),
    ("base: m\ninner: 5\n", [], "inner must be a map"),
    ("base: m\ninner: 5\n", ["inner.on=true"], "inner must be a map"),
    ("base: m\ninner: null\n", [], "inner must be a map of keys and values, not empty"),
    ("base: m\nparts: {size: 1}\n", [], "parts must be a list of a map, not a map"),
    ("base: m\nparts: [{size: 1, names: some}]\n", [], "parts.0.names must be 'all' or a list of text"),
    ("base: m\nparts: [{size: 1, names: [1]}]\n", [], "parts.0.names.0 must be text"),
    ("base: m\nmode: warp\n", [], "mode must be 'fast' or 'slow', not the text 'warp'"),
    ("base: m\ntasks: {1: a}\n", [], 'The name 1 in tasks must be text; put it in quotes: "1"'),
    ("base: m\ntasks: {a: [x]}\n", [], "tasks.a must be text, not a list"),
    ("base: m\nbase: n\n", [], "line 2: the key 'base' appears twice"),
    ("base: m\ninner: {on: true, on: false}\n", [], "line 2: the key 'on' appears twice"),
    ("base: [m\n", [], "line"),
    ("base: m\n\tinner: 1\n", [], "line 2"),
    ("- base\n", [], "not a list"),
    ("just text", [], "not the text"),
    (b"base: \xff\n", [], "is not UTF-8"),
    ("base: !!python/object:os.system x\n", [], "line 1"),
    ("base: m\n", ["base"], "'base' must have the form key=value"),
    ("base: m\n", ["=x"], "key=value"),
    ("base: m\n", ["base.x=1"], "base is a plain value"),
    ("base: m\n", ["parts.0.size=1"], "parts has 0 items"),
    ("base: m\nparts: [{size: 1}]\n", ["parts.-1.size=1"], "parts.-1"),
    ("base: m\n", ["maybe=[1"], "the value of the override maybe"),
    ("base: m\n", ["maybe=x"], "maybe must be a whole number or empty, not the text 'x'"),
]


@pytest.mark.parametrize(("text", "overrides", "named"), FAULTS)
def test_errors_are_one_line_with_the_key(tmp_path, text, overrides, named):
    with pytest.raises(PshareError) as caught:
        load(tmp_path, text, *overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PshareError, match=r"none\.yaml"):
        load_settings(Outer, tmp_path / "none.yaml")
    with pytest.raises(PshareError, match=tmp_path.name):
        load_settings(Outer, tmp_path)


WORDS = st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" 0123456789.:eE-#'\"null"), max_size=8)
OUTERS = st.builds(
    Outer,
    base=WORDS,
    tasks=st.dictionaries(WORDS, WORDS, max_size=3),
    parts=st.lists(st.builds(Part, st.integers(), st.just("all") | st.lists(WORDS, max_size=2)), max_size=2),
    inner=st.builds(Inner, WORDS, st.floats(allow_nan=False, allow_infinity=False), st.booleans()),
    maybe=st.none() | st.integers(-9, 9),
    pair=st.tuples(st.integers(), st.integers()),
)


@given(OUTERS)
def test_printed_settings_read_back_equal(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    assert load_settings(Outer, path) == settings


def test_an_override_of_a_secret_is_used_verbatim(tmp_path):
    """As YAML, `#s3cret`, `~` and an empty text would be null, and `abc #def` would be truncated."""

    @dataclass(frozen=True)
    class Server:
        key: str | None = field(default=None, metadata={"secret": True})

    @dataclass(frozen=True)
    class Config:
        server: Server = field(default_factory=Server)

    (tmp_path / "config.yaml").write_text("server: {}")
    for text in ("", "#s3cret", "abc #def", "~", "&abc", "12345", "a: b"):
        assert load_settings(Config, tmp_path / "config.yaml", [f"server.key={text}"]).server.key == text
