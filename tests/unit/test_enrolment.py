"""A head's door and those that knock, over real TLS on loopback."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from shoal.errors import ConfigError, PeerLost, PeerRefused
from shoal.fleet.enrol import answers, enrol, fetch_authority
from shoal.fleet.enrolment import MAX_BODY_BYTES, EnrolmentDoor, RefusalLimit
from shoal.fleet.found import found_cluster
from shoal.fleet.registrar import Registrar
from shoal.fleet.state import Membership, StateFolder
from shoal.fleet.token_store import TokenStore
from shoal.fleet.tokens import TokenText, draw_token, parse_token
from shoal.parallel.identity import CA_FILE, create_authority, fingerprint, load_identity

HEAD = "127.0.0.2"
FOREVER_S = 4e9
"""Later than any clock of a test machine: tokens here are made as of 1970."""


@dataclass
class Head:
    """A head without Ray."""

    folder: StateFolder
    present: set[str] = field(default_factory=set)
    reports: list[str] = field(default_factory=list)
    port: int = 0

    def token(self, *, ttl_s: float = FOREVER_S, uses: int | None = 1) -> TokenText:
        token = draw_token(fingerprint((self.folder.authority / CA_FILE).read_bytes()))
        TokenStore(self.folder).add(token, 0.0, ttl_s, uses)
        return token

    def let_in(
        self, folder: Path, token: TokenText, node: str = "b", address: str = "127.0.0.3"
    ) -> Membership:
        return enrol(
            StateFolder(folder),
            token,
            head_address=HEAD,
            port=self.port,
            node=node,
            address=address,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(StateFolder(tmp_path_factory.mktemp("head")))
    membership = found_cluster(head.folder, node="a", address=HEAD, port=0)
    registrar = Registrar(head.folder, membership, lambda: head.present)
    door = EnrolmentDoor(
        head.folder,
        registrar,
        host=HEAD,
        port=0,
        report=head.reports.append,
        limit=RefusalLimit(most=10**6),
    )
    head.port = door.port
    yield head
    door.close()


@pytest.fixture(autouse=True)
def _fresh(head: Head) -> None:
    """No test sees what others did."""
    head.folder.nodes.unlink(missing_ok=True)
    head.present.clear()
    head.reports.clear()


def test_a_machine_joins(head: Head, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "b")
    membership = head.let_in(folder.path, head.token())
    assert folder.load() == membership
    assert not membership.is_head
    assert membership.cluster == head.folder.load().cluster
    assert load_identity(folder.identity).node == "b"
    assert folder.ray_token.read_text() == head.folder.ray_token.read_text()
    assert folder.ray_token.stat().st_mode & 0o077 == 0
    assert answers(folder, membership)
    assert head.reports == ["b (127.0.0.1) has its certificate"]


def test_the_certificate_is_for_the_addresses_it_was_asked_for(head: Head, tmp_path: Path) -> None:
    head.let_in(tmp_path / "b", head.token())
    certificate = x509.load_pem_x509_certificate((tmp_path / "b/identity/node.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == [
        "127.0.0.3",
        "127.0.0.1",
    ]


def test_the_key_never_leaves_the_machine(head: Head, tmp_path: Path) -> None:
    head.let_in(tmp_path / "b", head.token())
    secret = (tmp_path / "b/identity/node.key").read_bytes()
    kept = [path for path in head.folder.path.rglob("*") if path.is_file()]
    assert all(secret not in path.read_bytes() for path in kept)


def test_a_token_for_one_lets_in_one(head: Head, tmp_path: Path) -> None:
    token = head.token(uses=1)
    head.let_in(tmp_path / "b", token)
    with pytest.raises(PeerRefused, match="used up: run 'shoal token create'") as refused:
        head.let_in(tmp_path / "c", token, "c", "127.0.0.4")
    assert refused.value.code == "token_used"
    assert "refused 127.0.0.1, which calls itself 'c'" in head.reports[-1]
    assert StateFolder(tmp_path / "c").find() is None


def test_an_expired_token(head: Head, tmp_path: Path) -> None:
    with pytest.raises(PeerRefused, match="expired"):
        head.let_in(tmp_path / "b", head.token(ttl_s=60))


def test_a_revoked_token(head: Head, tmp_path: Path) -> None:
    token = head.token()
    TokenStore(head.folder).revoke(token.token_id)
    with pytest.raises(PeerRefused, match="knows no such token"):
        head.let_in(tmp_path / "b", token)


def test_a_wrong_secret(head: Head, tmp_path: Path) -> None:
    token = msgspec.structs.replace(head.token(), secret="0" * 32)
    with pytest.raises(PeerRefused, match="knows no such token"):
        head.let_in(tmp_path / "b", token)


def test_the_token_of_another_cluster_is_never_sent(head: Head, tmp_path: Path) -> None:
    elsewhere = fingerprint(create_authority(tmp_path / "other"))
    with pytest.raises(PeerRefused, match="not the head that this token is for"):
        head.let_in(tmp_path / "b", draw_token(elsewhere))
    assert head.reports == []


def test_a_machine_in_between_gets_no_token(head: Head, tmp_path: Path) -> None:
    """It can show the true authority's certificate, but has none of its own from it."""
    fake = StateFolder(tmp_path / "fake")
    membership = found_cluster(fake, node="a", address=HEAD, port=0)
    true_ca = (head.folder.authority / CA_FILE).read_bytes()
    (fake.authority / CA_FILE).write_bytes(true_ca)
    reports: list[str] = []
    door = EnrolmentDoor(
        fake, Registrar(fake, membership, set), host=HEAD, port=0, report=reports.append
    )
    try:
        assert fetch_authority(HEAD, door.port, fingerprint(true_ca)) == true_ca
        with pytest.raises(PeerRefused, match="cannot prove that it is the head"):
            enrol(
                StateFolder(tmp_path / "b"),
                head.token(),
                head_address=HEAD,
                port=door.port,
                node="b",
                address="127.0.0.3",
            )
    finally:
        door.close()
    assert reports == []


