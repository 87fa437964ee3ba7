# SPDX-License-Identifier: Apache-2.0
"""What operators are compared with where a library has a faster product in bfloat16, or another function altogether."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from cofire.bench import cases as suite
from cofire.bench import (
    dense_products,
    harness,
    lowbit,
    shift_add_attention,
    shift_add_linear,
    shift_add_softmax,
    sparse,
    sparse_refine,
)
from cofire.bench.cases import Case, Provider, Random
from cofire.bench.dense_products import SAME_DTYPE
from cofire.bench.peers import of_case
from cofire.bench.peers._attention import of_half
from cofire.ops import unpack_mask
from cofire.registry import OPERATORS

HALF = torch.bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


def variants(case: Case, provider: str = "dense") -> Mapping[str, Provider]:
    found = case.providers[provider]
    assert isinstance(found, Mapping)
    return found


def error(case: Case, provider: Provider, mode: str = "forward", tiny: bool = True) -> str | None:
    return harness.Input(case, "cpu", tiny).check(provider, mode, harness.slack("dense"))


# ------------------------------------------------------------------------------------------------- dense products


@pytest.fixture
def fast_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "has_half", lambda rows: True)


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "has_half", lambda rows: False)


@pytest.mark.usefixtures("fast_half")
def test_sparse_products_in_fp32_are_compared_with_dense_ones_of_both_dtypes() -> None:
    for case in (sparse._spmm(512, 0.1, "csr"), sparse._spmm(1, 0.5, "bitmap", values=torch.int8)):
        assert {"fp32", "bf16"} <= set(variants(case))
        assert set(variants(case, SAME_DTYPE)) == {"fp32", "fp32 packed"}
        assert error(case, variants(case)["bf16"]) is None


@pytest.mark.usefixtures("slow_half")
def test_without_fast_products_in_bfloat16_there_is_one_dense_row() -> None:
    case = sparse._spmm(512, 0.1, "csr")
    assert set(variants(case)) == {"fp32", "fp32 packed"} and SAME_DTYPE not in case.providers


@pytest.mark.usefixtures("fast_half")
def test_sparse_products_in_bf16_have_one_dense_row() -> None:
    case = sparse._spmm(512, 0.1, "csr", dtype=HALF)
    assert {"fp32", "bf16"} <= set(variants(case)) and SAME_DTYPE not in case.providers
    assert variants(case)["bf16"].reference is None, "the operator's own"


@pytest.mark.usefixtures("fast_half")
def test_a_product_of_half_is_checked_against_its_own_rounding() -> None:
    case = sparse._spmm(16, 0.1, "csr")
    provider = variants(case)["bf16"]
    assert error(case, provider) is None
    assert "off by" in str(error(case, replace(provider, reference=None)))

    def doubled(*args: Any) -> Any:
        run = provider.setup(*args)
        return lambda: run() * 1.25

    assert "off by" in str(error(case, replace(provider, setup=doubled)))


@pytest.mark.usefixtures("fast_half")
def test_one_row_of_shifts_is_compared_with_bf16() -> None:
    cases = [c for c in shift_add_linear.CASES if "int8" not in c.name]
    for case in cases:
        assert ("bf16" in variants(case)) == case.name.startswith("M1 "), case
    assert error(cases[0], variants(cases[0])["bf16"]) is None
    assert "bf16" not in variants(lowbit.qlinear_case(1)), "4 bits are compared with the dtype of the input"


# ------------------------------------------------------------------------------------------------- masks and routes


@pytest.mark.parametrize("way", ["invariant", "hard"])
def test_dense_masked_layers_compute_what_the_mode_says(way: str) -> None:
    """A hard mask also where pruned weights are not zero, as they are in the case; an invariant one may count on that."""
    case = sparse._masked_linear(64, way)
    make = case.tiny

    def filled(rand: Random) -> tuple[Any, ...]:
        x, w, bits, *rest = make(rand)
        return x, torch.where(w == 0, 3.0, w) if way == "hard" else w, bits, *rest

    case = replace(case, tiny=filled)
    assert set(variants(case)) == {"where", "mask of floats", "in place"}
    for mode in ("forward", "forward+backward"):
        for provider in variants(case).values():
            assert error(case, provider, mode) is None
    bound = case.providers["peer:plain layer"]
    assert isinstance(bound, Provider)
    unmasked = error(case, replace(bound, reference=None), "forward+backward")
    assert "off by" in str(unmasked), "its gradient is not masked"


def test_a_mask_in_place_leaves_the_weight_as_it_is() -> None:
    case = sparse._masked_linear(64, "hard")
    given = harness.Input(case, "cpu", tiny=True)
    given.args = (given.args[0], given.args[1] + 1.0, *given.args[2:])
    before = given.args[1].clone()
    for mode in ("forward", "forward+backward"):
        given.runs(variants(case)["in place"], mode)()
    assert torch.equal(given.args[1], before)


@pytest.mark.parametrize("rows_end", [False, True], ids=["few swaps", "until no row changes"])
def test_swaps_by_torch_are_those_of_the_reference(rows_end: bool) -> None:
    case = sparse_refine._gram(24, 96, 0.5, 96 if rows_end else 3)
    weight, bits, gram, correlation, swaps, _, group = case.make_args(Random("swaps"))
    reference = OPERATORS["gram_swap"].reference
    for candidates in (5, 40):
        args = (weight, bits, gram, correlation, swaps, candidates, group)
        right = reference(*args)
        changed = (unpack_mask(right, 96) != unpack_mask(bits, 96)).sum(1)
        assert changed.max() > 0 and (len(changed.unique()) > 1) == rows_end, "rows end at different times"
        for provider in variants(case).values():
            assert torch.equal(provider.setup(*args)(), right)


def test_routes_by_torch_send_equal_logits_to_the_second_expert() -> None:
    logits = torch.tensor([[0.5, 0.5], [1.0, -1.0], [-3.0, 2.0], [0.25, 0.25], [9.0, 8.5]])
    right = OPERATORS["moe_route"].reference(logits)
    assert right[2].tolist() == [2, 3]
    for case in (c for c in suite.of_family("shift_add") if c.op == "moe_route"):
        for provider in variants(case).values():
            for got, expected in zip(provider.setup(logits)(), right, strict=True):
                torch.testing.assert_close(got, expected, check_dtype=expected.dtype == torch.int32)


# ------------------------------------------------------------------------------------------------------ attention


def test_softmax_of_codes_is_compared_with_bf16_where_less_than_fp32_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift_add_softmax, "has_half", lambda rows: True)
    for precision in ("high", "highest"):
        case = shift_add_softmax._softmax(1, 2, 1024, 64, 64, precision)
        assert ("library bf16" in variants(case)) == (precision == "high")
        (_, entry) = of_case(case, "cpu")["peer:zentorch sdpa"]
        assert isinstance(entry, Mapping) and ("bf16" in entry) == (precision == "high")
    monkeypatch.setattr(shift_add_softmax, "has_half", lambda rows: False)
    assert "library bf16" not in variants(shift_add_softmax._softmax(1, 2, 1024, 64, 64, "high"))


def test_values_of_half_are_values_rounded() -> None:
    args = shift_add_softmax._softmax(1, 2, 1024, 64, 64, "high").tiny(Random("rounded"))
    exact = OPERATORS["binary_softmax_attention"].reference(*args)
    got = of_half(*args)
    off = float((got.double() - exact.double()).abs().max() / exact.double().abs().max())
    assert got.dtype == HALF and 1e-4 < off < 1e-2, "near the exact one, but not it"
    wide = of_half(*harness._in_fp64(args))
    assert wide.dtype == torch.float64 and not torch.equal(wide.float(), got.float())


def test_softmax_attention_has_a_time_beside_linear_attention_and_is_no_variant_of_it() -> None:
    cases = [c for c in suite.of_family("shift_add") if c.op == "binary_linear_attention"]
    timed = [c for c in cases if shift_add_attention.SOFTMAX in c.providers]
    assert {c.name for c in timed} == {"32x1x3136x32, 16 bits", "1x1x3136x32, 16 bits"}
    provider = timed[0].providers[shift_add_attention.SOFTMAX]
    assert isinstance(provider, Provider) and "another function" in shift_add_attention.SOFTMAX
    assert error(timed[0], provider) is None
    assert "off by" in str(error(timed[0], replace(provider, reference=None)))
    assert not provider.differentiable


def test_a_wrong_product_is_refused_though_its_gradients_are_compared_with_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only in the gradients of the large input has it a reference of its own."""
    right = shift_add_attention.attention_by_products

    def wrong(*args: Any) -> Any:
        return right(*args) + 0.01 * args[2]

    for function, passes in ((right, True), (wrong, False)):
        monkeypatch.setattr(shift_add_attention, "attention_by_products", function)
        case = shift_add_attention._attention(1, 1, 64, 32, 16, lossy=True)
        for provider in (case.providers["eager"], variants(case)["products"]):
            assert isinstance(provider, Provider)
            assert provider.gradient_reference is function and provider.reference is None
            for tiny in (True, False):
                for mode in ("forward", "forward+backward"):
                    found = error(case, provider, mode, tiny)
                    if passes or (not tiny and mode == "forward+backward"):
                        assert found is None
                    else:
                        assert "off by" in str(found)
        compiles = case.providers["compile"]
        assert isinstance(compiles, Provider) and compiles.reference is None
        assert variants(case)["library"].gradient_reference is None
    (lossy,) = (
        c for c in shift_add_attention.CASES if c.op == "binary_linear_attention" and c.name.startswith("32x1x")
    )
    assert all(isinstance(p, Provider) and p.gradient_reference for p in (lossy.providers["eager"],))
