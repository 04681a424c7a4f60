"""The command line itself: help, wrong usage, errors and exit statuses."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner, Result

from shoal.cli import app as app_module
from shoal.cli import generate, models
from shoal.cli.app import app
from shoal.cli.console import human_bytes
from shoal.cli.starting import without_collections
from shoal.errors import InternalError, SourceError

COMMANDS = ("serve", "chat", "generate", "pull", "models", "bench", "eval perplexity")


def run(*arguments: str, stdin: str | None = None, **environment: str) -> Result:
    environment = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb", **environment}
    return CliRunner().invoke(app, list(arguments), input=stdin, env=environment)


def plain(text: str) -> str:
    """Without colours, boxes and line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_help_groups_the_commands() -> None:
    text = plain(run("--help").output)
    assert text.index("Use a model") < text.index("Get a model") < text.index("Measure")
    for command in COMMANDS:
        assert f" {command.split()[0]} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    text = plain(result.output)
    assert f"Examples: shoal {command}" in text


def test_no_arguments_shows_help() -> None:
    assert "Start here" in run().output


def test_version() -> None:
    result = run("--version")
    assert re.fullmatch(r"shoal \d+\.\d+\.\d+\S*\n", result.output)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("serv", "x"), "Did you mean 'serve'"),
        (("genrate", "x"), "Did you mean 'generate'"),
        (("eval", "perplexty", "x"), "Did you mean 'perplexity'"),
        (("serve", "x", "--prt", "1"), "--port"),
        (("serve", "x", "--quantise", "int8"), "--quantize"),
        (("generate", "x", "--max-token", "1"), "--max-tokens"),
        (("serve", "x", "--dtype", "fp32"), "'float32'"),
        (("serve", "x", "--quantize", "int5"), "'int4'"),
        (("serve", "x", "--kv-dtype", "int4"), "'float16'"),
        (("serve", "x", "--port", "70000"), "65535"),
        (("serve", "x", "--kv-memory", "lots"), "512M, 2GiB or 1.5GB"),
        (("serve", "x", "--max-running", "0"), "max_running must be positive, got 0"),
        (("serve", "x", "--layers", "20.5/9.5"), "whole layers, not 20.5"),
        (("serve", "x", "--layers", "nan/9"), "whole layers, not nan"),
        (("serve",), "MODEL"),
        (("generate", "x", "hello", "--temperature", "-1"), "'--temperature'"),
        (("generate", "x", "hello", "--n", "0"), "n must be in [1, 128], got 0"),
        (("chat",), "--url"),
        (("bench",), "--url"),
        (("bench", "--url", "ftp://host"), "http://HOST:PORT"),
        (("bench", "x", "--rate", "-2"), "must be positive, got -2"),
        (("eval", "perplexity", "x", "--window", "1"), "greater than or equal to 2"),
        (("eval", "perplexity", "x", "--text", "/no/such/file"), "/no/such/file"),
    ],
)
def test_wrong_usage_says_what_was_meant(arguments: tuple[str, ...], meant: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert meant in plain(result.output)


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate, "open_llm", broken)


def test_an_error_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(SourceError("there is no model 'x' [bold]; did you mean 'y'?"), monkeypatch)
    result = run("generate", "x", "hello")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: there is no model 'x' [bold]; did you mean 'y'?\n"


def test_debug_shows_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    error = SourceError("gone")
    fail_with(error, monkeypatch)
    assert run("--debug", "generate", "x", "hello").exception is error
    assert run("generate", "x", "hello", SHOAL_DEBUG="1").exception is error


def test_a_bug_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(InternalError("blocks are lost"), monkeypatch)
    result = run("generate", "x", "hello")
    assert result.exit_code == 1
    assert "shoal --debug" in result.stderr


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    result = run("generate", "x", "hello")
    assert (result.exit_code, result.output) == (130, "")


def test_sigterm_cleans_up_what_a_command_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[bool] = []

    def begun(**_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(app_module, "app", begun)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            app_module.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, cleaned) == (143, [True])


def test_a_broken_pipe_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "known_models", lambda: (_ for _ in ()).throw(BrokenPipeError(32)))
    result = run("models")
    assert (result.exit_code, result.output) == (1, "")


def test_an_unknown_model_is_answered_with_a_near_one(tmp_path: object) -> None:
    result = run("generate", "smolm2-135m", "hello", SHOAL_CACHE=str(tmp_path))
    assert result.exit_code == 1
    assert "did you mean 'smollm2-135m'?" in result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from shoal.cli.app import main; "
        "print([m for m in ('torch', 'transformers', 'fastapi', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (2_530_000_000, "2.53 GB")],
)
def test_human_bytes(num_bytes: int, text: str) -> None:
    assert human_bytes(num_bytes) == text


def test_starting_collects_no_garbage_and_leaves_no_work_to_later_collections() -> None:
    before = gc.get_freeze_count()
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
    with pytest.raises(ValueError, match="no start"), without_collections():
        raise ValueError("no start")
    assert gc.isenabled()
