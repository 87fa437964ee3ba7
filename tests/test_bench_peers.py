# SPDX-License-Identifier: Apache-2.0
"""Peers: files inside and outside of the package, those that are missing, those that are wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cofire import bench
from cofire.bench import cases as suite
from cofire.bench import ceilings, clustering, fake_quantize, harness, lowbit, peers, results
from cofire.bench.cases import Case, Provider, Random, plain
from cofire.bench.dense_products import SAME_DTYPE
from cofire.bench.peers import (
    Peer,
    _ggml,
    _onnx,
    _products,
    _zentorch,
    bitsandbytes,
    coremltools,
    ik_llama,
    onnxruntime,
    quanto,
    torch_fp8,
    torchao,
    zentorch,
    zentorch_dense,
)
from cofire.bench.peers._ggml import by_blocks
from cofire.bench.peers.ik_llama import by_blocks_of_half
from cofire.bench.peers.torch_fp8 import by_fp8
from cofire.cli import app

ROOT = Path(__file__).parent.parent
FOLDER = Path(peers.__file__).parent
HALF = torch.bfloat16
HEAD = """
from cofire.bench.cases import plain
from cofire.bench.peers import Peer
"""
RIGHT = HEAD + 'PEER = Peer("mean", lambda case: plain(lambda x, mode: (x.mean((2, 3)),), outputs=1))\n'
WRONG = HEAD + 'PEER = Peer("wrong", lambda case: plain(lambda x, mode: (x.mean((2, 3)) * 1.01,), outputs=1))\n'
MISSING = HEAD + 'PEER = Peer("far", lambda case: plain(lambda x, mode: x), {"no_such_package": "no-such-pip"})\n'


pytestmark = pytest.mark.usefixtures("one_thread")


def pool_case() -> Case:
    def args(rand: Random) -> tuple[Tensor, str]:
        return rand.normal(2, 3, 4, 4), "avg"

    dense = plain(lambda x, mode: (x.mean((2, 3)),), outputs=1)
    return Case("channel_pool", "2x3x4x4", torch.float32, args, {"dense": dense}, args, family="gating")


@pytest.fixture
def suite_of_one(monkeypatch: pytest.MonkeyPatch) -> Case:
    """``run`` sees this one case, and ceilings that cost no time."""

    class Hurried(harness.Effort):
        def __init__(self, quick: bool, device: str = "cpu") -> None:
            super().__init__(quick, device)
            self.case_seconds = 0.01

    case = pool_case()
    table = {"copy_gbs": {"1": 9.0}, "read_gbs": {"1": 9.0}, "gemm_gflops": {"float32": 9.0}, "conv_gflops": {}}
    monkeypatch.setattr(harness, "select", lambda *_: [case])
    monkeypatch.setattr(ceilings, "measure", lambda *_: table)
    monkeypatch.setattr(harness, "Effort", Hurried)
    return case


def file(folder: Path, text: str, name: str = "a_peer.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------ from outside


def test_a_wrong_peer_from_outside_gets_no_number(suite_of_one: Case, tmp_path: Path) -> None:
    files = [file(tmp_path, RIGHT, "right.py"), file(tmp_path, WRONG, "wrong.py")]
    found = bench.run(quick=True, out=tmp_path / "r.json", progress=False, peers=files)
    rows = {r["provider"]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["peer:mean"]["correct"] and rows["peer:mean"]["median_ms"] > 0
    assert not rows["peer:wrong"]["correct"] and "output 0 is off by" in rows["peer:wrong"]["note"]
    assert [rows["peer:wrong"][c] for c in results.NUMBERS] == [None] * 4
    assert "absent" not in rows["peer:wrong"]
    assert "no number: peer:wrong" in found.summary()


def test_a_missing_peer_is_a_row(suite_of_one: Case, tmp_path: Path) -> None:
    found = bench.run(quick=True, out=tmp_path / "r.json", progress=False, peers=[file(tmp_path, MISSING)])
    row = next(r for r in found.rows if r["provider"] == "peer:far")
    assert row["note"] == "not installed: no-such-pip" and row["absent"] is True
    assert not row["correct"] and not row["noisy"] and "probe_ms" not in row
    assert [row[c] for c in results.NUMBERS] == [None] * 4
    assert found.environment["peers"]["no-such-pip"] is None
    text = found.summary()
    assert "peer:far: not installed: no-such-pip" in text and "no number: peer:far" not in text
    only = bench.run(providers=["peer:far"], out=tmp_path / "s.json", progress=False, peers=[tmp_path / "a_peer.py"])
    assert [r["provider"] for r in only.rows] == ["dense", "peer:far"]


def test_a_peer_that_cannot_run_here_says_why(suite_of_one: Case, tmp_path: Path) -> None:
    text = RIGHT.replace("outputs=1))", 'outputs=1), reason=lambda: "it wants a quantum computer")')
    found = bench.run(quick=True, out=tmp_path / "r.json", progress=False, peers=[file(tmp_path, text)])
    row = next(r for r in found.rows if r["provider"] == "peer:mean")
    assert row["absent"] and row["note"] == "cannot run here: it wants a quantum computer"


def test_peers_have_devices_and_modes(tmp_path: Path) -> None:
    text = MISSING.replace("Peer(", "Peer(devices=('cuda',), name=").replace(
        'name="far", lambda', 'name="far", find=lambda'
    )
    text = text.replace(', {"no_such', ', packages={"no_such')
    (case,) = peers.with_peers([pool_case()], [file(tmp_path, text)])
    assert harness.absentees(case, "cpu", "forward", None) == {}
    assert harness.absentees(case, "cuda", "forward", None) == {"peer:far": "not installed: no-such-pip"}
    assert harness.absentees(case, "cuda", "forward", ["dense"]) == {}
    assert "no-such-pip" in peers.distributions("cuda", case.peers)
    assert "no-such-pip" not in peers.distributions("cpu", case.peers)
    text = text.replace("lambda x, mode: x)", "lambda x, mode: x, differentiable=False)")
    (case,) = peers.with_peers([pool_case()], [file(tmp_path, text)])
    assert harness.absentees(case, "cuda", "forward+backward", None) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1\n", "a peer's file must set PEER to a cofire.bench.peers.Peer, got None in"),
        ("PEER = 'faiss'\n", "a peer's file must set PEER to a cofire.bench.peers.Peer, got 'faiss' in"),
        ("import no_such_package\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def\n", "cannot be imported: SyntaxError"),
        ("raise RuntimeError\n", "cannot be imported: RuntimeError: no message"),
        (HEAD + 'PEER = Peer("faiss", lambda case: None)\n', "must be new, and there is one called 'faiss' already"),
        (
            HEAD + 'PEER = Peer("eager", lambda case: case.facts["bits"])\n',
            "find of the peer 'eager' failed on channel_pool, 2x3x4x4, float32: KeyError: 'bits'",
        ),
        (
            HEAD + 'PEER = Peer("x", lambda case: 3)\n',
            "must return a Provider, a mapping of names to Providers, or None",
        ),
        (
            HEAD + 'PEER = Peer("x", lambda case: {})\n',
            "must return a Provider, a mapping of names to Providers, or None",
        ),
    ],
)
def test_files_with_mistakes(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        peers.with_peers([pool_case()], [file(tmp_path, text)])
    assert sentence in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a peer must be a Python file, and there is none at .*nowhere\.py"):
        peers.from_file(tmp_path / "nowhere.py")
    with pytest.raises(ValueError, match=r"a peer must be a Python file \(\.py\), got .*peer\.txt"):
        peers.from_file(file(tmp_path, RIGHT, "peer.txt"))
    twice = [file(tmp_path, RIGHT, "a.py"), file(tmp_path, RIGHT, "b.py")]
    with pytest.raises(ValueError, match=r"there is one called 'mean' already \(.*b\.py\)"):
        peers.with_peers([pool_case()], twice)


def test_the_command_takes_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "gating", "--peer", str(tmp_path / "nowhere.py")])
    assert result.exit_code == 2 and "there is none at" in result.output


# ------------------------------------------------------------------------------------------------ in the package


def test_every_file_is_short() -> None:
    files = [p for p in FOLDER.glob("*.py") if not p.name.startswith("_")]
    assert len(files) == len(peers.built_in())
    for path in files:
        lines = path.read_text().splitlines()
        assert len(lines) < 60, f"{path.name} has {len(lines)} lines"


def test_names_and_packages() -> None:
    found = peers.built_in()
    assert len({p.name for p in found}) == len(found)
    assert all(isinstance(p, Peer) and p.devices and set(p.devices) <= {"cpu", "cuda"} for p in found)
    assert {"faiss-cpu", "onnxruntime", "scikit-learn", "zentorch"} <= set(peers.distributions("cpu"))


def every_case() -> list[Case]:
    return [case for family in bench.families() for case in suite.of_family(family)]


def test_each_peer_computes_something() -> None:
    """And none is asked in vain for what a case says of itself, or for a package before it is set up."""
    answers: dict[str, int] = {}
    for case in every_case():
        for peer in peers.built_in():
            entry = peer.answer(case)
            answers[peer.name] = answers.get(peer.name, 0) + (entry is not None)
            assert f"peer:{peer.name}" not in case.providers
    assert [name for name, count in answers.items() if not count] == []


def test_cases_of_an_operator_say_the_same_of_themselves() -> None:
    said: dict[str, set[frozenset[str]]] = {}
    for case in every_case():
        said.setdefault(case.op, set()).add(frozenset(case.facts))
    assert {op: kinds for op, kinds in said.items() if len(kinds) > 1} == {}


def test_without_packages_peers_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda package: False)
    case = next(c for c in every_case() if c.op == "kmeans1d")
    names = set(harness.candidates(case, "cpu", "forward", None))
    assert not names & {"peer:faiss", "peer:sklearn", "peer:coremltools"}
    absent = harness.absentees(case, "cpu", "forward", None)
    assert (
        absent["peer:faiss"] == "not installed: faiss-cpu" and absent["peer:sklearn"] == "not installed: scikit-learn"
    )


def test_a_case_that_a_peer_is_not_timed_on_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda package: True)
    large, small = clustering._dkm((4096, 4096), 16), clustering._dkm((512, 512), 16)
    for mode in large.modes:
        assert "peer:coremltools" not in harness.candidates(large, "cpu", mode, None)
        assert "peer:coremltools" in harness.candidates(small, "cpu", mode, None)
        absent = harness.absentees(large, "cpu", mode, None)["peer:coremltools"]
        assert absent.startswith("left out: its maps would have 805,306,368 entries; timed with at most 67,108,864")
        assert "peer:coremltools" not in harness.absentees(small, "cpu", mode, None)
    palettes = [c for c in every_case() if c.op == "kmeans1d" and c.facts["palette_rows"] is None]
    assert {c.facts["clusters"] > coremltools.CLUSTERS for c in palettes} == {True, False}
    for case in palettes:
        absent = harness.absentees(case, "cpu", "forward", None).get("peer:coremltools", "")
        assert (f"{case.facts['clusters']} clusters" in absent) == (case.facts["clusters"] > coremltools.CLUSTERS)


def test_a_peer_that_is_not_here_says_so_first(monkeypatch: pytest.MonkeyPatch) -> None:
    case = clustering._dkm((4096, 4096), 16)
    monkeypatch.setattr(peers, "installed", lambda package: False)
    assert coremltools.PEER.absence(case) == coremltools.PEER.absence() == "not installed: coremltools"


def test_peers_are_known_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no provider is called 'peer:fais'; did you mean 'peer:faiss'"):
        bench.run(["clustering"], providers=["peer:fais"], out=tmp_path / "r.json")


# ------------------------------------------------------------------------------------------------ their own maths


@pytest.mark.parametrize(("reference", "error"), [(by_blocks, 2e-2), (by_blocks_of_half, 2e-2), (by_fp8, 6e-2)])
def test_roundings_are_roundings(reference: Callable[..., Tensor], error: float) -> None:
    """Near the exact product, but not it: the check would otherwise pass a peer that rounds nothing, or in another way."""
    args = lowbit.qlinear_case(5, 8, None, activations="int8").tiny(Random("roundings"))
    got, exact = reference(*args).double(), _products.exact(*args).double()
    assert 1e-4 < float((got - exact).abs().max() / exact.abs().max()) < error


def test_fp8_of_torch_is_its_reference() -> None:
    """On a CPU, where torch has the product too."""
    case = lowbit.qlinear_case(32, 8, None, activations="int8")
    provider = torch_fp8.find(case)
    assert provider is not None
    given = harness.Input(case, "cpu", tiny=True)
    assert given.check(provider, "forward", harness.slack("peer:x")) is None
    assert given.check(Provider(provider.setup), "forward", harness.slack("peer:x")) is not None, "it does round"


def test_the_input_in_half_is_rounded_by_rows() -> None:
    """The operator's own product of the rounded input, in bfloat16."""
    args = lowbit.qlinear_case(5, dtype=HALF, activations="int8").tiny(Random("rows of half"))
    assert torch.equal(_products.rows_of_half(*args), _products.reference(*args)), "which is in bfloat16"
    wide = (args[0].float() + 1e-3, *args[1:])
    got = _products.rows_of_half(*wide)
    assert got.dtype == HALF and torch.equal(got, _products.reference(wide[0].to(HALF), *args[1:]))
    assert not torch.equal(got.float(), _products.reference(*wide))
    exact = _products.rows_of_half(*harness._in_fp64(wide))
    assert exact.dtype == torch.float64 and torch.allclose(exact, got.double(), rtol=1e-2, atol=1e-2)


