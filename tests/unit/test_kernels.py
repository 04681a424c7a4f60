"""The scheme that is chosen for what was asked."""

from __future__ import annotations

import pytest
import torch

from shoal.compute import kernels, native
from shoal.compute.kernels import choose_kv_dtype, choose_scheme
from shoal.compute.linear import Scheme
from shoal.errors import ConfigError


@pytest.fixture
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: False)


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", None)


@pytest.mark.skipif(not native.is_available(), reason="csrc was not built: no compiler")
def test_native_kernels_take_any_number_of_rows() -> None:
    for quantize, weights in (("auto", "as_stored"), ("int8", "int8"), ("int4", "int4")):
        scheme = choose_scheme("auto", quantize)  # type: ignore[arg-type]
        assert (scheme.dtype, scheme.few, scheme.many) == (torch.float32, weights, "native")


def test_the_caches_type_is_what_was_asked_for_or_goes_by_the_kernels() -> None:
    whole, native_kernels = Scheme(dtype=torch.bfloat16), Scheme(many="native", few="int8")
    assert choose_kv_dtype("auto", "auto", native_kernels) == torch.float16
    assert choose_kv_dtype("auto", "float32", native_kernels) == torch.float32
    assert choose_kv_dtype("auto", "auto", Scheme()) == torch.float32
    assert choose_kv_dtype("auto", "bfloat16", whole) == torch.bfloat16
    for scheme in (whole, native_kernels):
        assert choose_kv_dtype("int8", "float32", scheme) == torch.int8
        assert choose_kv_dtype("float16", "auto", scheme) == torch.float16
        assert choose_kv_dtype("float32", "bfloat16", scheme) == torch.float32


@pytest.mark.usefixtures("without_native")
def test_without_native_kernels_auto_keeps_activations_whole() -> None:
    scheme = choose_scheme("auto", "auto")
    assert (scheme.dtype, scheme.few, scheme.many) == (torch.float32, "as_stored", "float16")
    assert choose_scheme("auto", "int8").many == "int8"


@pytest.mark.usefixtures("old_processor")
def test_a_named_dtype_means_no_quantisation() -> None:
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        scheme = choose_scheme(dtype, "auto")  # type: ignore[arg-type]
        assert (scheme.dtype, scheme.few, scheme.many) == (expected, None, "dense")
    assert choose_scheme("auto", "none").dtype == torch.float32
    assert choose_scheme("bfloat16", "int8").dtype == torch.bfloat16


def test_bfloat16_is_widened_only_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: True)
    assert choose_scheme("bfloat16", "none").widen_rows is None
    assert choose_scheme("auto", "none").dtype == torch.bfloat16
    monkeypatch.setattr(kernels, "has_native_bfloat16", lambda: False)
    assert choose_scheme("bfloat16", "none").widen_rows is not None


@pytest.mark.usefixtures("without_native")
def test_without_fbgemm_auto_is_dense_and_quantised_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Engines:
        supported_engines = ("qnnpack",)

    monkeypatch.setattr(torch.backends, "quantized", Engines)
    assert choose_scheme("auto", "auto").few is None
    with pytest.raises(ConfigError, match="--quantize none"):
        choose_scheme("auto", "int8")