def test_the_wrong_address_of_the_right_head(head: Head, tmp_path: Path) -> None:
    """A certificate is for addresses: a node could not pass for the head at another one."""
    membership = head.let_in(tmp_path / "b", head.token())
    elsewhere = msgspec.structs.replace(membership, head_address="127.0.0.9")
    assert not answers(StateFolder(tmp_path / "b"), elsewhere)  # nothing listens there


@pytest.mark.parametrize(
    ("node", "address", "why"),
    [
        ("a", "127.0.0.3", "'a' belongs to the machine at 127.0.0.2"),
        ("b", HEAD, "127.0.0.2 is the address of 'a'"),
        ("b", "127.0.0.1", "not this machine's alone"),
        ("old", "127.0.0.9", "'old' belongs to the machine at 127.0.0.8"),
        ("b", "127.0.0.8", "127.0.0.8 is the address of 'old'"),
    ],
)
def test_nobody_passes_for_another(
    head: Head, tmp_path: Path, node: str, address: str, why: str
) -> None:
    head.let_in(tmp_path / "old", head.token(), "old", "127.0.0.8")
    token = head.token()
    with pytest.raises(PeerRefused, match=why):
        head.let_in(tmp_path / "b", token, node, address)
    # The token is as good as before.
    head.let_in(tmp_path / "b", token, "b", "127.0.0.3")


def test_a_machine_may_come_again_with_another_token(head: Head, tmp_path: Path) -> None:
    head.let_in(tmp_path / "b", head.token())
    head.present.add("b")
    head.let_in(tmp_path / "again", head.token())


def test_an_absent_nodes_name_is_free_after_a_while(head: Head) -> None:
    from shoal.fleet.registrar import ARRIVAL_S, JoinRequest  # noqa: PLC0415
    from shoal.parallel.identity import make_request  # noqa: PLC0415

    registrar = Registrar(head.folder, head.folder.load(), lambda: head.present)
    token = head.token(uses=None)
    csr = make_request(head.folder.path / "scratch", "b").decode()

    def ask(address: str, now_s: float) -> None:
        request = JoinRequest(token=str(token), node="b", addresses=[address], csr=csr)
        registrar.admit(request, now_s)

    ask("127.0.0.3", 1000.0)
    with pytest.raises(PeerRefused, match="belongs to"):
        ask("127.0.0.4", 1000.0 + ARRIVAL_S - 1)
    head.present.add("b")
    with pytest.raises(PeerRefused, match="belongs to"):
        ask("127.0.0.4", 1000.0 + ARRIVAL_S + 1)
    head.present.clear()
    ask("127.0.0.4", 1000.0 + ARRIVAL_S + 1)