def test_what_each_library_is_called_for() -> None:
    """And in which of its ways: the fastest is the row."""

    def ways(peer: Callable[[Case], peers.Found], *args: object, **options: object) -> set[str] | None:
        found = peer(lowbit.qlinear_case(*args, **options))  # type: ignore[arg-type]
        return None if found is None else set() if isinstance(found, Provider) else set(found)

    int8, half = {"activations": "int8"}, {"dtype": HALF}
    assert ways(zentorch.find, 8, 8, None, **int8) == {"8 bits"}
    assert ways(zentorch.find, 8, **int8) == ways(zentorch.find, 8, **half) == {"4 bits"}
    assert ways(zentorch.find, 8, 2, **int8) is ways(zentorch.find, 8) is ways(zentorch.find, 8, 2, **half) is None
    assert ways(zentorch.find, 8, 4, 64, format="nf4", **half) is None
    assert ways(zentorch_dense.find, 8, 4, 64, format="nf4", **half) == ways(zentorch_dense.find, 8, **half) == set()
    assert ways(zentorch_dense.find, 8) is ways(zentorch_dense.find, 8, **int8, **half) is None
    assert ways(bitsandbytes.find, 8, 4, 64, format="nf4") == {"matmul_4bit", "Linear4bit"}
    assert ways(torchao.find, 8, 8, None, **int8) == ways(torchao.find, 8, 8, None, **half) == {"eager", "compiled"}
    assert ways(quanto.find, 8, 8, None, **half) == ways(quanto.find, 8, 2, **half) == set()
    assert ways(quanto.find, 8, 8, **half) is ways(quanto.find, 8, 8, None, **int8) is None
    for bits, both in ((2, None), (4, {"as stored", "repacked"}), (8, {"as stored", "repacked"})):
        assert ways(ik_llama.find, 8, bits, **int8) == both and ways(ik_llama.find, 8, bits) is None
        assert ways(onnxruntime.find, 8, bits, **int8) == set()
        assert ways(onnxruntime.find, 8, bits) == (set() if bits == 4 else None), "a plain loop"
    assert ways(onnxruntime.find, 8, dtype=torch.float16) == set() and ways(onnxruntime.find, 8, **half) is None


