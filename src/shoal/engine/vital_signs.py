"""Whether an engine is live, ready and progressing, from what it is doing."""

from __future__ import annotations

from shoal.engine.api import Health


def vital_signs(
    *,
    stopped: str | None,
    refusal: str | None,
    trouble: str | None,
    recovering_s: float | None,
    waiting_s: float | None,
    stall_s: float,
) -> Health:
    """`recovering_s` is since workers were lost that are still awaited, and `trouble` why it
    takes so long; `waiting_s` is since the last finished step, with work there."""
    recovers_long = recovering_s is not None and recovering_s > stall_s
    waits_long = waiting_s is not None and waiting_s > stall_s
    if stopped is not None:
        reason = stopped
    elif refusal is not None:
        reason = refusal
    elif recovering_s is not None:
        reason = f"recovering for {recovering_s:.0f} s: {trouble}"
    elif waits_long:
        reason = f"work waits but no step has finished for {waiting_s:.0f} s"
    else:
        reason = "idle" if waiting_s is None else "working"
    return Health(
        live=stopped is None,
        ready=stopped is None and refusal is None,
        progressing=not (recovers_long or waits_long),
        reason=reason,
        since_progress_s=waiting_s or 0.0,
    )
