"""What workers report, in the order it comes, and their errors raised again."""

from __future__ import annotations

import pytest
from fleet_fakes import LOADED
from msgspec import structs

from shoal.errors import InternalError, OutOfMemory, PeerLost
from shoal.fleet.inbox import Inbox, Lost, error_of, loss_of
from shoal.messages import StepResult
from shoal.parallel.control import CacheOpened, Failed, Formed, Loaded


def test_one_reply_is_collected_from_each() -> None:
    inbox = Inbox()
    inbox.put("a", StepResult(epoch=0, step=3, results=[]))
    inbox.put("b", CacheOpened())
    inbox.put("a", Formed(epoch=2))
    inbox.put("a", CacheOpened())
    assert inbox.replies(CacheOpened, ["a", "b"], timeout_s=1).keys() == {"a", "b"}


def test_what_is_not_meant_is_dropped() -> None:
    inbox = Inbox()
    inbox.put("a", Failed(epoch=1, step=4, kind="PeerLost", message="rank 0 is silent"))
    for number in (1, 2):
        inbox.put("a", structs.replace(LOADED, num_blocks=number))
    meant = inbox.replies(
        Loaded,
        ["a"],
        timeout_s=1,
        is_meant=lambda reply: isinstance(reply, Loaded) and reply.num_blocks == 2,
    )
    assert meant["a"].num_blocks == 2


def test_nothing_comes_in_time() -> None:
    inbox = Inbox()
    assert inbox.take(0.01) is None
    assert inbox.take(-1) is None
    inbox.put("a", CacheOpened())
    assert inbox.take(-1) == ("a", CacheOpened())


def test_who_is_missing_is_said() -> None:
    inbox = Inbox()
    inbox.put("b", LOADED)
    with pytest.raises(PeerLost, match="no answer in time from a, c"):
        inbox.replies(Loaded, ["a", "b", "c"], timeout_s=0.05)
    inbox.put("c", Lost("it hung up"))
    with pytest.raises(PeerLost, match="worker c is lost: it hung up"):
        inbox.replies(Loaded, ["a", "b", "c"], timeout_s=5)


def test_a_workers_error_is_raised_again_as_what_it_was() -> None:
    inbox = Inbox()
    inbox.put("a", Failed(epoch=0, kind="OutOfMemory", message="7 MiB are free"))
    with pytest.raises(OutOfMemory, match="worker a: 7 MiB are free"):
        inbox.replies(Loaded, ["a"], timeout_s=5)
    unknown = error_of("a", Failed(epoch=0, kind="ZeroDivisionError", message="division by zero"))
    assert type(unknown) is InternalError and "ZeroDivisionError" in str(unknown)
    # A name of the module that is no error of ours must not be called.
    assert type(error_of("a", Failed(epoch=0, kind="annotations", message="x"))) is InternalError


def test_a_loss_says_how_it_was_noticed() -> None:
    silent = Lost("silent for 1.30 s", noticed_by="heartbeat", silence_s=1.3)
    assert loss_of("a", silent).noticed_by == "heartbeat"
    assert loss_of("a", Lost("it hung up")).noticed_by == "connection"
    reported = error_of("a", Failed(epoch=0, kind="PeerLost", message="stage 1 is silent"))
    assert isinstance(reported, PeerLost) and reported.noticed_by == "report"
