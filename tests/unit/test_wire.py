"""Activations as bytes and back."""

from __future__ import annotations

import pytest
import torch

from shoal.config import WireFormat
from shoal.errors import FrameError
from shoal.parallel.wire import decode, encode, num_wire_bytes

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 576)])
def test_exact_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x_TE = torch.randn(shape).to(dtype)
    body = bytearray(encode(x_TE, "exact"))
    assert len(body) == num_wire_bytes(shape, dtype, "exact")
    assert torch.equal(decode(body, "exact", shape=shape, dtype=dtype), x_TE)


def test_exact_copies_nothing() -> None:
    x_TE = torch.zeros(2, 3)
    sent = encode(x_TE, "exact")
    x_TE[0, 0] = 1.0
    body = bytearray(sent)
    received_TE = decode(body, "exact", shape=(2, 3), dtype=torch.float32)
    assert received_TE[0, 0] == 1.0
    body[:4] = bytes(4)
    assert received_TE[0, 0] == 0.0


def test_what_lies_scattered_or_wants_gradients_is_sent_all_the_same() -> None:
    x_TE = torch.arange(12.0, requires_grad=True).view(3, 4).T
    body = bytearray(encode(x_TE, "exact"))
    assert torch.equal(decode(body, "exact", shape=(4, 3), dtype=torch.float32), x_TE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_within_half_a_step_of_each_group(dtype: torch.dtype) -> None:
    shape = (32, 160)  # groups of 64, 64 and 32 columns
    magnitudes_TE = torch.logspace(-6, 6, 96).view(32, 3).repeat_interleave(64, dim=1)[:, :160]
    x_TE = (torch.randn(shape) * magnitudes_TE).to(dtype)
    body = bytearray(encode(x_TE, "int8"))
    received_TE = decode(body, "int8", shape=shape, dtype=dtype)
    assert received_TE.dtype == dtype
    rounding_TE = x_TE.float().abs() * torch.finfo(dtype).eps
    error_TE = (received_TE.float() - x_TE.float()).abs() - rounding_TE
    for group_TC, errors_TC in zip(x_TE.split(64, dim=1), error_TE.split(64, dim=1), strict=True):
        half_step_T1 = group_TC.float().abs().amax(1, keepdim=True) / 127 / 2
        assert (errors_TC <= half_step_T1 * 1.001).all()
    assert len(body) == 32 * 3 * 4 + 32 * 160


def test_int8_of_zeros_is_zeros_and_the_largest_value_is_kept() -> None:
    x_TE = torch.tensor([[0.0, 0.0], [254.0, -254.0]])
    body = bytearray(encode(x_TE, "int8"))
    assert torch.equal(decode(body, "int8", shape=(2, 2), dtype=torch.float32), x_TE)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_int8_does_not_hide_an_overflow(bad: float) -> None:
    x_TE = torch.ones(2, 4)
    x_TE[1, 2] = bad
    received_TE = decode(bytearray(encode(x_TE, "int8")), "int8", shape=(2, 4), dtype=torch.float32)
    assert torch.equal(received_TE[0], x_TE[0])
    assert received_TE[1].isnan().all()


@pytest.mark.parametrize("wire_format", ["exact", "int8"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (0, 0)])
def test_a_body_of_the_wrong_length_is_refused(
    wire_format: WireFormat, shape: tuple[int, int]
) -> None:
    body = bytearray(encode(torch.ones(2, 5), wire_format))
    with pytest.raises(FrameError, match=f"{len(body)} bytes of activations"):
        decode(body, wire_format, shape=shape, dtype=torch.float32)
