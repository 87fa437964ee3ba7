# SPDX-License-Identifier: Apache-2.0
"""Fusion and caches: the mechanism step by step, invariants, models with and without a bound, training, what is refused."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cofire import ops
from cofire.nn import (
    FullCache,
    HeavyHitterCache,
    KVFusion,
    LoCoCoCache,
    SlidingWindowCache,
    SnapKVCache,
)

CAPACITY, BUFFER, CHUNK = 16, 4, 8
#: For other processes: the sources of this one.
ELSEWHERE = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
POLICIES = ["lococo", "heavy", "newest", "window", "snap"]


def fusion(capacity=CAPACITY, *, seed=0, **options):
    torch.manual_seed(seed)
    return KVFusion.for_capacity(8, capacity, **{"kernel_size": 5, **options})


def make(policy, capacity=CAPACITY, *, fuse=None, **options):
    options = {"buffer": BUFFER, "chunk": CHUNK, **options}
    if policy == "full":
        return FullCache()
    if policy == "lococo":
        fusions = [fusion(capacity, seed=i, **(fuse or {})) for i in range(2)]
        return LoCoCoCache(fusions, capacity, **options)
    if policy == "heavy":
        return HeavyHitterCache(capacity, **options)
    if policy == "newest":
        return HeavyHitterCache(capacity, recent=0, accumulate=False, **options)
    if policy == "window":
        return SlidingWindowCache(capacity, sinks=2, **options)
    return SnapKVCache(capacity, window=4, kernel_size=3, **options)


def tokens(n, batch=1, heads=4, groups=2, d=8, seed=0, **options):
    """Query, key and value."""
    rand = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, n, d, generator=rand, **options) for h in (heads, groups, groups)]


class Decoder(nn.Module):
    """Layers of attention with rotary positions and grouped queries."""

    def __init__(self, vocabulary=24, d=8, heads=4, groups=2, layers=2):
        super().__init__()
        self.heads, self.groups, self.d = heads, groups, d
        width = heads * d
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.ModuleList(nn.Linear(width, (heads + 2 * groups) * d) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def rotate(self, x, position):
        angle = position[:, None] / 100 ** torch.linspace(0, 1, self.d // 2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, ids, cache, position):
        x = self.embed(ids)
        for i, (mix, out) in enumerate(zip(self.mix, self.out, strict=True)):
            heads = mix(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (-1, self.d)).transpose(1, 2)
            q, k, v = heads.split([self.heads, self.groups, self.groups], 1)
            found = cache.attend(i, self.rotate(q, position), self.rotate(k, position), v)
            x = x + out(found.transpose(1, 2).flatten(2))
        return self.head(x)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder().eval()


@torch.no_grad()
def generate(model, cache, count, step=None, prompt=10, batch=1):
    """Tokens, one by one, and the last logits."""
    ids = torch.randint(0, 24, (batch, prompt), generator=torch.Generator().manual_seed(0))
    logits = model(ids, cache, torch.arange(prompt))
    found, step = [], model if step is None else step
    for _ in range(count):
        found.append(logits[:, -1:].argmax(-1))
        logits = step(found[-1], cache, torch.tensor([cache.seen]))
    return torch.cat(found, 1), logits[:, -1]


# --------------------------------------------------------------------------------------------------------- fusion


def golden(gate):
    module = KVFusion(1, 2, kernel_size=3, gate=gate)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    key, scores = torch.arange(1.0, 7).view(1, 1, 6, 1), torch.tensor([[[0.5, 0.1, 0.9, 0.2, 0.9, 0.3]]])
    return module, module(key, 10 * key, scores, heavy=2)


def test_golden_example():
    """Equal shares of the four tokens that are no heavy hitters, half and half with the better two of them."""
    for gate, expected in ((0.5, [3, 5, 2.125, 4.625]), (0.0, [3, 5, 1, 6])):
        _, (key, value) = golden(gate)
        assert key.flatten().tolist() == expected
        assert value.flatten().tolist() == [10 * x for x in expected]


@pytest.mark.parametrize("hidden", [(), (6, 5)])
@pytest.mark.parametrize("gate", ["plain", "sigmoid"])
def test_fusion_and_its_gradients_are_those_of_the_paper(hidden, gate):
    torch.manual_seed(0)
    module = KVFusion(4, 3, kernel_size=5, hidden=hidden, parameterization=gate, gate=0.3, std=0.3, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 17, 4, dtype=torch.float64).requires_grad_()
    scores = torch.rand(2, 2, 17)
    found = module(key, value, scores, heavy=5, local=2, bptt=True)

    def written_out(key, value):
        kept, rest, pick = (x.long() for x in ops.kv_select(scores, 5, 3, local=2))
        rows = torch.cat([key, value], -1)
        heavy, others = (rows.gather(2, i[..., None].expand(*i.shape, 8)) for i in (kept, rest))
        x = others.flatten(0, 1).transpose(1, 2)
        for convolution in module.convolutions:
            x = convolution(x).relu()
        shares = F.conv1d(x, module.weight, module.bias, padding=2).relu().softmax(-1)
        residual = torch.zeros_like(shares).scatter_(-1, pick.flatten(0, 1)[..., None], 1.0)
        g = module.gate if gate == "plain" else module.gate.sigmoid()
        fused = (((1 - g) * residual + g * shares) @ others.flatten(0, 1)).unflatten(0, (2, 2))
        return torch.cat([heavy, fused], 2).chunk(2, -1)

    expected = written_out(key, value)
    assert abs(module.share.item() - 0.3) < 1e-12
    wanted = [*module.parameters(), key, value]
    upstream = [torch.randn_like(x) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [torch.autograd.grad(x, wanted, upstream, retain_graph=True) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)
    with torch.no_grad():  # in place, where no gradient is wanted
        out = torch.full((2, 2, 2, 8, 4), torch.nan, dtype=torch.float64)
        module(key, value, scores, heavy=5, local=2, out=(out[0], out[1]))
        torch.testing.assert_close(out, torch.stack(expected))


def test_parameters_lie_as_those_of_a_convolution():
    module = KVFusion(4, 3, kernel_size=5)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == {"weight": [3, 8, 5], "bias": [3], "gate": []}
    nn.Conv1d(8, 3, 5).load_state_dict({k: module.state_dict()[k] for k in ("weight", "bias")})
    assert KVFusion(4, 3, bias=False).bias is None and module.gate.item() == 0.5
    assert KVFusion.for_capacity(4, 9, keep=0.5).merged == 4 and KVFusion.for_capacity(4, 9, keep=0).merged == 9


# ------------------------------------------------------------------------------------------------------ mechanism


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_step_by_step(policy):
    """Against tensors that grow: what is held, and what attention makes of it, after each call."""
    cache = make(policy)
    key = value = torch.zeros(1, 2, 0, 8)
    scores, queries = None, torch.zeros(1, 4, 0, 8)
    with torch.no_grad():
        for call, n in enumerate([8, 8, 7, 1, 1, 8, 1, 1, 1, 5]):
            if key.shape[2] > CAPACITY + BUFFER:
                index = torch.arange(key.shape[2]).expand(1, 2, -1)
                if policy == "lococo":
                    key, value = cache.fusions[0](key, value, scores, heavy=CAPACITY // 2)
                elif policy == "window":
                    index = torch.cat([index[..., :2], index[..., 2 - CAPACITY :]], -1)
                elif policy == "heavy":
                    best = scores[..., : -CAPACITY // 2].topk(CAPACITY // 2).indices.sort(-1).values
                    index = torch.cat([best, index[..., -CAPACITY // 2 :]], -1)
                elif policy == "newest":
                    index = scores.topk(CAPACITY).indices.sort(-1).values
                else:
                    weights = queries @ key.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
                    hidden = torch.ones(4, key.shape[2], dtype=torch.bool).triu(key.shape[2] - 3)
                    weights = weights.masked_fill(hidden, -torch.inf).softmax(-1).sum(2).view(1, 2, 2, -1).sum(2)
                    pooled = F.max_pool1d(weights[..., :-4], 3, 1, 1)
                    best = (
                        pooled.sort(dim=-1, descending=True, stable=True).indices[..., : CAPACITY - 4].sort(-1).values
                    )
                    index = torch.cat([best, index[..., -4:]], -1)
                if policy != "lococo":
                    key, value = (x.gather(2, index[..., None].expand(-1, -1, -1, 8)) for x in (key, value))
                    scores = None if scores is None else scores.gather(2, index)
            q, k, v = tokens(n, seed=call)
            key, value = torch.cat([key, k], 2), torch.cat([value, v], 2)
            queries = torch.cat([queries, q], 2)[:, :, -4:]
            expected, _, newest = ops.attention_with_scores(q, key, value)
            add = policy == "heavy" and scores is not None
            scores = newest + F.pad(scores, (0, n)) if add else newest
            found = cache.attend(0, q, k, v)
            torch.testing.assert_close(found, expected)
            for a, b in zip(cache.layers[0].held, (key, value), strict=True):
                torch.testing.assert_close(a, b)
    assert cache.seen == 41


@pytest.mark.parametrize("policy", POLICIES)
def test_size_is_bounded_and_memory_flat(policy):
    """Never more than capacity, buffer and chunk, for whatever lengths; the tensors are those of the start."""
    cache, rand = make(policy), torch.Generator().manual_seed(0)
    most, memory = 0, set()
    with torch.no_grad():
        for call in range(40):
            n = int(torch.randint(1, 30, (), generator=rand))
            cache.attend(0, *tokens(n, seed=call))
            most = max(most, cache.layers[0].count)
            if call > 2:
                memory.add(cache.bytes - sum(x.nbytes for x in (cache.layers[0].scores,) if x is not None))
    assert CAPACITY < most <= CAPACITY + BUFFER + CHUNK
    room = 2 * 2 * (CAPACITY + BUFFER + CHUNK) * 8 * 4
    assert memory == {2 * room + (4 * 4 * 8 * 4 if policy == "snap" else 0)}


@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
def test_fused_tokens_lie_between_those_they_are_made_of(gate):
    cache = make("lococo", fuse={"gate": gate})
    low, high = torch.full((2, 1, 2, 1, 8), torch.inf), torch.full((2, 1, 2, 1, 8), -torch.inf)
    with torch.no_grad():
        for call in range(12):
            q, k, v = tokens(7, seed=call)
            cache.attend(0, q, k, v)
            new = torch.stack([k, v])
            low, high = torch.minimum(low, new.amin(3, keepdim=True)), torch.maximum(high, new.amax(3, keepdim=True))
            held = torch.stack(cache.layers[0].held)
            assert held.isfinite().all() and (held >= low - 1e-5).all() and (held <= high + 1e-5).all()


def test_gate_of_zero_drops_like_heavy_hitters(decoder):
    """The same tokens in another order, so the same logits."""
    found = [generate(decoder, make(p, fuse={"gate": 0.0}), 60) for p in ("lococo", "newest")]
    other = generate(decoder, make("lococo", fuse={"gate": 1.0}), 60)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)
    assert (other[1] - found[0][1]).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_changes_within_the_capacity(decoder, policy):
    """Token for token; a prompt in pieces is multiplied by other kernels of the library, so that its logits may round otherwise."""
    full, bounded = (generate(decoder, make(p, 40), 33, batch=2) for p in ("full", policy))
    assert torch.equal(full[0], bounded[0])
    torch.testing.assert_close(full[1], bounded[1])


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_generation_beyond_the_capacity(decoder, policy):
    cache = make(policy)
    found, logits = generate(decoder, cache, 60, batch=3)
    assert found.shape == (3, 60) and logits.isfinite().all() and cache.seen == 70
    cache.reset()
    again, _ = generate(decoder, cache, 60, batch=3)
    assert torch.equal(found, again)
    cache.reset()
    other, _ = generate(decoder, cache, 20)  # another batch size
    assert torch.equal(other, generate(decoder, make(policy), 20)[0])


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_pieces_of_a_prompt(policy):
    """A long prompt is taken in pieces, as if it had come in such pieces; within the capacity they make no difference."""
    long = tokens(50)
    with torch.no_grad():
        one, many = make(policy), make(policy)
        whole = one.attend(0, *long)
        parts = [many.attend(0, *(x[:, :, a : a + CHUNK] for x in long)) for a in range(0, 50, CHUNK)]
        if policy == "full":
            torch.testing.assert_close(whole, torch.cat(parts, 2))
        else:
            assert torch.equal(whole, torch.cat(parts, 2))
        unbounded, _, _ = ops.attention_with_scores(*long)
        torch.testing.assert_close(whole[:, :, : CAPACITY + BUFFER], unbounded[:, :, : CAPACITY + BUFFER])
        assert policy == "full" or (whole[:, :, -1] - unbounded[:, :, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_rows_of_different_lengths(policy):
    """As if each row were alone: prompts with filling at the end, then tokens for all, then a row that has none."""
    cache, lengths = make(policy), [11, 24, 3]
    alone = [make(policy) for _ in lengths]
    with torch.no_grad():
        steps = [(24, lengths), *((1, None) for _ in range(30)), (4, torch.tensor([0, 4, 2])), (1, None)]
        for call, (n, valid) in enumerate(steps):
            inputs = tokens(n, batch=3, seed=call)
            found = cache.attend(0, *inputs, lengths=valid)
            for b, (row, count) in enumerate(zip(alone, [n] * 3 if valid is None else valid, strict=True)):
                if count:
                    expected = row.attend(0, *(x[b : b + 1, :, :count] for x in inputs))
                    assert torch.equal(found[b : b + 1, :, :count], expected)
                assert (found[b, :, int(count) :] == 0).all()
    assert cache.lengths() == [42, 59, 36] and cache.seen == 59
    equal = make(policy)
    equal.attend(0, *tokens(5, batch=2), lengths=[5, 5], starts=torch.tensor([0, 0]))
    assert equal.layers[0].rows is None
    copied, inputs = make(policy), tokens(1, batch=3)
    copied.load_state_dict(cache.state_dict())
    with torch.no_grad():
        assert torch.equal(copied.attend(0, *inputs), cache.attend(0, *inputs))


@torch.no_grad()
@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_rows_that_are_filled_up_on_the_left(policy):
    """As if each row were alone; the second has nothing at all in the first call."""
    cache, alone = make(policy), [make(policy) for _ in range(3)]
    for call, (starts, lengths) in enumerate(
        [([0, 9, 5], None), ([0, 4, 0], None), ([2, 0, 1], torch.tensor([5, 9, 0])), *[(None, None)] * 20]
    ):
        inputs = tokens(9, batch=3, seed=call)
        found = cache.attend(0, *inputs, lengths=lengths, starts=starts)
        for b, row in enumerate(alone):
            start = 0 if starts is None else starts[b]
            end = 9 if lengths is None else start + int(lengths[b])
            if end > start:
                expected = row.attend(0, *(x[b : b + 1, :, start:end] for x in inputs))
                assert torch.equal(found[b : b + 1, :, start:end], expected)
            assert (found[b, :, :start] == 0).all() and (found[b, :, end:] == 0).all()
    assert cache.lengths() == [203, 194, 193] and cache.seen == 207


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_save_load_resume(decoder, policy):
    cache = make(policy)
    generate(decoder, cache, 45)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded, copied = make(policy), copy.deepcopy(cache)
    loaded.load_state_dict(torch.load(file))
    assert loaded.seen == cache.seen == 55
    found = []
    with torch.no_grad():
        for c in (cache, loaded, copied):
            ids, out = torch.tensor([[3]]), []
            for _ in range(30):
                logits = decoder(ids, c, torch.tensor([c.seen]))
                ids = logits.argmax(-1)
                out.append(logits)
            found.append(torch.cat(out))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    if policy == "lococo":
        assert copied.fusions is cache.fusions


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_rows_in_another_order(policy):
    with torch.no_grad():
        for first in (6, 20):
            cache, other = make(policy), make(policy)
            index = torch.tensor([2, 0, 0])
            inputs = tokens(first, batch=3)
            cache.attend(0, *inputs)
            cache.reorder_cache(index)
            other.attend(0, *(x[index] for x in inputs))
            for call in range(30):
                inputs = tokens(1, batch=3, seed=call)
                torch.testing.assert_close(cache.attend(0, *inputs), other.attend(0, *inputs))


@torch.no_grad()
@pytest.mark.parametrize("policy", ["full", *POLICIES])
@pytest.mark.parametrize("most", [6, 20])
def test_rows_of_different_lengths_in_another_order(policy, most):
    """Rows that go on twice, or not at all, of which one has no token yet: each as if it were alone."""
    cache, alone = make(policy), [make(policy) for _ in range(3)]
    inputs, lengths, index = tokens(most, batch=3), [most, 0, 5], [2, 0, 2, 1]
    cache.attend(0, *inputs, lengths=lengths)
    for b in (0, 2):
        alone[b].attend(0, *(x[b : b + 1, :, : lengths[b]] for x in inputs))
    for call in range(30):
        if call in (0, 15):
            cache.reorder_cache(torch.tensor(index))
            alone = [copy.deepcopy(alone[b]) for b in index]
        inputs = tokens(1, batch=4, seed=call)
        found = cache.attend(0, *inputs)
        for b, row in enumerate(alone):
            assert torch.equal(found[b : b + 1], row.attend(0, *(x[b : b + 1] for x in inputs)))
    assert cache.lengths() == [row.seen for row in alone] == [35, 35, 35, 30 + most]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_decoding_compiles_in_one_graph(backend):
    """With the reduction; the graphs are few: lengths are not baked in."""
    torch.manual_seed(0)
    decoder, graphs = Decoder(layers=1).eval(), CompileCounterWithBackend(backend)
    expected = generate(decoder, make("lococo"), 24)
    torch._dynamo.reset()
    compiled = torch.compile(decoder, backend=graphs, fullgraph=True)
    found = generate(decoder, make("lococo"), 24, compiled)
    assert torch.equal(expected[0], found[0]) and graphs.frame_count <= 3
    torch.testing.assert_close(expected[1], found[1], atol=1e-5, rtol=1e-4)


PEAK = """
import resource, sys, torch
from cofire.nn import FullCache, KVFusion, LoCoCoCache
torch.set_num_threads(1)
cache = LoCoCoCache([KVFusion.for_capacity(64, 64, kernel_size=5)], 64, chunk=64)
peaks = []
with torch.no_grad():
    for call in range(int(sys.argv[1])):
        cache.attend(0, *torch.randn(3, 1, 8, 64, 64))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[len(peaks) // 8], peaks[-1])
"""


@pytest.mark.full
def test_peak_memory_is_flat():
    """Of a process, between an eighth and all of 32,768 tokens: less than a hundredth of what they take."""
    run = subprocess.run([sys.executable, "-c", PEAK, "512"], capture_output=True, text=True, check=True, env=ELSEWHERE)
    first, last = map(int, run.stdout.split())
    assert last - first < 0.01 * (448 * 64) * 2 * 8 * 64 * 4


# ------------------------------------------------------------------------------------------------------- training


def test_training_learns_from_the_chunk_after_a_reduction(decoder):
    """As published: gradients reach the fusion from the chunk that reduced, and nothing goes back further."""
    cache = make("lococo", fuse={"std": 0.1})
    fusion_, key, value, scores = cache.fusions[0], None, None, None
    for call in range(6):
        q, k, v = (x.requires_grad_() for x in tokens(CHUNK, seed=call))
        found = cache.attend(0, q, k, v)
        gradients = torch.autograd.grad(found.square().sum(), [q, k, v, *fusion_.parameters()], allow_unused=True)
        # the same with everything out of place
        keys, values = (k, v) if key is None else (torch.cat([key, k], 2), torch.cat([value, v], 2))
        reduced = key is not None and key.shape[2] > CAPACITY + BUFFER
        if reduced:
            old = fusion_(key, value, scores, heavy=CAPACITY // 2)
            keys, values = (torch.cat([a, b], 2) for a, b in zip(old, (k, v), strict=True))
        output, _, scores = ops.attention_with_scores(q, keys, values)
        expected = torch.autograd.grad(output.square().sum(), [q, k, v, *fusion_.parameters()], allow_unused=True)
        key, value = keys.detach(), values.detach()
        torch.testing.assert_close(found, output)
        for a, b in zip(gradients, expected, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                torch.testing.assert_close(a, b)
        assert (gradients[3] is not None) == reduced
    assert not cache.layers[0].held[0].requires_grad


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_backpropagation_through_the_cache(policy):
    """With ``bptt`` the first tokens get gradients from the last call; without, from their own alone."""
    found = {}
    for bptt in (True, False):
        cache = make(policy, bptt=bptt) if policy != "full" else FullCache(bptt=bptt)
        first = tokens(CHUNK, seed=9)
        first = [x.requires_grad_() for x in first]
        cache.attend(0, *first)
        for call in range(5):
            last = cache.attend(0, *tokens(CHUNK, seed=call))
        assert last.requires_grad == (bptt or policy == "lococo")
        if bptt:
            found = torch.autograd.grad(last.sum(), first[1:], allow_unused=True)
            assert policy == "snap" or all(g is not None and g.abs().sum() > 0 for g in found)
            cache.detach()
            assert not cache.layers[0].held[0].requires_grad


def test_evaluation_between_training_steps_breaks_no_graph():
    """What is written in place is not what a graph holds on to."""
    cache = make("lococo")
    inputs = [x.requires_grad_() for x in tokens(CHUNK)]
    for call in range(3):
        with torch.no_grad():
            cache.attend(0, *tokens(CHUNK, seed=call))
    output = cache.attend(0, *inputs)
    with torch.no_grad():
        for call in range(30):
            cache.attend(0, *tokens(1, seed=call))
    output.sum().backward()
    assert inputs[0].grad is not None and cache.fusions[0].weight.grad is not None


# ------------------------------------------------------------------------------------------------- transformers


def llama(attention="cofire_scores", **options):
    transformers = pytest.importorskip("transformers")
    importlib.import_module("cofire.nn.kv_transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=None, attn_implementation=attention,
        **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prompts(n=30, batch=2):
    return torch.randint(1, 64, (batch, n), generator=torch.Generator().manual_seed(0))


def continued(model, cache: Any, **options):
    past = None if cache is None else cache.for_transformers(model)
    return model.generate(prompts(), cache=past, max_new_tokens=24, do_sample=False, **options)


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_llama_generates(policy):
    """Within the capacity, in one prompt or in chunks and with beams, the tokens of transformers' own cache; beyond it, as
    many tokens, and the same with the prompt in chunks."""
    model = llama()
    expected = continued(model, None)
    wide = make(policy, 64)
    assert torch.equal(continued(model, wide), expected) and wide.seen == 53
    for options in ({"prefill_chunk_size": 7}, {"num_beams": 2}):
        wide.reset()
        assert torch.equal(continued(model, wide, **options), continued(model, None, **options))
    if policy != "full":
        narrow = make(policy)
        found = continued(model, narrow)
        assert found.shape == expected.shape and narrow.seen == 53 and not torch.equal(found, expected)
        assert narrow.layers[1].count <= CAPACITY + BUFFER + CHUNK
        narrow.reset()
        assert torch.equal(continued(model, narrow, prefill_chunk_size=CHUNK), found)


def test_llama_with_its_own_attention():
    """Policies that need no scores work with it; prompts then have to come in chunks."""
    for attention in ("sdpa", "eager"):
        model = llama(attention)
        assert torch.equal(continued(model, FullCache()), continued(model, None))
        with pytest.raises(ValueError, match=r"at most chunk \(8\) tokens"):
            continued(model, make("window"))
        cache = make("window")
        found = continued(model, cache, prefill_chunk_size=CHUNK)
        model.set_attn_implementation("cofire_scores")
        assert torch.equal(found, continued(model, make("window")))


def test_llama_with_prompts_of_different_lengths():
    model, ids = llama(), prompts(20)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[1, 13:] = 0
        past = make("lococo").for_transformers(model)
        found = [model(ids, attention_mask=mask, cache=past).logits]
        for t in range(12):
            mask = F.pad(mask, (0, 1), value=1)
            position = mask.sum(-1, keepdim=True) - 1
            found.append(model(prompts()[:, t : t + 1], attention_mask=mask, position_ids=position, cache=past).logits)
        for row, n in enumerate((20, 13)):
            alone = make("lococo").for_transformers(model)
            one = slice(row, row + 1)
            torch.testing.assert_close(model(ids[one, :n], cache=alone).logits, found[0][one, :n])
            for t in range(12):
                torch.testing.assert_close(model(prompts()[one, t : t + 1], cache=alone).logits, found[1 + t][one])
        with pytest.raises(ValueError, match="padding needs a cache of cofire"):
            model(ids, attention_mask=F.pad(torch.ones(2, 19), (0, 1)))


def padded(side="left"):
    """Three prompts, of 30, 17 and 4 tokens, and their mask."""
    lengths = torch.tensor([[30], [17], [4]])
    place = torch.arange(30)
    mask = place >= 30 - lengths if side == "left" else place < lengths
    return prompts(batch=3).masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("policy", ["full", *POLICIES])
def test_llama_generates_from_prompts_that_are_padded_on_the_left(policy):
    """Within the capacity the tokens of transformers' own cache, in one prompt or in chunks, of which some are padding
    alone; beyond it those of each row alone."""
    model, (ids, mask) = llama(), padded()
    for beams in (1, 3):
        options = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams}
        sdpa = llama("sdpa").generate(ids, attention_mask=mask, **options)
        for more in ({}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 1}):
            wide = make(policy, 64)
            past = wide.for_transformers(model)
            assert torch.equal(model.generate(ids, attention_mask=mask, cache=past, **options, **more), sdpa)
            assert wide.seen == 53 and wide.lengths(1) == [n for n in (53, 40, 27) for _ in range(beams)]
        found = model.generate(ids, attention_mask=mask, cache=make(policy).for_transformers(model), **options)
        for row, n in enumerate((30, 17, 4)):
            cache = make(policy).for_transformers(model)
            alone = model.generate(ids[row : row + 1, 30 - n :], cache=cache, **options)
            assert torch.equal(found[row, 30:], alone[0, n:])
        assert policy == "full" or not torch.equal(found, sdpa)


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_llama_where_a_row_rests_for_a_step(device):
    model, ids = llama().to(device), prompts(13).to(device)
    past, alone = (make("heavy").for_transformers(model) for _ in range(2))
    mask = torch.ones_like(ids)
    model(ids[:, :10], attention_mask=mask[:, :10], cache=past)
    mask[1, 10:12] = 0
    for t in (10, 11, 12):
        position = mask[:, : t + 1].sum(-1, keepdim=True) - 1
        step = {"attention_mask": mask[:, : t + 1], "position_ids": position, "cache": past}
        found = model(ids[:, t : t + 1], **step).logits
    assert past.cache.lengths(1) == [13, 11] and past.seen == 13
    model(ids[1:, :10], cache=alone)
    torch.testing.assert_close(model(ids[1:, 12:], cache=alone).logits, found[1:])


@torch.no_grad()
def test_llama_is_told_the_lengths_of_one_call():
    model, ids = llama(), prompts()
    past, other = make("heavy").for_transformers(model, lengths=[12, 7]), make("heavy").for_transformers(model)
    mask = torch.ones_like(ids)
    mask[1, 7:12] = 0
    for which in (mask, torch.ones_like(mask)):
        with pytest.raises(ValueError, match="attention_mask must not be given where the cache was given lengths"):
            model(ids[:, :12], attention_mask=which[:, :12], cache=past)
    with pytest.raises(
        ValueError, match="prompts for generate, .* must be padded on the left, got padding on the right"
    ):
        model.generate(ids, cache=past, max_new_tokens=2)
    found = model(ids[:, :12], cache=past).logits
    assert torch.equal(model(ids[:, :12], attention_mask=mask[:, :12], cache=other).logits[1, :7], found[1, :7])
    assert past.cache.lengths(1) == [12, 7]
    model(ids[:, 12:24], cache=past)
    assert past.cache.lengths(1) == [24, 19]
    model(ids[:, 24:], attention_mask=mask, cache=past)
    assert past.cache.lengths(1) == [30, 25]


@torch.no_grad()
@pytest.mark.parametrize("pad", [False, True])
def test_llama_goes_on_with_copies(pad):
    """A pickle, a deep copy, and rows that are repeated."""
    model, (ids, mask) = llama(), padded()
    mask = mask if pad else torch.ones_like(mask)
    past = make("lococo").for_transformers(model)
    past.batch_repeat_interleave(2)
    model(ids, attention_mask=mask, cache=past)
    loaded, copied, twice = pickle.loads(pickle.dumps(past)), copy.deepcopy(past), copy.deepcopy(past)
    twice.batch_repeat_interleave(2)
    for t in range(6):
        mask, token = F.pad(mask, (0, 1), value=1), ids[:, -1 - t, None]
        found = model(token, attention_mask=mask, cache=past).logits
        for other in (loaded, copied):
            assert torch.equal(model(token, attention_mask=mask, cache=other).logits, found)
        double = {"attention_mask": mask.repeat_interleave(2, 0), "cache": twice}
        more = model(token.repeat_interleave(2, 0), **double).logits
        torch.testing.assert_close(more, found.repeat_interleave(2, 0))
    model.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="gradient checkpointing takes the cache away"):
        model.train()(ids, cache=copied)


def test_what_generate_calls_besides_may_be_padded_on_the_right():
    """A model with a cache of its own, called by a LogitsProcessor."""
    transformers = pytest.importorskip("transformers")
    model, (ids, mask), calls = llama(), padded("right"), []

    class Beside(transformers.LogitsProcessor):
        def __call__(self, _, scores):
            own = make("heavy").for_transformers(model)
            model(ids, attention_mask=mask, cache=own)
            calls.append(own.cache.lengths(1))
            return scores

    found = continued(model, make("heavy"), logits_processor=[Beside()])
    assert calls == [[30, 17, 4]] * 24 and torch.equal(found, continued(model, make("heavy")))


def test_masks_that_are_refused():
    model = llama()
    ids, mask = padded("right")
    for options in ({}, {"prefill_chunk_size": 10}):
        past = make("lococo", 64).for_transformers(model)
        with pytest.raises(ValueError, match="must be padded on the left, got padding on the right"):
            model.generate(ids, attention_mask=mask, cache=past, max_new_tokens=2, **options)
    with torch.no_grad():
        past = make("lococo").for_transformers(model)
        mask[1, 2] = 0
        with pytest.raises(ValueError, match="the ones of a row side by side, got gaps in row 1"):
            model(ids, attention_mask=mask, cache=past)
        past.reset()
        model(ids, cache=past)
        with pytest.raises(ValueError, match="a column for each of the 31 tokens, read ones included, got 1"):
            model(ids[:, :1], attention_mask=mask[:, :1], cache=past)


@pytest.mark.parametrize("attention", ["cofire_scores", "sdpa"])
def test_llama_with_gradient_checkpointing_is_refused(attention):
    """Where transformers would take the cache away, and only there."""
    model, ids = llama(attention), prompts(CHUNK)
    model.gradient_checkpointing_enable()
    past = make("window").for_transformers(model)
    model(ids, cache=past)
    with torch.no_grad():
        model.train()(ids, cache=past)
    with pytest.raises(RuntimeError, match="SlidingWindowCache: gradient checkpointing takes the cache away"):
        model(ids, cache=past)
    model.gradient_checkpointing_disable()
    model(ids, cache=past)
    assert past.seen == 3 * CHUNK


def test_llama_trains():
    model, cache = llama(), make("lococo", fuse={"std": 0.1})
    past = cache.for_transformers(model)
    model.train()
    for _ in range(4):
        ids = prompts(CHUNK)
        model(ids, labels=ids, cache=past).loss.backward()
    assert all(p.grad is not None for p in (*cache.fusions[1].parameters(), *model.parameters()))


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.full)])
def test_llama_compiles_in_one_graph(masked):
    """Also with a mask, as ``generate`` may pass one; a token that it hides is refused by the graph."""
    model, ids = llama(), prompts()

    @torch.no_grad()
    def decode(step):
        past = make("lococo").for_transformers(model)
        mask = torch.ones_like(ids)
        options = {"attention_mask": mask} if masked else {}
        logits, found = model(ids, cache=past, **options).logits, []
        for _ in range(12):
            found.append(logits[:, -1:].argmax(-1))
            if masked:
                mask = options["attention_mask"] = F.pad(mask, (0, 1), value=1)
            logits = step(found[-1], cache=past, **options).logits
        return torch.cat(found, 1), past, mask

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, past, mask = decode(compiled)
    assert torch.equal(decode(model)[0], found)
    if masked:
        with torch.no_grad(), pytest.raises(RuntimeError, match="must be 1 for each row of a compiled step"):
            compiled(found[:, :1], cache=past, attention_mask=F.pad(mask, (0, 1)))


def test_what_transformers_may_not_do():
    sdpa, model = llama("sdpa"), llama()
    with pytest.raises(
        RuntimeError, match=r"'sdpa' does not give: call model.set_attn_implementation\(\"cofire_scores"
    ):
        make("lococo").for_transformers(sdpa)
    with pytest.raises(RuntimeError, match="FullCache: lengths need the attention 'cofire_scores', got 'sdpa'"):
        make("full").for_transformers(sdpa, lengths=[1, 1])
    past = make("heavy").for_transformers(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="layer 0 attended without the cache: call model.set_attn"):
        model(prompts(), cache=past)
    model.set_attn_implementation("cofire_scores")
    past.reset()
    model(prompts(), cache=past)
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        past.crop(-1)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(RuntimeError, match="must attend to all tokens"):
        make("heavy").for_transformers(model)
    with pytest.raises(ValueError, match="fusion for each layer, got 1 and layer 1"):
        LoCoCoCache([fusion()], CAPACITY).for_transformers(llama())
    dropout = llama(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="no dropout here, got 0.1"):
        dropout(prompts())


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "capacity must be at least 2, got 1", lambda: KVFusion.for_capacity(8, 1)),
        (ValueError, "capacity must be at least 2, got 1", lambda: HeavyHitterCache(1)),
        (ValueError, r"keep must be in \[0, 1\), got 1", lambda: KVFusion.for_capacity(8, 16, keep=1)),
        (ValueError, r"keep must be in \[0, 1\), got -0.1", lambda: KVFusion.for_capacity(8, 16, keep=-0.1)),
        (ValueError, "keep must leave a slot of 4", lambda: KVFusion.for_capacity(8, 4, keep=0.9)),
        (ValueError, "kernel_size must be odd and positive, got 4", lambda: KVFusion(8, 4, kernel_size=4)),
        (ValueError, "merged must be at least 1, got 0", lambda: KVFusion(8, 0)),
        (ValueError, "gate must be between 0 and 1 with a sigmoid", lambda: fusion(parameterization="sigmoid", gate=1)),
        (ValueError, "std must not be negative", lambda: KVFusion(8, 4, std=-1)),
        (ValueError, "less than the 8 heavy hitters, got 8", lambda: LoCoCoCache([fusion()], 16, local=8)),
        (ValueError, r"capacity must be at least merged \(8, layer 0\), got 4", lambda: LoCoCoCache([fusion()], 4)),
        (TypeError, "fusions must be KVFusion modules, got Linear", lambda: LoCoCoCache([nn.Linear(1, 1)], 4)),
        (ValueError, "buffer must not be negative", lambda: HeavyHitterCache(8, buffer=-1)),
        (ValueError, "chunk must be at least 1", lambda: HeavyHitterCache(8, chunk=0)),
        (ValueError, r"sinks must be at least 0 and less than capacity \(8\)", lambda: SlidingWindowCache(8, sinks=8)),
        (ValueError, r"recent must be between 0 and capacity \(8\)", lambda: HeavyHitterCache(8, recent=9)),
        (ValueError, "window must be positive and less than capacity", lambda: SnapKVCache(8, window=8)),
        (ValueError, "kernel_size must be odd", lambda: SnapKVCache(8, window=2, kernel_size=2)),
        (TypeError, "capacity must be an integer, got 8.0", lambda: SnapKVCache(8.0)),
    ],
)
def test_arguments_out_of_range(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_fusion_refuses():
    module = fusion(8)
    key, scores = torch.randn(1, 2, 10, 8), torch.rand(1, 2, 10)
    refused = [
        (ValueError, "merged must be between 0 and the 3 tokens that are left", (key, key, scores), {"heavy": 7}),
        (
            ValueError,
            r"scores must have shape \[1, 2, 10\], one for each key",
            (key, key, scores[..., :9]),
            {"heavy": 4},
        ),
        (ValueError, "scores must not be NaN, got 20 NaN", (key, key, scores * torch.nan), {"heavy": 4}),
        (ValueError, r"key must have shape \[B, Hkv, S, 8\]", (key[..., :4], key, scores), {"heavy": 4}),
        (ValueError, "local must be between 0 and heavy", (key, key, scores), {"heavy": 4, "local": 5}),
        (
            RuntimeError,
            "wants a gradient, and bptt is False",
            (key.clone().requires_grad_(), key, scores),
            {"heavy": 4},
        ),
        (RuntimeError, "out has no gradient", (key, key, scores), {"heavy": 4, "out": (key, key)}),
    ]
    for error, match, args, options in refused:
        with pytest.raises(error, match=match):
            module(*args, **options)


@torch.no_grad()
def test_caches_refuse():
    cache = make("heavy")
    q, k, v = tokens(5, batch=2)
    cache.attend(0, q, k, v)
    refused = [
        (TypeError, r"dtype of the cache \(torch.float32\), got torch.float64", (q.double(), k.double(), v.double())),
        (TypeError, "value must have the dtype of key", (q, k, v.double())),
        (TypeError, "key must be a floating-point tensor", (q, k.int(), v)),
        (ValueError, r"shape \[2, 2, q, 8\] like the cache, got \[1, 2, 5, 8\]", (q[:1], k[:1], v[:1])),
        (ValueError, r"shape \[2, 2, q, 8\] like the cache, got \[2, 1, 5, 8\]", (q, k[:, :1], v[:, :1])),
        (ValueError, r"query must have shape \[2, H, 5, 8\], as many tokens as key", (q[:, :, :4], k, v)),
        (ValueError, "key and value must have one shape", (q, k, v[:, :, :4])),
        (ValueError, "a divisor of 3", (q[:, :3], k, v)),
    ]
    for error, match, args in refused:
        with pytest.raises(error, match=match):
            cache.attend(0, *args)
    for lengths in ([5], [5, 6], [5, -1]):
        for which in ("lengths", "starts"):
            with pytest.raises(ValueError, match=f"{which} must be 2 numbers from 0 to the 5 new tokens"):
                cache.attend(0, q, k, v, **{which: lengths})
    with pytest.raises(ValueError, match=r"must end within the 5 new tokens, got \[1, 0\] and \[5, 5\]"):
        cache.attend(0, q, k, v, lengths=[5, 5], starts=[1, 0])
    with pytest.raises(ValueError, match="scores must have shape"):
        cache.record(0, torch.rand(2, 2, 4))
    with pytest.raises(ValueError, match=r"at most chunk \(8\) tokens"):
        cache.update(0, *tokens(9, batch=2)[1:])
    with pytest.raises(ValueError, match="needs the queries: use attend"):
        make("snap").update(0, k, v)
    with pytest.raises(RuntimeError, match="nothing was cached yet"):
        make("heavy").record(0, torch.rand(2, 2, 4))
    with pytest.raises(ValueError, match="fusion for each layer, got 2 and layer 2"):
        make("lococo").attend(2, q, k, v)


@torch.no_grad()
def test_reductions_refuse():
    for which in range(3):
        cache = make("lococo", check=True)
        inputs = tokens(24)
        inputs[max(which, 1)][0, 0, 3, 1] = torch.inf if which else 1.0
        cache.attend(0, *inputs)
        if which == 0:
            cache.layers[0].scores[0, 0, 0] = torch.inf
        with pytest.raises(ValueError, match=("scores", "key", "value")[which] + " must be finite, got"):
            cache.attend(0, *tokens(1))
    cache = make("lococo")
    for _ in range(3):
        _, k, v = tokens(CHUNK)
        cache.update(0, k, v)
    with pytest.raises(ValueError, match="scores of the 24 tokens that are held, got none: use attend or record"):
        cache.update(0, k, v)
    cache.record(0, torch.rand(1, 2, 24))
    assert cache.update(0, k, v)[0].shape == (1, 2, CAPACITY + CHUNK, 8)


@torch.no_grad()
def test_states_that_do_not_fit():
    cache = make("heavy")
    cache.attend(0, *tokens(20))
    state = cache.state_dict()
    with pytest.raises(ValueError, match="at most 10 tokens of a layer, got 20"):
        HeavyHitterCache(4, buffer=2, chunk=4).load_state_dict(state)
    with pytest.raises(ValueError, match="must hold queries of layer 0"):
        make("snap").load_state_dict(state)


def test_examples():
    for name in ("cofire.nn.kv_fusion", "cofire.nn.kv_cache"):
        module = importlib.import_module(name)
        found = doctest.testmod(module, extraglobs={"torch": torch, **vars(importlib.import_module("cofire.nn"))})
        assert found.attempted > 2 and not found.failed