def test_a_name_that_cannot_be(head: Head, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a node"):
        head.let_in(tmp_path / "b", head.token(), "../x")


def test_no_head_at_all() -> None:
    with pytest.raises(PeerLost, match="is 'shoal head' running there"):
        fetch_authority(HEAD, 9, "0" * 64)


# ---- those who do not speak as they should ------------------------------------------------


def post(head: Head, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=head.folder.authority / CA_FILE)
    connection = http.client.HTTPSConnection(HEAD, head.port, context=context, timeout=10)
    try:
        connection.request("POST", "/join", body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"token": 1}',
        b"\xff\xfe",
        b'{"token":"","node":"","addresses":[],"x":1}',
    ],
)
def test_nonsense_is_answered_400(head: Head, body: bytes) -> None:
    assert post(head, body)[0] == 400


def test_a_forged_request_for_a_certificate(head: Head) -> None:
    body = {"token": str(head.token()), "node": "b", "addresses": ["127.0.0.3"], "csr": "pem"}
    status, answer = post(head, msgspec.json.encode(body))
    assert status == 403
    assert b"malformed" in answer


@pytest.mark.parametrize("addresses", [[], ["127.0.0.3"] * 9, ["no address"], ["\x1b[2J"], ["a\n"]])
def test_addresses_that_cannot_be(head: Head, addresses: list[str]) -> None:
    body = {"token": str(head.token()), "node": "b", "addresses": addresses, "csr": "x"}
    assert post(head, msgspec.json.encode(body))[0] == 400


@pytest.mark.parametrize("node", ["", "x" * 64, "a\n", "\x1b[2J"])
def test_names_that_cannot_be(head: Head, node: str) -> None:
    body = {"token": str(head.token()), "node": node, "addresses": ["127.0.0.3"], "csr": "x"}
    assert post(head, msgspec.json.encode(body))[0] == 400
    assert all(report.isprintable() for report in head.reports)


def test_a_body_without_end_is_cut_off(head: Head) -> None:
    assert post(head, b"x" * (MAX_BODY_BYTES + 1))[0] == 413


def test_older_tls_is_refused(head: Head) -> None:
    context = ssl.create_default_context(cafile=head.folder.authority / CA_FILE)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = http.client.HTTPSConnection(HEAD, head.port, context=context, timeout=10)
    with pytest.raises(ssl.SSLError):
        connection.request("GET", "/ca")
    connection.close()


def test_who_is_refused_too_often_is_not_listened_to() -> None:
    limit = RefusalLimit(most=3, window_s=60)
    for _ in range(3):
        assert not limit.is_blocked("x", 0.0)
        limit.count("x", 0.0)
    assert limit.is_blocked("x", 59.0)
    assert not limit.is_blocked("y", 59.0)
    assert not limit.is_blocked("x", 60.0)


def test_the_door_keeps_the_limit(head: Head) -> None:
    registrar = Registrar(head.folder, head.folder.load(), set)
    door = EnrolmentDoor(
        head.folder, registrar, host=HEAD, port=0, report=print, limit=RefusalLimit(most=2)
    )
    knocking = replace(head, port=door.port)
    try:
        assert [post(knocking, b"{")[0] for _ in range(3)] == [400, 400, 429]
    finally:
        door.close()


def test_the_limit_remembers_a_bounded_number_of_clients() -> None:
    limit = RefusalLimit(most=1, max_clients=2)
    for client in "xyz":
        limit.count(client, 0.0)
    assert [limit.is_blocked(client, 1.0) for client in "xyz"] == [False, True, True]


# ---- the head's own state -----------------------------------------------------------------


def test_a_head_takes_its_cluster_up_again(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "head")
    first = found_cluster(folder, node="a", address="127.0.0.2", port=1)
    before = (folder.ray_token.read_text(), (folder.authority / CA_FILE).read_bytes())
    second = found_cluster(folder, node="renamed", address="127.0.0.5", port=2)
    assert second.cluster == first.cluster
    assert (folder.ray_token.read_text(), (folder.authority / CA_FILE).read_bytes()) == before
    assert load_identity(folder.identity).node == "renamed"


def test_a_taken_port_is_named(head: Head) -> None:
    registrar = Registrar(head.folder, head.folder.load(), set)
    with pytest.raises(ConfigError, match=f"cannot listen on {HEAD}:{head.port}.*another --port"):
        EnrolmentDoor(head.folder, registrar, host=HEAD, port=head.port, report=print)


def test_tokens_parse_as_printed(head: Head) -> None:
    token = head.token()
    assert parse_token(str(token)) == token
