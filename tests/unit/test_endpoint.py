"""Who gets in, over real sockets and real TLS; and that the rest hurts nobody."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_cluster import SmallCluster

from shoal.errors import ConfigError, PeerLost, PeerRefused, ShoalError
from shoal.parallel.address import HostAddress, parse_address
from shoal.parallel.channel import Channel
from shoal.parallel.endpoint import LocalOnly, MutualTls, Plaintext, Security, dial, listen
from shoal.parallel.handshake import PREAMBLE
from shoal.parallel.listener import Listener

SOON_S = 5.0
TLS_ADDRESS, TCP_ADDRESS = "tls:127.0.0.1:0", "tcp:127.0.0.1:0"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> SmallCluster:
    return SmallCluster(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def head(cluster: SmallCluster) -> MutualTls:
    return MutualTls(cluster.join("head"))


@pytest.fixture(scope="module")
def worker(cluster: SmallCluster) -> MutualTls:
    return MutualTls(cluster.join("worker"))


@pytest.fixture
def tls(head: MutualTls) -> Iterator[Listener]:
    listener = listen(TLS_ADDRESS, head)
    yield listener
    listener.close()


@pytest.fixture
def plain() -> Iterator[Listener]:
    listener = listen(TCP_ADDRESS, Plaintext())
    yield listener
    listener.close()


def connect(listener: Listener) -> socket.socket:
    target = parse_address(listener.address)
    assert isinstance(target, HostAddress)
    stream = socket.create_connection((target.host, target.port))
    stream.settimeout(SOON_S)
    return stream


def check_that_others_get_in(listener: Listener, security: Security) -> None:
    with_dialler = dial(listener.address, security, timeout_s=SOON_S)
    accepted = listener.accept(SOON_S)
    with_dialler.send(b"head", b"body")
    assert accepted.receive(SOON_S) == (b"head", b"body")
    for channel in (with_dialler, accepted):
        channel.close()


def wait_for_log(caplog: pytest.LogCaptureFixture, words: str) -> None:
    end_s = time.monotonic() + SOON_S
    while words not in caplog.text:
        assert time.monotonic() < end_s, f"{words!r} is not in {caplog.text!r}"
        time.sleep(0.002)
    assert "refused 127.0.0.1:" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def answer_to(sent: bytes, listener: Listener) -> bytes:
    with connect(listener) as stream:
        stream.sendall(sent)
        with suppress(OSError):  # refused already
            stream.shutdown(socket.SHUT_WR)
        return read_to_the_end(stream)


def read_to_the_end(stream: socket.socket) -> bytes:
    received = b""
    try:
        while piece := stream.recv(4096):
            received += piece
    except ConnectionResetError:
        pass
    return received


def test_both_sides_learn_the_others_name(tls: Listener, worker: MutualTls) -> None:
    dialled = dial(tls.address, worker, timeout_s=SOON_S)
    accepted = tls.accept(SOON_S)
    assert (dialled.peer, accepted.peer) == ("head", "worker")
    assert isinstance(dialled._stream, ssl.SSLSocket)
    assert dialled._stream.version() == "TLSv1.3"
    dialled.send(b"head", bytes(100_000))
    assert accepted.receive(SOON_S) == (b"head", bytearray(100_000))
    dialled.close()
    with pytest.raises(PeerLost):
        accepted.receive(SOON_S)
    accepted.close()


def test_what_was_sent_before_the_end_arrives(tls: Listener, worker: MutualTls) -> None:
    dialled = dial(tls.address, worker, timeout_s=SOON_S)
    accepted = tls.accept(SOON_S)
    dialled.send(b"last words", bytes(50_000))
    dialled.close()
    assert accepted.receive(SOON_S)[0] == b"last words"
    accepted.close()


def test_closing_wakes_a_receiver_of_tls(tls: Listener, worker: MutualTls) -> None:
    dialled = dial(tls.address, worker, timeout_s=SOON_S)
    accepted = tls.accept(SOON_S)
    errors: list[ShoalError] = []

    def wait() -> None:
        try:
            accepted.receive()
        except PeerLost as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    accepted.close()
    thread.join(SOON_S)
    assert "is closed" in errors[0].message
    dialled.close()


def test_a_frame_altered_on_the_way_is_refused(tls: Listener, worker: MutualTls) -> None:
    dialled = dial(tls.address, worker, timeout_s=SOON_S)
    accepted = tls.accept(SOON_S)
    # Past the encryption, as somebody on the line would.
    socket.socket.send(dialled._stream, b"\x17\x03\x03\x00\x40" + bytes(64))
    with pytest.raises(PeerRefused, match="not TLS of this connection"):
        accepted.receive(SOON_S)
    for channel in (dialled, accepted):
        channel.close()


def test_plaintext_between_those_who_asked_for_it(plain: Listener) -> None:
    dialled = dial(plain.address, Plaintext(), timeout_s=SOON_S)
    accepted = plain.accept(SOON_S)
    assert (dialled.peer, accepted.peer) == ("plaintext", "plaintext")
    for channel in (dialled, accepted):
        channel.close()
    check_that_others_get_in(plain, Plaintext())


@pytest.mark.parametrize(
    ("intruder", "told", "logged"),
    [
        ("foreign", "TLSV1_ALERT_UNKNOWN_CA|ALERT_DECRYPT_ERROR", "certificate is not accepted"),
        ("expired", "CERTIFICATE_EXPIRED", "certificate has expired"),
        ("anonymous", "CERTIFICATE_REQUIRED", "showed no certificate"),
    ],
)
def test_a_wrong_certificate_is_refused_and_told_so(
    tls: Listener,
    worker: MutualTls,
    cluster: SmallCluster,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    intruder: str,
    told: str,
    logged: str,
) -> None:
    if intruder == "expired":
        security = MutualTls(cluster.expired("old"))
    else:
        foreign = SmallCluster(tmp_path / "foreign").trusting("worker", cluster)
        security = MutualTls(foreign)
        if intruder == "anonymous":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(cluster.folder / "ca" / "ca.pem")
            security = MutualTls(type(foreign)("x", tmp_path, context, context))
    with pytest.raises(PeerRefused, match=told):
        dial(tls.address, security, timeout_s=SOON_S)
    wait_for_log(caplog, logged)
    check_that_others_get_in(tls, worker)


def test_a_listener_of_another_cluster_is_refused(
    tls: Listener, worker: MutualTls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = MutualTls(SmallCluster(tmp_path).join("worker"))
    with pytest.raises(PeerRefused, match="its certificate is not accepted"):
        dial(tls.address, stranger, timeout_s=SOON_S)
    wait_for_log(caplog, "refused this node's certificate")
    check_that_others_get_in(tls, worker)


def test_a_plaintext_peer_is_refused_by_tls(
    tls: Listener, worker: MutualTls, caplog: pytest.LogCaptureFixture
) -> None:
    address = tls.address.replace("tls:", "tcp:")
    with pytest.raises((PeerRefused, PeerLost)):
        dial(address, Plaintext(), timeout_s=SOON_S)
    wait_for_log(caplog, "perhaps no TLS at all")
    check_that_others_get_in(tls, worker)


def test_a_tls_peer_is_refused_by_plaintext(
    plain: Listener, worker: MutualTls, caplog: pytest.LogCaptureFixture
) -> None:
    address = plain.address.replace("tcp:", "tls:")
    with pytest.raises(PeerRefused, match="perhaps no TLS at all"):
        dial(address, worker, timeout_s=SOON_S)
    wait_for_log(caplog, "it speaks TLS, and this side was told not to")
    check_that_others_get_in(plain, Plaintext())


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "it is not Shoal"),
        (b"SHOAL/7\n", "it runs another version of Shoal"),
        (b"", "hung up during the handshake"),
        (PREAMBLE[:3], "hung up during the handshake"),
    ],
)
def test_who_speaks_something_else_is_refused_by_plaintext(
    plain: Listener, caplog: pytest.LogCaptureFixture, sent: bytes, logged: str
) -> None:
    assert answer_to(sent, plain) in (PREAMBLE, b"")
    wait_for_log(caplog, logged)
    check_that_others_get_in(plain, Plaintext())


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"0" * 9, b"\x16\x03\x01"])
def test_who_hangs_up_or_talks_nonsense_is_refused_by_tls(
    tls: Listener, worker: MutualTls, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    answer_to(sent, tls)
    wait_for_log(caplog, "refused")
    check_that_others_get_in(tls, worker)


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_silent_peer_holds_up_nobody(head: MutualTls, worker: MutualTls, encrypted: bool) -> None:
    address = TLS_ADDRESS if encrypted else TCP_ADDRESS
    listener = listen(address, head if encrypted else Plaintext(), handshake_s=10 * SOON_S)
    silent = [connect(listener) for _ in range(3)]
    check_that_others_get_in(listener, worker if encrypted else Plaintext())
    listener.close()
    for stream in silent:
        stream.close()


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_silent_peer_is_hung_up_on(
    head: MutualTls, caplog: pytest.LogCaptureFixture, encrypted: bool
) -> None:
    address = TLS_ADDRESS if encrypted else TCP_ADDRESS
    listener = listen(address, head if encrypted else Plaintext(), handshake_s=0.02)
    with connect(listener) as stream:
        assert read_to_the_end(stream) == b""
    wait_for_log(caplog, "was not done within 0.02 s")
    listener.close()


def test_a_peer_that_computes_while_much_waits_for_it_is_not_lost(
    tls: Listener, worker: MutualTls
) -> None:
    dialled = dial(tls.address, worker, timeout_s=SOON_S)
    accepted = tls.accept(SOON_S)

    def patience_ms() -> int:
        return dialled._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    dialled.send(b"small", bytes(1000))
    assert patience_ms() == 1000
    dialled.send(b"large", bytes(100_000))
    assert patience_ms() == 30_000
    dialled.set_patience(2.0)
    dialled.send(b"large", bytes(100_000))
    assert patience_ms() == 2000
    for channel in (dialled, accepted):
        channel.close()


def test_a_crowd_of_silent_peers_drives_out_its_own() -> None:
    listener = listen(TCP_ADDRESS, Plaintext(), handshake_s=10 * SOON_S)
    crowd = [connect(listener) for _ in range(80)]
    check_that_others_get_in(listener, Plaintext())
    assert crowd[0].recv(1) == b""
    for stream in crowd:
        stream.close()
    listener.close()


def test_a_silent_listener_is_given_up(worker: MutualTls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tls:127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PeerLost, match=f"{address}: the handshake was not done within 0.05 s"):
            dial(address, worker, timeout_s=0.05)


@pytest.mark.parametrize("address", ["tls:127.0.0.1:1", "tls:no.such.host.invalid:7000"])
def test_nobody_there(worker: MutualTls, address: str) -> None:
    with pytest.raises(PeerLost, match="cannot be reached"):
        dial(address, worker, timeout_s=SOON_S)


def test_accepting_ends_at_the_deadline_and_when_the_listener_closes() -> None:
    listener = listen(TCP_ADDRESS, Plaintext())
    with pytest.raises(PeerLost, match="nobody connected"):
        listener.accept(0.01)
    closing = threading.Timer(0.02, listener.close)
    closing.start()
    for _ in range(2):
        with pytest.raises(PeerLost, match="is closed"):
            listener.accept(SOON_S)
    closing.join()
    listener.close()


def test_closing_hangs_up_on_those_who_were_not_accepted_and_leaves_no_thread() -> None:
    before = threading.active_count()
    listener = listen(TCP_ADDRESS, Plaintext())
    waiting = dial(listener.address, Plaintext(), timeout_s=SOON_S)
    silent = connect(listener)
    listener.close()
    with pytest.raises(PeerLost):
        waiting.receive(SOON_S)
    assert read_to_the_end(silent) == b""
    assert threading.active_count() == before
    waiting.close()
    silent.close()


def test_unix_sockets_live_in_a_private_folder(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/sockets/worker-0"
    listener = listen(address, LocalOnly())
    assert listener.address == address
    assert (tmp_path / "sockets").stat().st_mode & 0o777 == 0o700
    dialled = dial(address, LocalOnly(), timeout_s=SOON_S)
    accepted = listener.accept(SOON_S)
    assert (dialled.peer, accepted.peer) == ("local", "local")
    for end in (dialled, accepted, listener):
        end.close()
    assert list((tmp_path / "sockets").iterdir()) == []
    with pytest.raises(PeerLost, match="cannot be reached"):
        dial(address, LocalOnly(), timeout_s=SOON_S)


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    for call in (
        lambda: listen(f"unix:{tmp_path}/s", LocalOnly()),
        lambda: dial(f"unix:{tmp_path}/s", LocalOnly(), timeout_s=SOON_S),
    ):
        with pytest.raises(ConfigError, match=r"others may enter .* \(mode 750"):
            call()


@pytest.mark.parametrize(
    ("address", "security", "advice"),
    [
        (TLS_ADDRESS, LocalOnly(), "shoal join"),
        (TLS_ADDRESS, Plaintext(), "leave the option out"),
        (TCP_ADDRESS, LocalOnly(), "use tls:HOST:PORT"),
    ],
)
def test_a_scheme_that_is_not_allowed_says_what_to_do(
    address: str, security: Security, advice: str
) -> None:
    calls: list[Callable[[], Channel | Listener]] = [
        lambda: listen(address, security),
        lambda: dial(address, security, timeout_s=SOON_S),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=advice):
            call()


def test_encrypted_mode_refuses_plaintext(worker: MutualTls) -> None:
    with pytest.raises(ConfigError, match="neither encrypted nor"):
        dial(TCP_ADDRESS, worker, timeout_s=SOON_S)


def test_an_address_that_is_taken_is_named(plain: Listener) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen at {plain.address}: Address already"):
        listen(plain.address, Plaintext())


@pytest.mark.parametrize(
    "address",
    ["tls", "tls:host", "tls::1", "tls:host:port", "tls:host:70000", "udp:host:1", "unix:a"],
)
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        parse_address(address)


@pytest.mark.parametrize("address", ["unix:/run/s", "tls:host.example:7000", "tcp:[::1]:0"])
def test_an_address_is_written_as_it_is_read(address: str) -> None:
    assert str(parse_address(address)) == address