def test_what_rounds_in_its_own_way_is_checked_against_that() -> None:
    found = bitsandbytes.find(lowbit.qlinear_case(8, 4, 64, format="nf4"))
    assert found is not None and found["Linear4bit"].reference is _products.half
    assert found["matmul_4bit"].reference is None
    four = zentorch.find(lowbit.qlinear_case(8, activations="int8"))
    assert four is not None and four["4 bits"].reference is _products.rows_of_half
    assert not four["4 bits"].first, "what it made of a weight once cannot be unmade"


def test_models_for_onnxruntime_are_in_the_dtype_of_the_input() -> None:
    onnx = pytest.importorskip("onnx")
    for dtype, kind in ((torch.float32, "FLOAT"), (torch.float16, "FLOAT16")):
        p = _products.Product(*lowbit.qlinear_case(5, dtype=dtype).tiny(Random("models")))
        graph = onnx.load_from_string(_onnx.model(p, 0)).graph
        number = getattr(onnx.TensorProto, kind)
        assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {number}
        scales = torch.from_numpy(onnx.numpy_helper.to_array(graph.initializer[1]).copy())
        assert torch.equal(scales, p.scale.to(dtype).flatten())


def variants(case: Case, provider: str) -> dict[str, Provider]:
    found = case.providers[provider]
    return {"": found} if isinstance(found, Provider) else dict(found)


