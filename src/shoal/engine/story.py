"""An incident in plain English, for logs and for people."""

from __future__ import annotations

from shoal.engine.api import Incident

_NOTICED = {
    "connection": "its connection broke",
    "heartbeat": "no sign of life",
    "step deadline": "a step took too long",
    "report": "it cannot go on",
}
_PHASES = ("silence", "start", "load", "form", "recompute")


def told(incident: Incident) -> str:
    """One or two sentences: what was noticed, what was decided, how it ended."""
    did = f": {', then '.join(incident.decisions)}" if incident.decisions else ""
    return f"{incident.replica} {_what(incident)}{did}; {_end(incident)}"


def phases_told(incident: Incident) -> str:
    """Such as "start 0.02, load 0.31", in seconds, in the order in which they come."""
    known = [name for name in _PHASES if name in incident.phases]
    others = [name for name in incident.phases if name not in (*_PHASES, "total")]
    return ", ".join(f"{name} {incident.phases[name]:.2f}" for name in [*known, *others])


def _what(incident: Incident) -> str:
    why = incident.cause
    if not incident.lost:
        by = ", asked by an operator" if incident.noticed_by == "operator" else ""
        return f"forms anew{by} ({why})" if why else f"forms anew{by}"
    how = _NOTICED.get(incident.noticed_by, incident.noticed_by)
    return f"lost {', '.join(incident.lost)} ({how}{f': {why}' if why else ''})"


def _end(incident: Incident) -> str:
    number = incident.num_requests
    requests = "1 request" if number == 1 else f"{number} requests"
    total_s = incident.phases.get("total")
    after = "" if total_s is None else f" after {total_s:.2f} s"
    match incident.outcome:
        case "under way":
            return f"{requests} {'waits' if number == 1 else 'wait'}, still under way"
        case "given up":
            told = "was told to come again" if number == 1 else "were told to come again"
            return f"given up{after}, {f'{requests} {told}' if number else 'no request waited'}"
        case "recovered":
            went = f"{requests} went on{after}" if number else f"ready again{after}, idle before"
            phases = phases_told(incident)
            return f"{went} ({phases})" if phases else went
