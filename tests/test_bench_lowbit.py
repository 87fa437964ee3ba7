# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of low-bit products rests on: its references, the peers' packing, its tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cofire.bench import cases as suite
from cofire.bench import ceilings, harness, lowbit, lowbit_summary, lowbit_torch, peers, results, sparse_summary
from cofire.bench.cases import Provider, Random
from cofire.bench.peers import _onnx, _products
from cofire.bench.peers._products import Product
from cofire.bench.report.tables import markdown_table
from cofire.registry import OPERATORS

HALF = torch.bfloat16


pytestmark = pytest.mark.usefixtures("one_thread")


def args(**options: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {
        "rows": 5, "bits": 4, "group_size": 128, "dtype": torch.float32, "activations": "exact", "format": "uniform",
    }  # fmt: skip
    return lowbit._args(Random("peers"), lowbit.TINY, **(given | options))


def off(got: Tensor, expected: Tensor) -> float:
    """The largest error, in parts of the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


# --------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("format", ["uniform", "minmax", "palette"])
def test_reference_is_the_operator_s(format: str, activations: str) -> None:
    made = args(format=format, activations=activations)
    for given in (made, harness._in_fp64(made)):
        assert torch.equal(_products.reference(*given), OPERATORS["qlinear"].reference(*given))


def test_decoded_weights_are_kept_by_what_they_are_made_of() -> None:
    first, second = Product(*args()), Product(*args(bits=2))
    assert _products.decoded(first) is _products.decoded(first._replace(input=first.input + 1))
    assert _products.decoded(first).dtype == torch.float32
    wide = Product(*harness._in_fp64(first))
    assert _products.decoded(wide).dtype == torch.float64
    assert not torch.equal(_products.decoded(first), _products.decoded(second))
    clone = first._replace(codes=first.codes.flip(0))
    assert not torch.equal(_products.decoded(first), _products.decoded(clone))


@pytest.mark.parametrize(
    ("rounding", "error"), [("by_group", 1e-2), ("seven_bits", 4e-2), ("of_255", 2e-2), ("half", 1e-2)]
)
def test_roundings_of_activations_are_roundings(rounding: str, error: float) -> None:
    """Near the exact product, but not it: the check would otherwise pass a peer that rounds nothing, or in another way."""
    given = args(group_size=32, activations="int8")
    got, exact = getattr(_products, rounding)(*given), _products.exact(*given)
    assert 1e-4 < off(got, exact) < error
    assert off(getattr(_products, rounding)(*harness._in_fp64(given)), got) < 5e-3 if rounding == "half" else 1e-6


def test_inputs_keep_clear_of_halves() -> None:
    x = torch.randn(3, 256)
    x[0, 5] = x[0].abs().max() / 127 * 20.5
    moved = _products.clear_of_halves(x, (32, 128))
    assert off(moved, x) < 0.05
    scale = moved.abs().amax(1, keepdim=True) / 127
    ratio = moved / scale
    assert float((ratio - ratio.floor() - 0.5).abs().min()) > 9e-4
    groups = moved.view(3, -1, 32)
    ratio = groups / (groups.abs().amax(2, keepdim=True) / 127)
    assert float((ratio - ratio.floor() - 0.5).abs().min()) > 9e-4


# -------------------------------------------------------------------------------------------------------- peers


def test_int8_activations_of_few_features_make_a_case() -> None:
    """Fewer than a group of the peers."""
    (case,) = suite.select(["shift_add"], False, None, ["M3136 512x64 shifts of 4 bits int8 activations"])
    assert case.make_args(Random(str(case)))[0].shape == (3136, 64)


def test_peers_of_torch_itself_are_always_there() -> None:
    def names(*given: Any) -> set[str]:
        return set(lowbit_torch.of_torch(*given))

    assert "peer:torch-int4pack" in names(4, 128, HALF, "exact", "uniform", 64)
    assert "peer:torch-int4pack" not in names(4, 128, torch.float32, "exact", "uniform", 64), "half a second a call"
    assert "peer:torch-int8pack" in names(8, None, HALF, "exact", "uniform", 1)
    assert "peer:torch-dynamic" in names(8, None, torch.float32, "int8", "uniform", 1)
    assert not names(4, 128, torch.float32, "int8", "palette", 1)


def test_what_is_not_installed_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda name: False)
    for case in (lowbit.qlinear_case(8), lowbit.qlinear_case(8, 8, None, activations="int8")):
        found = {name for name in harness.candidates(case, "cpu", "forward", None) if name.startswith("peer:")}
        assert found <= {"peer:torch-int4pack", "peer:torch-dynamic"}
        assert "peer:torchao" in harness.absentees(case, "cpu", "forward", None) or case.facts["bits"] == 4


def test_a_peer_with_wrong_scales_gets_no_number() -> None:
    case = lowbit.qlinear_case(4, dtype=HALF)
    given = harness.Input(case, "cpu", tiny=True)

    def wrong(*args: Any) -> Any:
        p = Product(*args)
        return lowbit_torch.int4pack(*p._replace(scale=p.scale * 1.5))

    assert given.check(Provider(lowbit_torch.int4pack), "forward", harness.slack("peer:x")) is None
    assert "off by" in str(given.check(Provider(wrong), "forward", harness.slack("peer:x")))


def test_the_model_for_onnxruntime_holds_the_codes() -> None:
    onnx = pytest.importorskip("onnx")
    p = Product(*args(bits=2, group_size=32))
    node = onnx.load_from_string(_onnx.model(p, 4)).graph
    blob = torch.frombuffer(bytearray(node.initializer[0].raw_data), dtype=torch.uint8)
    assert torch.equal(blob.view(p.codes.shape), p.codes)


# -------------------------------------------------------------------------------------------------------- cases


def test_cases_are_well_formed() -> None:
    products = {"qlinear", "qlinear_backward", "qlora_linear", "dequantize"}
    cases = [c for c in suite.of_family("lowbit") if c.op in products]
    assert {c.op for c in cases} == products
    for case in cases:
        assert "dense" in case.providers, case
        if case.op == "qlinear" and "int8 activations" in case.name:
            assert case.arithmetic == "int8", case
        weights = sum(r.expansion for p in case.providers.values() if isinstance(p, dict) for r in p.values())
        assert weights < 100, f"{case} keeps too many copies"
    for dtype in (torch.float32, HALF):
        rows = {c.name for c in cases if c.op == "qlinear" and c.dtype == dtype}
        assert {f"M{m} 4096x4096 4 bits g128" for m in (1, 4, 16, 64, 256)} <= rows


def test_a_first_call_has_weights_that_were_never_seen() -> None:
    seen: list[tuple[int, Tensor]] = []

    def setup(*args: Any) -> Any:
        seen.append((args[1].data_ptr(), args[1]))
        return lambda: args[0]

    case = lowbit.qlinear_case(1, first=True)
    assert case.modes == ["forward", "forward, cold", "first call"]
    given = harness.Input(case, "cpu", tiny=True)
    run = given.runs(Provider(setup), "first call")
    assert not seen, "nothing is prepared before the time counts"
    for _ in range(3):
        run()
    assert len({address for address, _ in seen}) == 3
    names = harness.candidates(case, "cpu", "first call", None)
    assert "eager" not in names and "compile" not in names and "dense" in names


def test_copies_are_counted_by_what_a_provider_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = lowbit.qlinear_case(1)
    given = harness.Input(case, "cpu", tiny=True)
    size = sum(given.args[i].nbytes for i in case.cold)
    monkeypatch.setattr(harness, "cold_bytes", lambda device: 16 * size)
    for expansion, copies in ((1, 16), (8, 2), (100, 2)):
        seen: list[int] = []

        def setup(*args: Any, seen: list[int] = seen) -> Any:
            seen.append(0)
            return lambda: args[0]

        given.runs(Provider(setup, expansion=expansion), "forward, cold")
        assert len(seen) == copies


def test_ceilings_know_bytes() -> None:
    assert ceilings._int8("cpu", 0.0) > 0
    table = {"gemm_gflops": {"float32": 1.0, "int8": 3.0}, "conv_gflops": {"float32": 2.0}}
    assert ceilings.arithmetic(table, "int8") == 3
    assert ceilings.arithmetic({k: {"float32": v["float32"]} for k, v in table.items()}, "int8") == 2
    higher = ceilings.highest({"gemm_gflops": {"float32": 4.0}}, {"gemm_gflops": table["gemm_gflops"]})
    assert higher == {"gemm_gflops": {"float32": 4.0, "int8": 3.0}}


# -------------------------------------------------------------------------------------------------------- pages


def row(case: str, provider: str, ms: float, mode: str = "forward, cold", dtype: str = "float32") -> dict[str, Any]:
    return {
        "family": "lowbit", "op": "qlinear", "case": case, "dtype": dtype, "device": "cpu", "mode": mode,
        "provider": provider, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "bytes": 8_650_752, "flops": 10**8,
        "peak_bytes": 1, "correct": True, "noisy": False, "commit": "c", "date": "d",
    }  # fmt: skip


def made_up(device: str = "CPU A", threads: int = 2) -> results.Results:
    environment = {
        "device": device, "kind": "cpu", "threads": threads, "instruction_set": "AVX2", "torch": "2", "python": "3",
        "platform": "p", "cofire": "0", "cofire_kernels": "avx2", "commit": "c", "date": "d", "quick": False,
        "peers": {"onnxruntime": "1.0", "torchao": None},
    }  # fmt: skip
    case = "M1 4096x4096 4 bits g128 int8 activations"
    rows = [row(case, "cofire", 0.5), row(case, "peer:onnxruntime", 1.0), row(case, "dense", 4.0)]
    case = "M8 4096x4096 4 bits g128 int8 activations"
    rows += [row(case, "cofire", 1.0), row(case, "peer:onnxruntime", 1.2)]
    rows += [row("M1 4096x4096 2 bits g128 int8 activations", "cofire", 0.25)]
    rows += [row("M1 4096x4096 4 bits g128", "cofire", 60.0, "first call")]
    table = {"0.25": 90.0, "256": 20.0}
    return results.Results(environment, {"read_gbs": table, "copy_gbs": table}, rows)


def test_summary_says_what_was_missed() -> None:
    text = lowbit_summary.summary(made_up(), markdown_table)
    assert "| int8 activations, 4 bits, against ONNX Runtime | at least 1.3x | **M = 8: 1.2x** |" in text
    assert "4096x4096: 86.5 % |" in text, "8.65 MB in 0.5 ms are 17.3 of 20 GB/s"
    assert "| at least 0.95x | 4096x4096 (onnxruntime): 2x |" in text
    assert "2 bits against our 4 bits, one row | at least 1.6x | 2x |" in text
    assert "at most 50 ms | **4096x4096 4 bits g128, float32: 60 ms** |" in text
    assert "| 4 bits g128, 4096x4096 | 0.5 ms, 2.00x onnxruntime |  | 1 ms, 1.20x onnxruntime |" in text
    assert "| fp32 activations, 4 bits, against torch's product | at least 20x | - |" in text


def test_the_sparse_summary_says_what_was_missed() -> None:
    found = made_up()
    case, trained = "M256 4096x4096 90 % csr", "M64 4096x4096 50 %, invariant"
    found.rows = [
        {**row(case, provider, ms), "family": "sparse"}
        for provider, ms in (("cofire", 10.0), ("peer:torch csr", 25.0), ("peer:sparseprop", 19.0), ("dense", 40.0))
    ]
    found.rows += [
        {**row(trained, provider, ms, "forward+backward"), "family": "sparse"}
        for provider, ms in (("cofire", 10.0), ("peer:plain layer", 9.8))
    ]
    text = sparse_summary.summary(found, markdown_table)
    assert "| csr, many rows, against MKL's CSR | at least 2x | M = 256, 90 %: 2.5x |" in text
    assert "| csr, many rows, against SparseProp | at least 2x | **M = 256, 90 %: 1.9x** |" in text
    assert "| at least 0.95x | M = 64: 0.98x |" in text
    assert "| selection, 11008x4096, against the best of torch | at least 10x | - |" in text


def test_a_summary_leaves_out_first_calls_and_overheads() -> None:
    found = made_up()
    for r in found.rows:
        r["speedup"] = 2.0 if r["mode"] == "forward, cold" else 0.1
    assert "slower in 0 of 3" in found.summary()


def test_peers_do_not_part_environments() -> None:
    first, second = made_up(), made_up()
    second.environment["peers"] = {}
    assert first.same_environment(second.environment)
    del second.environment["peers"]
    assert first.same_environment(second.environment)
    assert list(results.environment("cpu", False)["peers"]) == peers.distributions("cpu")
