"""What one head leaves to the next, in a folder of its user's alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.fleet.session import Session, open_session, session_folder

KEY = "smollm2-135m on port 8000"


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def killed(session: Session) -> None:
    """Its process ends without a word: what it has noted stays, its lock does not."""
    session.note(address="tls:10.0.0.1:4000", num_workers=3)
    raise KeyboardInterrupt


def test_the_first_head_finds_nothing() -> None:
    with open_session(KEY) as session:
        assert (session.address_before, session.num_workers_before) == ("", 0)
        assert session.first_number == 1


def test_a_head_that_was_killed_leaves_where_it_was_and_its_workers() -> None:
    with pytest.raises(KeyboardInterrupt), open_session(KEY) as session:
        killed(session)
    with open_session(KEY) as session:
        assert session.address_before == "tls:10.0.0.1:4000"
        assert session.num_workers_before == 3
        assert session.first_number > 1, "its workers' names are no earlier one's"
    with open_session(KEY) as session:
        assert session.num_workers_before == 0, "the last one ended in order"


def test_names_differ_from_head_to_head() -> None:
    first_numbers = []
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), open_session(KEY) as session:
            first_numbers.append(session.first_number)
            killed(session)
    assert len(set(first_numbers)) == 3
    assert min(b - a for a, b in itertools.pairwise(first_numbers)) >= 1000


def test_a_head_that_dies_before_it_has_workers_leaves_those_of_the_one_before() -> None:
    with pytest.raises(KeyboardInterrupt), open_session(KEY) as session:
        killed(session)
    with pytest.raises(KeyboardInterrupt), open_session(KEY):
        raise KeyboardInterrupt
    with open_session(KEY) as session:
        assert session.num_workers_before == 3


def test_a_second_head_is_refused_as_long_as_the_first_runs() -> None:
    with (
        open_session(KEY),
        pytest.raises(ConfigError, match="another 'shoal serve' is running"),
        open_session(KEY),
    ):
        pass
    with open_session(KEY), open_session("another key"):
        pass


def test_without_a_key_nobody_can_come_back() -> None:
    with open_session(None) as session:
        folder = session.folder
        session.note(num_workers=2)
        with open_session(None) as other:
            assert other.folder != folder and other.num_workers_before == 0
    assert not folder.exists()


def test_the_folder_is_this_users_alone() -> None:
    folder = session_folder(KEY)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert session_folder(KEY) == folder
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="not yours alone"):
        session_folder(KEY)


def test_a_link_to_another_folder_is_refused(base: Path) -> None:
    """Whoever can make one in a shared folder could point it elsewhere later."""
    folder = session_folder(KEY)
    folder.rmdir()
    (base / "mine").mkdir(mode=0o700)
    folder.symlink_to(base / "mine")
    with pytest.raises(ConfigError, match="not yours alone"):
        session_folder(KEY)


def test_a_file_in_its_place_is_said() -> None:
    folder = session_folder(KEY)
    folder.rmdir()
    folder.touch()
    with pytest.raises(ConfigError, match="cannot make"):
        session_folder(KEY)


def test_a_broken_note_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), open_session(KEY) as session:
        killed(session)
    (session_folder(KEY) / "session.json").write_bytes(b"{")
    with open_session(KEY) as session:
        assert session.num_workers_before == 0
    assert "is ignored" in caplog.text
