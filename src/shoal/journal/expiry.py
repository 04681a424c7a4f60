"""When finished and interrupted responses are to be deleted."""

from __future__ import annotations

from shoal.journal.api import State


class Expiry:
    """By a clock that only goes forward, so that setting the time of day deletes nothing."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._since_s: dict[str, float] = {}

    def note(self, response_id: str, state: State, now_s: float) -> None:
        """An open response never expires."""
        self._since_s.pop(response_id, None)
        if state != "open":
            self._since_s[response_id] = now_s

    def pop(self, now_s: float) -> list[str]:
        """Those whose time is up, once."""
        expired = []
        for response_id, since_s in self._since_s.items():  # oldest first
            if now_s - since_s < self._keep_s:
                break
            expired.append(response_id)
        for response_id in expired:
            del self._since_s[response_id]
        return expired
