"""cli.py in this process: the printed config, and user errors."""

import socket
from pathlib import Path

import pytest

from pshare_jax.server import cli


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("base: nothing\ntasks: {chat: base}\n")
    return str(path)


def test_print_config_prints_the_config_with_overrides(config_file, capsys):
    arguments = ["tasks.a/b.c=base", "--config", config_file, "--print-config", "server.port=0"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "  chat: base\n  a/b.c: base\n" in printed
    assert "  port: 0\n" in printed


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("server.prot=1", "server.prot host port"),
        ("kv.pages=2", "kv.pages 3 2"),
        ("cache.pages=1", "cache base tasks"),
        ("server.host=256.0.0.1", "server.host '256.0.0.1'"),
        ("server.host=203.0.113.9", "203.0.113.9:8000 cannot assign requested address"),
    ],
)
def test_user_errors_are_one_sentence_and_status_2(config_file, capsys, override, facts):
    """One error of each source; test_serve_config.py has the others."""
    assert cli.main(["--config", config_file, override]) == 2
    captured = capsys.readouterr()
    assert all(fact in captured.err for fact in facts.split())
    assert captured.err.startswith("pshare-serve: ")
    assert captured.err.count("\n") == 1


def test_a_missing_config_file(capsys):
    assert cli.main(["--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_loading(config_file, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["--config", config_file, f"server.port={port}"]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: address already in use" in error
    assert "server.port=" in error


def test_the_key_is_not_printed(config_file, capsys):
    assert cli.main(["--config", config_file, "--print-config", "server.api_key=secret"]) == 0
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["12345", "12345.5", "[12345]", "{a: 12345}", "*12345", "!12345 x", "'12345", "' 12345'"]
)
def test_a_malformed_key_in_the_file_is_not_echoed(config_file, tmp_path, capsys, value):
    file = tmp_path / "with_key.yaml"
    file.write_text(Path(config_file).read_text() + f"\nserver:\n  api_key: {value}\n")
    check_not_echoed(str(file), [], capsys)


@pytest.mark.parametrize("override", ["server.api_key:12345", "server.api_key= 12345", "server.api_key 12345"])
def test_a_malformed_key_on_the_command_line_is_not_echoed(config_file, capsys, override):
    check_not_echoed(config_file, [override], capsys)


@pytest.mark.parametrize("override", ["server.api_key=", "server.api_key= "])
def test_an_empty_key_is_refused(config_file, capsys, override):
    """An empty shell variable must not open the server to everyone."""
    assert cli.main(["--config", config_file, override]) == 2
    assert "server.api_key" in capsys.readouterr().err


def check_not_echoed(file, overrides, capsys):
    assert cli.main(["--config", file, *overrides]) == 2
    captured = capsys.readouterr()
    assert "api_key" in captured.err or "as YAML" in captured.err
    assert "12345" not in captured.err + captured.out
    assert captured.err.count("\n") == 1
