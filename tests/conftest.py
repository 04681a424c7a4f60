"""Settings of every test."""

from __future__ import annotations

import os

from hypothesis import settings

# CI repeats the same examples, so that a red run can be run again; elsewhere each run tries new
# ones. No deadlines: these machines are shared.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
