"""Join tokens: what they say, when they let someone in, and what is kept of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shoal.errors import ConfigError, PeerRefused
from shoal.fleet.durations import human_duration, parse_duration_s
from shoal.fleet.state import StateFolder
from shoal.fleet.token_store import TokenStore
from shoal.fleet.tokens import draw_token, parse_token, record_of, spend

FINGERPRINT = "ab" * 32
NOW_S = 1_000_000.0


def store(tmp_path: Path) -> TokenStore:
    return TokenStore(StateFolder(tmp_path))


def test_a_token_survives_being_pasted() -> None:
    token = draw_token(FINGERPRINT)
    assert parse_token(f" {token}\n") == token
    assert token.fingerprint == FINGERPRINT


def test_tokens_are_never_alike() -> None:
    tokens = [draw_token(FINGERPRINT) for _ in range(100)]
    assert len({token.secret for token in tokens}) == 100
    assert all(len(token.secret) == 32 for token in tokens)


@pytest.mark.parametrize("cut", [1, 10, 64, 65, 90])
def test_half_a_token_is_told_from_a_whole_one(cut: int) -> None:
    text = str(draw_token(FINGERPRINT))
    with pytest.raises(ConfigError, match="not a whole join token"):
        parse_token(text[:-cut])


def test_uses_run_out() -> None:
    token = draw_token(FINGERPRINT)
    record = record_of(token, NOW_S, ttl_s=60, uses=2)
    record = spend(record, token.secret, NOW_S)
    record = spend(record, token.secret, NOW_S)
    with pytest.raises(PeerRefused, match="used up") as refused:
        spend(record, token.secret, NOW_S)
    assert refused.value.code == "token_used"


def test_any_number_of_uses() -> None:
    token = draw_token(FINGERPRINT)
    record = record_of(token, NOW_S, ttl_s=60, uses=None)
    assert spend(record, token.secret, NOW_S) == record


def test_time_runs_out() -> None:
    token = draw_token(FINGERPRINT)
    record = record_of(token, NOW_S, ttl_s=60, uses=1)
    assert spend(record, token.secret, NOW_S + 59.9).uses_left == 0
    with pytest.raises(PeerRefused, match=r"expired 30 s ago.*shoal token create") as refused:
        spend(record, token.secret, NOW_S + 90)
    assert refused.value.code == "token_expired"


def test_a_wrong_secret_learns_nothing_about_the_token() -> None:
    record = record_of(draw_token(FINGERPRINT), NOW_S, ttl_s=60, uses=1)
    wrong = draw_token(FINGERPRINT).secret
    messages = set()
    for each, now_s in ((record, NOW_S), (record, NOW_S + 1000), (None, NOW_S)):
        with pytest.raises(PeerRefused) as refused:
            spend(each, wrong, now_s)
        messages.add((refused.value.message, refused.value.code))
    assert len(messages) == 1


def test_the_empty_secret_is_no_key_to_an_unknown_token() -> None:
    with pytest.raises(PeerRefused):
        spend(None, "", NOW_S)


@pytest.mark.parametrize(("ttl_s", "uses"), [(0.0, 1), (-5.0, 1), (60.0, 0), (60.0, -1)])
def test_a_token_that_never_works_is_not_made(ttl_s: float, uses: int) -> None:
    with pytest.raises(ConfigError):
        record_of(draw_token(FINGERPRINT), NOW_S, ttl_s, uses)


# ---- the store ----------------------------------------------------------------------------


def test_the_file_holds_no_secret_and_is_the_owners_alone(tmp_path: Path) -> None:
    token = draw_token(FINGERPRINT)
    store(tmp_path).add(token, NOW_S, 60, 1)
    path = tmp_path / "tokens.json"
    assert token.token_id in path.read_text()
    assert token.secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_spending_is_kept(tmp_path: Path) -> None:
    token = draw_token(FINGERPRINT)
    store(tmp_path).add(token, NOW_S, 60, 1)
    with store(tmp_path).spending(token.token_id, token.secret, NOW_S):
        pass
    with (
        pytest.raises(PeerRefused, match="used up"),
        store(tmp_path).spending(token.token_id, token.secret, NOW_S),
    ):
        pytest.fail("must not come here")


def test_what_fails_does_not_use_the_token_up(tmp_path: Path) -> None:
    token = draw_token(FINGERPRINT)
    store(tmp_path).add(token, NOW_S, 60, 1)
    with (
        pytest.raises(ConfigError),
        store(tmp_path).spending(token.token_id, token.secret, NOW_S),
    ):
        raise ConfigError("the name is taken")
    assert [record.uses_left for record in store(tmp_path).alive(NOW_S)] == [1]


def test_one_of_many_at_once_gets_in(tmp_path: Path) -> None:
    token = draw_token(FINGERPRINT)
    store(tmp_path).add(token, NOW_S, 60, 1)
    outcomes: list[str] = []

    def come() -> None:
        try:
            with store(tmp_path).spending(token.token_id, token.secret, NOW_S):
                outcomes.append("in")
        except PeerRefused:
            outcomes.append("refused")

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in"] + ["refused"] * 5


def test_revoked_and_long_dead_tokens_are_gone(tmp_path: Path) -> None:
    old, revoked, kept = (draw_token(FINGERPRINT) for _ in range(3))
    store(tmp_path).add(old, NOW_S - 10 * 86400, 60, 1)
    store(tmp_path).add(revoked, NOW_S, 60, 1)
    store(tmp_path).add(kept, NOW_S, 120, None)
    store(tmp_path).revoke(revoked.token_id)
    assert [record.token_id for record in store(tmp_path).alive(NOW_S)] == [kept.token_id]
    assert old.token_id not in (tmp_path / "tokens.json").read_text()
    with pytest.raises(ConfigError, match="no token"):
        store(tmp_path).revoke(revoked.token_id)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("[{]")
    with pytest.raises(ConfigError, match=r"tokens\.json"):
        store(tmp_path).alive(NOW_S)


# ---- durations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [("90s", 90), ("30m", 1800), ("1h", 3600), ("1.5h", 5400), ("7D", 604800)],
)
def test_durations(text: str, duration_s: float) -> None:
    assert parse_duration_s(text) == duration_s


@pytest.mark.parametrize("text", ["", "1", "h", "0s", "-1h", "1y", "1h30m"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 90s"):
        parse_duration_s(text)


def test_durations_read_back() -> None:
    assert [human_duration(s) for s in (45, 90, 5400, 3600, 172800)] == [
        "45 s",
        "1.5 m",
        "1.5 h",
        "1 h",
        "2 d",
    ]
