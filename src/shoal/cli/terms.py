"""Licence terms that must be accepted before a model is fetched, and the memory of a yes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.markup import escape

from shoal.cli.console import err_console
from shoal.errors import ConfigError
from shoal.weights.cache import Progress, cache_root
from shoal.weights.catalogue import CATALOGUE

_WEB_PAGES = {"gemma3-270m": "https://ai.google.dev/gemma/terms"}


def require_terms(name: str, *, accepted: bool, report: Progress) -> None:
    """Return when the terms of catalogue model `name` are accepted, or when it has none.

    Asks on a terminal; raises ConfigError when the answer is no or nobody can be asked.
    """
    model = CATALOGUE.get(name)
    if model is None or model.terms is None or _marker(name).exists():
        return
    _show_notice(name, model.licence, _save_full_text(name, report))
    if not accepted and not _answered_yes():
        raise ConfigError(
            f"the terms of {name} are not accepted: read them, then run again with "
            "--accept-terms or SHOAL_ACCEPT_TERMS=1"
        )
    _write(_marker(name), time.strftime("accepted at %Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))


def _save_full_text(name: str, report: Progress) -> Path:
    # The door to models imports torch, which 'shoal --help' must not wait for.
    from shoal.weights.source import terms_of  # noqa: PLC0415

    path = cache_root() / "terms" / f"{name}.txt"
    if not path.exists():
        _write(path, terms_of(name, report=report) or "")
    return path


def _show_notice(name: str, licence: str, full_text: Path) -> None:
    web_page = f", or {_WEB_PAGES[name]}" if name in _WEB_PAGES else ""
    err_console().print(
        f"[bold]{escape(name)}[/] comes under the [bold]{escape(licence)}[/]. In short: some uses "
        "are prohibited, and whoever passes the model on, or one derived from it, must pass the "
        f"terms on with it. Full text: {escape(str(full_text))}{web_page}",
        soft_wrap=True,
    )


def _answered_yes() -> bool:
    if not sys.stdin.isatty():
        return False
    err_console().print("Do you accept these terms? [y/N] ", end="", markup=False)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _marker(name: str) -> Path:
    return cache_root() / "terms" / f"{name}.accepted"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error}; set SHOAL_CACHE to a folder that can"
        ) from error
