"""When a replica that does not work gets requests again: outcomes and the time come in."""

from __future__ import annotations

from typing import Literal

FAILURES_TO_OPEN = 3
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
SAME_CAUSE_S = 0.1
"""A step that fails ends all its requests, which count as one failure."""

State = Literal["closed", "open", "half-open"]


class Circuit:
    """A circuit breaker: closed -> open -> half-open -> closed, or open again for longer.

    Closed, everything may pass, and so many failures in a row open it. Open, nothing passes until
    a wait is over. Then one trial at a time may: it closes the circuit, or opens it for twice as
    long as before, within bounds. A trial of which nothing is heard for as long blocks no other.
    """

    def __init__(
        self,
        *,
        failures_to_open: int = FAILURES_TO_OPEN,
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self._failures_to_open = failures_to_open
        self._first_wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._num_failures = 0
        self._last_failure_s = float("-inf")
        self._wait_s = first_wait_s
        self._next_trial_s = 0.0
        self.state: State = "closed"

    def allows(self, now_s: float) -> bool:
        """Whether a request may pass now."""
        return self.state == "closed" or now_s >= self._next_trial_s

    def started(self, now_s: float) -> None:
        """A request that was allowed passes: unless all may, it is the trial."""
        if self.state != "closed":
            self.state = "half-open"
            self._next_trial_s = now_s + self._wait_s

    def succeeded(self, now_s: float) -> None:  # noqa: ARG002
        """An open circuit does not believe it: the request is one from before the failures."""
        if self.state != "open":
            self.reset()

    def failed(self, now_s: float) -> None:
        match self.state:
            case "half-open":
                self._wait_s = min(2 * self._wait_s, self._longest_wait_s)
                self._open(now_s)
            case "closed":
                if now_s - self._last_failure_s >= SAME_CAUSE_S:
                    self._num_failures += 1
                self._last_failure_s = now_s
                if self._num_failures >= self._failures_to_open:
                    self._open(now_s)

    def withdrawn(self, now_s: float) -> None:
        """A request left before it could tell anything: another may be the trial."""
        if self.state == "half-open":
            self._next_trial_s = now_s

    def trip(self, now_s: float) -> None:
        """Open at once: there is no doubt that nothing works."""
        if self.state == "closed":
            self._open(now_s)
        else:
            self.state = "half-open"
            self.failed(now_s)

    def reset(self) -> None:
        """All is well again."""
        self.state = "closed"
        self._num_failures = 0
        self._last_failure_s = float("-inf")
        self._wait_s = self._first_wait_s

    def _open(self, now_s: float) -> None:
        self.state = "open"
        self._next_trial_s = now_s + self._wait_s