def test_decoding_is_followed_by_the_product_of_the_gradient_s_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "has_half", lambda rows: True)
    for dtype, expected in ((torch.float32, {"fp32"}), (HALF, {"fp32", "bf16"})):
        case = lowbit._backward(16, dtype)
        given = harness.Input(case, "cpu", tiny=True)
        found = variants(case, "peer:dequantize-then-dense")
        assert set(found) == expected
        for provider in found.values():
            assert given.check(provider, "forward", harness.slack("peer:x")) is None
            args = given.args
            assert provider.setup(*args)().dtype == dtype
    other = lowbit._backward(16)
    wrong = plain(lambda *args: 1.1 * lowbit._decode_and_multiply(torch.float32)(*args), outputs=1)
    assert "off by" in str(harness.Input(other, "cpu", tiny=True).check(wrong, "forward", harness.slack("peer:x")))


def test_levels_of_plain_torch_are_those_of_the_operator() -> None:
    """Of a mean in fp64: one that is off by a bit may put a value between two levels on the other one."""
    for case in fake_quantize.STATSQ:
        if case.name.startswith("256x"):
            given = harness.Input(case, "cpu")
            found = variants(case, "dense")
            assert given.check(found["in fp64"], "forward", harness.slack("dense")) is None
            off = plain(lambda x, bits: fake_quantize.dense_statsq(x * 1.001, bits, norm=False))
            assert "off by" in str(given.check(off, "forward", harness.slack("dense")))


