"""Frames over sockets: what arrives, and what happens when the other side misbehaves."""

from __future__ import annotations

import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import FrameError, InternalError, PeerLost
from shoal.parallel.channel import Channel
from shoal.parallel.frames import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    decode_prefix,
    encode_prefix,
)

SOON_S = 5.0


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(stream, "local") for stream in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A socket that can send any bytes, and the channel that receives them."""
    stream, other = socket.socketpair()
    channel = Channel(other, "local")
    yield stream, channel
    stream.close()
    channel.close()


def frame(sequence: int, header: bytes, body: bytes = b"") -> bytes:
    return encode_prefix(sequence, len(header), len(body)) + header + body


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize("num_bytes", [0, 1, 2300, 16 * 1024, 16 * 1024 + 1, 3_000_000])
def test_what_is_sent_arrives(pair: tuple[Channel, Channel], num_bytes: int) -> None:
    sender, receiver = pair
    body = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    headers = [b"", b"head", b"h" * 40_000]
    thread = in_thread(lambda: [sender.send(header, body) for header in headers])
    received = [receiver.receive(SOON_S) for _ in headers]
    thread.join()
    assert received == [(header, body) for header in headers]
    assert sender.sent_messages == len(headers)
    assert sender.sent_bytes == sum(PREFIX_BYTES + len(h) + num_bytes for h in headers)


def test_a_body_is_received_in_place(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    for num_bytes in (10, 100_000):
        buffer = bytearray(num_bytes)
        thread = in_thread(lambda n=num_bytes: sender.send(b"head", memoryview(b"x" * n)))
        assert receiver.receive_into(buffer, SOON_S) == b"head"
        thread.join()
        assert buffer == b"x" * num_bytes


@pytest.mark.parametrize("comes_after_s", [0.0, 0.02, 0.2])
def test_who_looks_before_it_sleeps_gets_the_frame_all_the_same(
    pair: tuple[Channel, Channel], comes_after_s: float
) -> None:
    sender, receiver = pair
    sender.send(b"first", b"1")
    buffer = bytearray(1)
    assert receiver.receive_into(buffer, SOON_S, poll_s=0.1) == b"first"
    sending = threading.Timer(comes_after_s, sender.send, (b"second", b"2"))
    sending.start()
    assert receiver.receive_into(buffer, SOON_S, poll_s=0.1) == b"second"
    assert buffer == b"2"
    sending.join()
    with pytest.raises(PeerLost, match=r"silent for 0\.05 s"):
        receiver.receive_into(buffer, 0.05, poll_s=0.01)


def test_a_body_of_another_length_is_refused(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    sender.send(b"", b"four")
    with pytest.raises(FrameError, match="4 bytes where 5 are due"):
        receiver.receive_into(bytearray(5), SOON_S)


def test_frames_of_several_threads_do_not_mix(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    bodies = [bytes([i]) * 20_000 for i in range(4)]
    threads = [in_thread(lambda b=body: sender.send(b[:1], b)) for body in bodies]
    received = dict(receiver.receive(SOON_S) for _ in bodies)
    for thread in threads:
        thread.join()
    assert received == {body[:1]: body for body in bodies}


def test_many_frames_at_once_come_out_one_by_one(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw
    stream.sendall(b"".join(frame(i, b"%d" % i, b"x" * i) for i in range(300)))
    for i in range(300):
        assert channel.receive(SOON_S) == (b"%d" % i, b"x" * i)


def test_a_frame_in_pieces_is_put_together(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw

    def dribble() -> None:
        for byte in frame(0, b"head", b"body"):
            stream.send(bytes([byte]))

    thread = in_thread(dribble)
    assert channel.receive(SOON_S) == (b"head", b"body")
    thread.join()


def test_a_replayed_frame_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw
    stream.sendall(frame(0, b"pay", b"100") * 2)
    assert channel.receive(SOON_S) == (b"pay", b"100")
    with pytest.raises(FrameError, match="frame number 0 where 1 is due"):
        channel.receive(SOON_S)
    with pytest.raises(PeerLost, match="closed"):
        channel.receive(SOON_S)


def test_a_left_out_frame_is_noticed(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw
    stream.sendall(frame(1, b"second"))
    with pytest.raises(FrameError, match="frame number 1 where 0 is due"):
        channel.receive(SOON_S)


@pytest.mark.parametrize(
    "sent", [frame(0, b"head", b"body")[:-1], frame(0, b"head")[:-1], frame(0, b"")[:-1], b"S"]
)
def test_a_truncated_frame_is_a_lost_peer(raw: tuple[socket.socket, Channel], sent: bytes) -> None:
    stream, channel = raw
    stream.sendall(sent)
    stream.close()
    with pytest.raises(PeerLost, match="hung up"):
        channel.receive(SOON_S)


def test_foreign_bytes_are_refused(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw
    stream.sendall(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
    with pytest.raises(FrameError, match="not a Shoal frame: it begins with b'GET '"):
        channel.receive(SOON_S)


def test_another_version_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw
    fields = struct.pack("!4sIQIQ", b"SHOL", 2, 0, 0, 0)
    stream.sendall(fields + struct.pack("!I", zlib.crc32(fields)))
    with pytest.raises(FrameError, match="version 2, not 1"):
        channel.receive(SOON_S)


@pytest.mark.parametrize("lengths", [(MAX_HEADER_BYTES + 1, 0), (0, MAX_BODY_BYTES + 1)])
def test_a_monstrous_length_allocates_nothing(
    raw: tuple[socket.socket, Channel], lengths: tuple[int, int]
) -> None:
    stream, channel = raw
    fields = struct.pack("!4sIQIQ", b"SHOL", 1, 0, *lengths)
    stream.sendall(fields + struct.pack("!I", zlib.crc32(fields)))
    with pytest.raises(FrameError, match="may travel at once"):
        channel.receive(SOON_S)


def test_a_length_below_what_is_sent_shows_in_the_next_frame(
    raw: tuple[socket.socket, Channel],
) -> None:
    stream, channel = raw
    stream.sendall(encode_prefix(0, 4, 4) + b"head" + b"body" + b"and what the lie left out" * 2)
    assert channel.receive(SOON_S) == (b"head", b"body")
    with pytest.raises(FrameError, match="not a Shoal frame"):
        channel.receive(SOON_S)


def test_a_length_above_what_is_sent_ends_at_the_deadline(
    raw: tuple[socket.socket, Channel],
) -> None:
    stream, channel = raw
    stream.sendall(encode_prefix(0, 4, 1000) + b"head" + b"short")
    with pytest.raises(PeerLost, match=r"silent for 0\.05 s"):
        channel.receive(0.05)
    with pytest.raises(PeerLost, match="closed"):
        channel.receive(SOON_S)


def test_a_trickle_does_not_stretch_the_deadline(raw: tuple[socket.socket, Channel]) -> None:
    stream, channel = raw
    done = threading.Event()

    def trickle() -> None:
        for byte in frame(0, b"h" * 1000):
            with suppress(BrokenPipeError):
                stream.send(bytes([byte]))
            if done.wait(0.01):
                return

    thread = in_thread(trickle)
    begin_s = time.monotonic()
    with pytest.raises(PeerLost):
        channel.receive(0.1)
    waited_s = time.monotonic() - begin_s
    done.set()
    thread.join()
    assert 0.1 <= waited_s < 1.0


def test_after_a_deadline_between_frames_one_may_wait_again(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    with pytest.raises(PeerLost, match=r"silent for 0\.01 s"):
        receiver.receive(0.01)
    sender.send(b"late")
    assert receiver.receive(SOON_S) == (b"late", b"")


def test_sending_to_a_peer_that_does_not_read_ends_at_the_deadline(
    pair: tuple[Channel, Channel],
) -> None:
    sender, _ = pair
    with pytest.raises(PeerLost, match="silent"):
        sender.send(b"", bytes(10_000_000), timeout_s=0.05)


def test_sending_to_a_peer_that_is_gone_is_a_lost_peer(pair: tuple[Channel, Channel]) -> None:
    sender, receiver = pair
    receiver.close()
    with pytest.raises(PeerLost):
        sender.send(b"head")
    with pytest.raises(PeerLost, match="closed"):
        sender.send(b"head")


@pytest.mark.parametrize("call", ["receive", "send"])
def test_close_wakes_whoever_waits(pair: tuple[Channel, Channel], call: str) -> None:
    channel, _ = pair
    outcome: list[Exception] = []

    def wait() -> None:
        try:
            if call == "receive":
                channel.receive()
            else:
                channel.send(b"", bytes(10_000_000))
        except PeerLost as error:
            outcome.append(error)

    thread = in_thread(wait)
    time.sleep(0.02)
    assert thread.is_alive()
    channel.close()
    thread.join(SOON_S)
    assert "closed" in str(outcome[0])
    channel.close()


def test_both_directions_at_once_are_our_bug(pair: tuple[Channel, Channel]) -> None:
    channel, other = pair
    thread = in_thread(lambda: channel.receive(SOON_S))
    time.sleep(0.02)
    with pytest.raises(InternalError, match="two threads at once"):
        channel.send(b"")
    other.send(b"")
    thread.join()


@given(
    sequence=st.integers(0, 2**64 - 1),
    header_bytes=st.integers(0, MAX_HEADER_BYTES),
    body_bytes=st.integers(0, MAX_BODY_BYTES),
)
def test_a_prefix_survives_the_round_trip(
    sequence: int, header_bytes: int, body_bytes: int
) -> None:
    prefix = encode_prefix(sequence, header_bytes, body_bytes)
    assert decode_prefix(prefix, sequence=sequence) == (header_bytes, body_bytes)


@given(
    header=st.binary(max_size=40),
    body=st.binary(max_size=40),
    damage=st.dictionaries(st.integers(0, PREFIX_BYTES - 1), st.integers(1, 255), min_size=1),
)
def test_a_damaged_prefix_never_yields_a_message(
    header: bytes, body: bytes, damage: dict[int, int]
) -> None:
    sent = bytearray(frame(0, header, body))
    for position, bits in damage.items():
        sent[position] ^= bits
    stream, other = socket.socketpair()
    channel = Channel(other, "local")
    with stream:
        stream.sendall(sent)
        with pytest.raises(FrameError):
            channel.receive(SOON_S)
    channel.close()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_end(noise: bytes) -> None:
    stream, other = socket.socketpair()
    channel = Channel(other, "local")
    stream.sendall(noise)
    stream.close()
    with pytest.raises((FrameError, PeerLost)):
        channel.receive(SOON_S)
    channel.close()
