"""The journal on real files: what it gives back, groups, full disks, broken and foreign files."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.journaling import journal_path
from shoal.engine.api import Delta
from shoal.errors import ConfigError
from shoal.fleet.state import StateFolder
from shoal.journal.api import Accepted, Entry, Kept
from shoal.journal.database import Database
from shoal.journal.expiry import Expiry
from shoal.journal.writer import SqliteJournal
from shoal.messages import TokenLogprobs
from shoal.request import FinishReason, SamplingParams

MODEL = "a model"
ENTRIES: list[Entry] = [
    (
        0,
        Delta(
            index=0,
            text="é",
            token_ids=[7],
            logprobs=[TokenLogprobs(float("-inf"), [1, 2], [-0.25, -1.5])],
            prompt_logprobs=[TokenLogprobs(-1.0, [], [])],
            num_cached_tokens=3,
        ),
    ),
    (1, Delta(index=1, token_ids=[8])),
    (0, Delta(index=0, token_ids=[9], finish_reason=FinishReason.STOP, stop_match="x")),
]


def accepted(response_id: str = "cmpl-1", **changes: Any) -> Accepted:
    options: dict[str, Any] = {
        "endpoint": "/v1/completions",
        "model": MODEL,
        "created_s": 1,
        "body": {"prompt": "hi", "logit_bias": {"5": 1.5}},
        "prompts": [[1, 2], [3]],
        "params": [SamplingParams(seed=2**63 - 1, n=2, logit_bias={5: 1.5}, stop=("x",))] * 2,
    }
    return Accepted(response_id=response_id, **(options | changes))


class Client:
    """What a server would do, and what it hears."""

    def __init__(self, journal: SqliteJournal) -> None:
        self.journal = journal
        self.heard: list[bool] = []

    async def keep(self, response_id: str, entries: list[Entry], **changes: Any) -> list[bool]:
        self.journal.accept(accepted(response_id, **changes), self.heard.append)
        return await self.say(response_id, 0, entries)

    async def say(self, response_id: str, first: int, entries: list[Entry]) -> list[bool]:
        for number, entry in enumerate(entries, start=first):
            self.journal.append(response_id, number, [entry], self.heard.append)
        return await self.settled()

    async def end(self, response_id: str, state: Any, **options: Any) -> list[bool]:
        self.journal.mark(response_id, state, self.heard.append, **options)
        return await self.settled()

    async def settled(self) -> list[bool]:
        """All that was heard since the last call."""
        await self.journal.find("")
        heard, self.heard = self.heard, []
        return heard


@contextmanager
def opened(path: Path, **settings: Any) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(path, MODEL, **settings)
    try:
        yield journal
    finally:
        journal.close()


async def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "journal.sqlite"


def test_what_it_keeps_it_gives_back_after_a_restart(path: Path) -> None:
    with opened(path) as journal:
        asyncio.run(Client(journal).keep("cmpl-1", ENTRIES, key="mine"))
    with opened(path) as journal:
        kept = asyncio.run(journal.find("cmpl-1"))
        assert kept == Kept(
            accepted=accepted("cmpl-1", key="mine"), state="open", error=None, entries=ENTRIES
        )
        assert asyncio.run(journal.find("mine")) == kept
        assert asyncio.run(journal.find("cmpl-2")) is None
        assert asyncio.run(journal.open_ids()) == ["cmpl-1"]


def test_it_hears_of_all_in_order_and_commits_in_groups(path: Path) -> None:
    async def run(journal: SqliteJournal) -> None:
        order: list[int] = []
        journal.accept(accepted(), lambda _: order.append(-1))
        for i in range(500):
            journal.append("cmpl-1", i, [ENTRIES[1]], partial(_note, order, i))
        start_s = time.perf_counter()
        kept = await journal.find("cmpl-1")
        assert time.perf_counter() - start_s < 5
        assert order == list(range(-1, 500))
        assert kept is not None
        assert len(kept.entries) == 500

    with opened(path) as journal:
        asyncio.run(run(journal))


def _note(order: list[int], number: int, is_kept: bool) -> None:
    assert is_kept
    order.append(number)


def test_states_and_a_key_that_is_used_again(path: Path) -> None:
    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        for i, state in enumerate(["finished", "interrupted", "open"]):
            await client.keep(f"cmpl-{i}", ENTRIES, key="same")
            await client.end(f"cmpl-{i}", state)
        await client.keep("cmpl-3", ENTRIES)
        await client.end("cmpl-3", "failed", error="a worker broke it")
        named = await journal.find("same")
        assert named is not None
        assert named.accepted.response_id == "cmpl-2"
        failed = await journal.find("cmpl-3")
        assert failed is not None
        assert (failed.state, failed.error) == ("failed", "a worker broke it")
        assert await journal.open_ids() == ["cmpl-2"]

    with opened(path) as journal:
        asyncio.run(run(journal))


def test_only_its_owner_may_read_it(path: Path) -> None:
    with opened(path) as journal:
        asyncio.run(Client(journal).keep("cmpl-1", ENTRIES))
        modes = [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()]
        assert len(modes) >= 2
        assert set(modes) == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_is_left_of_a_response_that_has_expired(path: Path) -> None:
    secret = "correct horse battery staple"

    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        delta = Delta(index=0, text=secret, token_ids=[1])
        await client.keep("cmpl-1", [(0, delta)], body={"prompt": secret})
        await client.end("cmpl-1", "finished")
        await client.keep("cmpl-2", ENTRIES)
        assert _traces(path, secret)

        async def is_gone() -> bool:
            return await journal.find("cmpl-1") is None and not _traces(path, secret)

        await eventually(is_gone, timeout_s=10)
        assert await journal.find("cmpl-2") is not None

    with opened(path, keep_s=0.1, retry_s=0.2) as journal:
        asyncio.run(run(journal))


def _traces(path: Path, secret: str) -> int:
    return sum(file.read_bytes().count(secret.encode()) for file in path.parent.iterdir())


def test_setting_the_clock_deletes_nothing() -> None:
    expiry = Expiry(10.0)
    expiry.note("a", "finished", 0.0)
    expiry.note("b", "interrupted", 5.0)
    expiry.note("c", "open", 0.0)
    expiry.note("a", "finished", 9.0)
    assert expiry.pop(14.9) == []
    assert expiry.pop(15.0) == ["b"]
    expiry.note("a", "open", 16.0)
    assert expiry.pop(100.0) == []


def test_responses_that_nobody_went_on_with_for_long_are_not_gone_on_with(path: Path) -> None:
    with opened(path) as journal:
        asyncio.run(Client(journal).keep("cmpl-1", ENTRIES))
    long_ago_s = time.time() - 700
    os.utime(path, (long_ago_s, long_ago_s))
    with opened(path) as journal:
        assert asyncio.run(journal.open_ids()) == []


def test_a_second_server_is_refused(path: Path) -> None:
    with opened(path), pytest.raises(ConfigError, match="another server writes the journal"):
        SqliteJournal(path, MODEL)
    with opened(path):
        program = (
            "import sys; from pathlib import Path; from shoal.journal.writer import SqliteJournal\n"
            "SqliteJournal(Path(sys.argv[1]), 'm')"
        )
        other = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
        )
    assert other.returncode == 1
    assert "another server writes the journal" in other.stderr


@pytest.mark.parametrize("damage", ["garbage", "version", "torn"])
def test_a_file_that_is_no_journal_is_moved_aside(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as journal:
        asyncio.run(Client(journal).keep("cmpl-1", ENTRIES * 300))
    if damage == "garbage":
        path.write_bytes(b"no database at all, but text " * 400)
    elif damage == "torn":
        whole = path.read_bytes()
        path.write_bytes(whole[:8192] + b"\xff" * 8192 + whole[16384:])
    else:
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 99")
        other.close()
    with caplog.at_level(logging.WARNING), opened(path) as journal:
        assert journal.trouble is None
        assert asyncio.run(Client(journal).keep("cmpl-2", ENTRIES)) == [True] * 4
        assert asyncio.run(journal.find("cmpl-1")) is None
    assert "the journal cannot be used" in caplog.text
    assert len(list(path.parent.glob("*.unusable"))) == 1


def test_a_database_of_others_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "others.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE precious (thing TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another program's database"):
        SqliteJournal(path, MODEL)
    assert path.read_bytes() == before


def test_a_journal_whose_place_others_take_waits_until_they_leave(path: Path) -> None:
    async def run(journal: SqliteJournal) -> None:
        others = path.with_name("others.sqlite")
        with sqlite3.connect(others) as other:
            other.execute("CREATE TABLE precious (thing TEXT)")
        other.close()
        others.replace(path)

        async def is_troubled() -> bool:
            return journal.trouble is not None

        async def is_well() -> bool:
            return journal.trouble is None

        await eventually(is_troubled)
        await asyncio.sleep(0.3)  # several attempts
        path.unlink()
        await eventually(is_well)
        assert await Client(journal).keep("cmpl-1", ENTRIES) == [True] * 4

    with opened(path, retry_s=0.05) as journal:
        asyncio.run(run(journal))


def test_a_number_that_the_journal_cannot_write_costs_nobody_else(path: Path) -> None:
    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        assert await client.keep("cmpl-1", ENTRIES, body={"metadata": 10**30}) == [False] * 4
        assert await client.end("cmpl-1", "finished") == [False]
        assert await journal.find("cmpl-1") is None
        assert await client.keep("cmpl-2", ENTRIES) == [True] * 4
        assert journal.trouble is None

    with opened(path) as journal:
        asyncio.run(run(journal))


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """What this process writes beyond fails, as on a full disk. Linux sends a signal first, which
    Python ignores."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_streams_go_on_and_it_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        assert await client.keep("cmpl-1", ENTRIES) == [True] * 4
        await client.keep("cmpl-quiet", ENTRIES)
        with file_size_limit(path.with_name(f"{path.name}-wal").stat().st_size):
            for i in range(5):
                assert await client.say("cmpl-1", 3 + i, [ENTRIES[1]]) == [False]
            assert await client.keep("cmpl-2", ENTRIES) == [False] * 4
            assert "not written since" in (journal.trouble or "")
            assert await journal.find("cmpl-1") is None
        assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1

        async def is_well() -> bool:
            return journal.trouble is None

        await eventually(is_well)
        # What has a hole is not kept any more, nor anything that follows; what is new is.
        assert await client.say("cmpl-1", 8, [ENTRIES[1]]) == [False]
        assert await client.say("cmpl-quiet", 3, [ENTRIES[1]]) == [False]
        assert await client.end("cmpl-2", "finished") == [False]
        assert await client.keep("cmpl-3", ENTRIES) == [True] * 4
        found = [await journal.find(f"cmpl-{i}") for i in ("1", "2", "quiet", "3")]
        assert [kept is not None for kept in found] == [False, False, False, True]

    with opened(path, retry_s=0.1) as journal:
        asyncio.run(run(journal))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Four MiB of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_and_is_emptied(small_disk: Path) -> None:
    ballast = small_disk / "ballast"

    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        assert await client.keep("cmpl-1", ENTRIES) == [True] * 4
        ballast.write_bytes(b"x" * 3 * 2**20)
        long: Entry = (0, Delta(index=0, text="x" * 20_000, token_ids=[1]))
        heard = [await client.say("cmpl-1", 3 + i, [long]) for i in range(80)]
        assert heard[0] == [True]
        assert heard[-1] == [False]
        assert "full" in (journal.trouble or "")
        ballast.unlink()

        async def is_well() -> bool:
            return journal.trouble is None

        await eventually(is_well)
        assert await journal.find("cmpl-1") is None
        assert await client.keep("cmpl-2", ENTRIES) == [True] * 4

    with opened(small_disk / "journal" / "journal.sqlite", retry_s=0.1) as journal:
        asyncio.run(run(journal))


