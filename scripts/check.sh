#!/usr/bin/env bash
# The one script behind `make test`, CI and pre-commit: static checks, then tests.
#   static   formatting, lint, types, import directions
#   fast     static, and the tests that need no model            (about a minute)
#   all      static, and every test                              (a few minutes)
set -euo pipefail
cd "$(dirname "$0")/.."
what="${1:-all}"
bin=.venv/bin

$bin/ruff format --check src tests bench scripts
$bin/ruff check src tests bench scripts
$bin/mypy
$bin/lint-imports

case "$what" in
static) ;;
fast) $bin/python -m pytest -m "not slow" ;;
all) $bin/python -m pytest ;;
*) echo "usage: $0 static|fast|all" >&2; exit 2 ;;
esac
