"""What seats have done, over all epochs and whoever sat in them."""

from __future__ import annotations

import pytest
from fleet_fakes import DIMS, usage
from msgspec import structs

from shoal.cluster.placement import ReplicaPlacement, divide
from shoal.config import Split
from shoal.fleet.ledger import Ledger


def test_a_seats_totals_outlive_epochs_and_workers() -> None:
    ledger = Ledger()
    placement = divide(DIMS, Split(pipeline=2), ["here"]).replicas[0]
    first = [seat.worker for seat in placement.seats]
    ledger.close_epoch(placement, dict.fromkeys(first, usage(0, 5, 1.0)), active_s=2.0)
    (first_seat,), (last_seat,) = placement.stages
    recruit = structs.replace(first_seat, worker="r0s0t0-7")
    replaced = ReplicaPlacement(stages=((recruit,), (last_seat,)))
    now = {"r0s0t0-7": usage(1, 2, 0.5), last_seat.worker: None}
    one, other = ledger.totals(replaced, now, 1.0, {"r0s0t0-7": 77})
    assert (one.worker, one.pid, one.steps, one.busy_seconds) == ("r0s0t0-7", 77, 7, 1.5)
    assert one.stage_bytes == 70
    assert one.bubble_seconds == pytest.approx(1.5)
    assert (other.steps, other.busy_seconds) == (5, 1.0), "it has not reported in this epoch yet"
    again = ledger.totals(replaced, now, 1.0, {"r0s0t0-7": 77})
    assert again == [one, other], "asking changes nothing"
