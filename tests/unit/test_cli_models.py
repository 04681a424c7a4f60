"""`models` and `pull`: the catalogue, the cache, and terms that must be accepted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shoal.cli import fetching, pull, terms
from shoal.cli.app import app
from shoal.errors import ConfigError
from shoal.weights import manifest, source
from shoal.weights.cache import silent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.delenv("SHOAL_ACCEPT_TERMS", raising=False)
    monkeypatch.setattr(source, "terms_of", lambda *_, **__: "the whole terms\n")
    return tmp_path / "shoal"


def run(*arguments: str, stdin: str = "") -> Result:
    environment = {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, list(arguments), input=stdin, env=environment)


def store(cache: Path, name: str, main: str) -> Path:
    folder = cache / "models" / name
    folder.mkdir(parents=True)
    (folder / main).write_bytes(b"x" * 1500)
    manifest.write(
        folder,
        manifest.Manifest(
            name=name,
            kind="gguf",
            source="s3://bucket/other",
            fetched_s=0.0,
            main=main,
            files=manifest.record(folder),
        ),
    )
    return folder / main


def test_an_empty_cache_still_lists_the_catalogue() -> None:
    result = run("models")
    assert result.exit_code == 0
    for name in ("smollm2-135m", "gemma3-270m", "minilm-l6"):
        assert name in result.stdout
    assert "Apache-2.0" in result.stdout and "Gemma terms" in result.stdout
    assert result.stdout.count("not fetched") == 3


def test_what_is_cached_has_size_and_path(cache: Path) -> None:
    of_catalogue = store(cache, "smollm2-135m", "m.gguf")
    other = store(cache, "other", "o.gguf")
    records = {record["name"]: record for record in json.loads(run("models", "--json").stdout)}
    assert records["smollm2-135m"]["path"] == str(of_catalogue)
    assert records["smollm2-135m"]["num_bytes"] == 1500
    assert records["other"]["path"] == str(other)
    assert records["other"]["description"] == "fetched from s3://bucket/other"
    assert records["minilm-l6"]["path"] is None
    table = run("models").stdout
    assert "1.5 kB" in table and str(of_catalogue) in table


def test_pull_of_a_local_file_says_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"x" * 10)
    result = run("pull", str(path))
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    assert "10 B" in result.stderr


def test_terms_nobody_accepted_stop_a_pull(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(source, "resolve", lambda name, **_: fetched.append(name))
    result = run("pull", "gemma3-270m")
    assert result.exit_code == 1
    assert "Gemma terms of use" in result.stderr and "--accept-terms" in result.stderr
    assert str(cache / "terms" / "gemma3-270m.txt") in result.stderr
    assert (cache / "terms" / "gemma3-270m.txt").read_text() == "the whole terms\n"
    assert not fetched


def test_accepted_terms_are_remembered(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms.require_terms("gemma3-270m", accepted=True, report=silent)
    assert "Gemma terms of use" in capsys.readouterr().err
    terms.require_terms("gemma3-270m", accepted=False, report=silent)
    assert capsys.readouterr().err == ""
    assert "accepted at" in (cache / "terms" / "gemma3-270m.accepted").read_text()


def test_the_environment_accepts_terms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []

    def fetch(name: str, *, accept_terms: bool) -> source.ModelFiles:
        seen.append(accept_terms)
        return source.ModelFiles(name=name, kind="gguf", path=tmp_path)

    monkeypatch.setattr(pull, "fetch", fetch)
    monkeypatch.setenv("SHOAL_ACCEPT_TERMS", "1")
    run("pull", "gemma3-270m")
    monkeypatch.setenv("SHOAL_ACCEPT_TERMS", "0")
    run("pull", "gemma3-270m")
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("typed", "is_yes"), [("yes", True), ("Y", True), ("", False), ("no", False)]
)
def test_a_person_is_asked(typed: str, is_yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return f"{typed}\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    if is_yes:
        terms.require_terms("gemma3-270m", accepted=False, report=silent)
    else:
        with pytest.raises(ConfigError, match="not accepted"):
            terms.require_terms("gemma3-270m", accepted=False, report=silent)


def test_models_without_terms_ask_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("smollm2-135m", "./some.gguf"):
        terms.require_terms(name, accepted=False, report=silent)
    assert capsys.readouterr().err == ""


def test_progress_without_a_terminal_says_each_thing_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with fetching.reporting() as report:
        report("model.gguf", 0, 100)
        report("model.gguf", 50, 100)
        report("unpacking", 0, None)
    assert capsys.readouterr().err.split() == ["model.gguf", "unpacking"]
