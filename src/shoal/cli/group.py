"""The top of the command line: turns Shoal's errors into one red line and an exit status."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from shoal.cli.console import fail
from shoal.errors import InternalError, ShoalError

EXIT_FAILED = 1


class ShoalGroup(TyperGroup):
    """Exit status 0 is done, 1 failed, 2 wrong usage, 130 interrupted (the last two by typer)."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except ShoalError as error:
            if ctx.params.get("debug"):
                raise
            fail(_line(error))
            raise typer.Exit(EXIT_FAILED) from error


def _line(error: ShoalError) -> str:
    if isinstance(error, InternalError):
        return f"{error.message} (a bug in Shoal: run 'shoal --debug …' and report the traceback)"
    return error.message