@pytest.mark.parametrize(
    ("chosen", "port", "expected"),
    [
        (None, 8000, "/state/journal/a_b-8000.sqlite"),
        (None, 0, None),
        ("off", 8000, None),
        ("/elsewhere/j", 0, "/elsewhere/j"),
    ],
)
def test_where_a_server_keeps_its_journal(
    chosen: str | None, port: int, expected: str | None
) -> None:
    path = journal_path(chosen, StateFolder(Path("/state")), "a/b", port)
    assert path == (expected and Path(expected))


def test_a_disk_that_hangs_holds_streams_up_for_a_moment_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    commit = Database.commit

    def hang(self: Database) -> None:
        gate.wait(10)
        commit(self)

    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        assert await client.keep("cmpl-1", ENTRIES) == [True] * 4
        monkeypatch.setattr(Database, "commit", hang)
        start_s = time.monotonic()
        assert await client.say("cmpl-1", 3, [ENTRIES[1]] * 3) == [False] * 3
        assert await client.say("cmpl-1", 6, [ENTRIES[1]]) == [False]
        assert time.monotonic() - start_s < 2
        assert "has not answered" in (journal.trouble or "")
        gate.set()

        async def is_well() -> bool:
            return journal.trouble is None

        await eventually(is_well)
        assert await client.keep("cmpl-2", ENTRIES) == [True] * 4
        assert await journal.find("cmpl-1") is None

    with opened(path, retry_s=0.1, patience_s=0.2) as journal:
        asyncio.run(run(journal))


def test_a_file_that_is_removed_is_begun_anew(path: Path) -> None:
    async def run(journal: SqliteJournal) -> None:
        client = Client(journal)
        await client.keep("cmpl-1", ENTRIES)
        for file in list(path.parent.iterdir()):
            file.unlink()

        async def is_back() -> bool:
            return path.exists() and journal.trouble is None

        await eventually(is_back)
        assert await client.say("cmpl-1", 3, [ENTRIES[1]]) == [False]
        assert await client.keep("cmpl-2", ENTRIES) == [True] * 4

    with opened(path, retry_s=0.1) as journal:
        asyncio.run(run(journal))


def test_a_folder_that_cannot_be_made_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with opened(tmp_path / "file" / "journal.sqlite") as journal:
        assert "not written since" in (journal.trouble or "")
        assert asyncio.run(Client(journal).keep("cmpl-1", ENTRIES)) == [False] * 4