def test_exact_activations_are_compared_with_dense_products_of_bf16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cofire.bench.dense_products.has_half", lambda rows: True)
    case = lowbit._exact(16)
    assert "bf16" in variants(case, "dense") and set(variants(case, SAME_DTYPE)) == {"fp32", "fp32 packed"}
    case = lowbit._exact(1, dtype=torch.float16)
    assert {"fp32", "bf16", "fp16"} <= set(variants(case, "dense")) and SAME_DTYPE not in case.providers
    given = harness.Input(case, "cpu", tiny=True)
    for name, provider in variants(case, "dense").items():
        if "packed" not in name:
            assert given.check(provider, "forward", harness.slack("dense")) is None, name
    assert "off by" in str(
        given.check(
            Provider(lambda *args: lambda: 1.1 * args[0] @ lowbit._decoded_weight(*args).t().half()),
            "forward",
            harness.slack("dense"),
        )
    )


def test_blocks_of_ggml_hold_the_codes() -> None:
    p = _products.Product(*lowbit.qlinear_case(1, activations="int8").tiny(Random("blocks")))
    found = _ggml.blocks(p)
    assert found.shape == (p.codes.shape[0] * p.shape[1] // 32, 18)
    scale = found[:, :2].contiguous().view(torch.float16).float()
    codes = torch.cat([found[:, 2:] & 15, found[:, 2:] >> 4], 1).float() - 8
    assert torch.equal((codes * scale).view(p.shape), _products.decoded(p).float())


def test_memory_of_zentorch_is_lent_to_equals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Operators:
        @staticmethod
        def zentorch_woq_repack_weight(codes: Tensor) -> Tensor:
            return codes.clone()

    monkeypatch.setattr(_zentorch, "operators", lambda: Operators)
    monkeypatch.setattr(_zentorch, "_UNUSED", {})
    p = _products.Product(*lowbit.qlinear_case(1).tiny(Random("memory")))
    other = p._replace(codes=p.codes.flip(0))
    first, second = _zentorch.packed(p), _zentorch.packed(p)
    place = first.data_ptr()
    assert second.data_ptr() != place, "both are in use"
    del first
    changed = _zentorch.packed(other)
    assert changed.data_ptr() != place and torch.equal(changed.t(), other.signed())
    assert _zentorch.packed(p).data_ptr() == place


# ------------------------------------------------------------------------------------------------ what is written


def example() -> str:
    """The file in CONTRIBUTING.md."""
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = words.partition("## Add a peer\n")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(found) == 1, "the section has one whole file"
    return str(found[0])


def test_the_example_for_contributors_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    text = example()
    assert len(text.splitlines()) < 60
    path = file(tmp_path, text)
    cases = peers.with_peers([c for c in suite.of_family("sparse") if c.op == "spmm"], [path])
    name = f"peer:{peers.from_file(path).name}"
    answered = 0
    for case in cases[::3]:
        variants = harness.candidates(case, "cpu", "forward", None).get(name, {})
        given = harness.Input(case, "cpu", tiny=True) if variants else None
        for provider in variants.values():
            assert given is not None and given.check(provider, "forward", harness.slack(name)) is None, case
            answered += 1
    assert answered
    monkeypatch.setattr(peers, "installed", lambda package: False)
    case = next(c for c in cases if peers.of_case(c, "cpu").get(name))
    assert harness.absentees(case, "cpu", "forward", None)[name] == "not installed: scipy"


def test_the_matrix_names_every_peer() -> None:
    words = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    for peer in peers.built_in():
        assert f"| {peer.name} |" in words, peer.name
        assert all(f"`{pip}" in words for pip in peer.packages.values()), peer.name
    pins = (ROOT / "constraints-peers.txt").read_text(encoding="utf-8")
    for pip in peers.distributions("cpu"):
        assert re.search(rf"^{re.escape(pip)}==", pins, re.MULTILINE), pip
