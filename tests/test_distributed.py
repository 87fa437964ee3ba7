# SPDX-License-Identifier: Apache-2.0
"""Clustering over several processes equals one: layers under DDP and FSDP2, and weights that are never gathered."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cofire import ops
from cofire.distributed import dkm_sharded
from cofire.methods import EDKM
from cofire.nn import Palettized

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")


def run(work, folder, processes, *args):
    """``work(rank, processes, folder, *args)`` in so many processes, which meet at a file."""
    torch.multiprocessing.spawn(_start, (work, processes, str(folder), *args), nprocs=processes)


def _start(rank, work, processes, folder, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        work(rank, processes, Path(folder), *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- weights not gathered


def case(dtype, size=1500, clusters=5):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(size, generator=generator) * 0.1).to(dtype)
    weight[::7] = 0
    gradient = torch.randn(size, generator=generator).to(dtype)
    centroids = ops.kmeans1d(weight, clusters)[0] + 0.01
    order = centroids[0, :, 0].abs().argsort()  # the one that enforce_zero makes zero is zero's neighbour
    return weight, gradient, centroids[:, order]


#: How many elements each process holds: uneven, and one of them none.
SPLITS = {1: [1500], 2: [1001, 499], 4: [700, 0, 793, 7]}
RULES = [
    {},
    {"eps": 0.0, "iterations": 1},
    {"enforce_zero": True, "prune_threshold": 1e-3},
    {"enforce_zero": True, "keep_sparsity": True},
]


def alone(weight, gradient, centroids, **options):
    weight, centroids = weight.clone().requires_grad_(), centroids.clone().requires_grad_()
    found = ops.dkm(weight, centroids, **options)
    found.output.backward(gradient)
    return [found.output.detach(), found.centroids, weight.grad, centroids.grad]


def shards(rank, processes, folder, options):
    first = dist.new_group([0])
    for number, (dtype, rules) in enumerate(options):
        weight, gradient, centroids = case(dtype)
        part = weight.split(SPLITS[processes])[rank].clone().requires_grad_()
        centroids = centroids.clone().requires_grad_()
        found = dkm_sharded(part, centroids, **rules)
        assert not found.centroids.requires_grad and found.status.tolist() == [0]
        found.output.backward(gradient.split(SPLITS[processes])[rank])
        result = [found.output.detach(), found.centroids, part.grad, centroids.grad]
        if rank == 0:  # counts are integers: however they are spread, the forward is the same, bit by bit
            with torch.no_grad():
                result += dkm_sharded(weight, centroids, **rules, process_group=first)[:2]
        torch.save(result, folder / f"{number}-{rank}.pt")


def all_options():
    grads = [{"grad": grad, "rho": 0.2} for grad in ("unroll", "implicit", "jfb")]
    modes = [*grads, {"grad": "unroll", "rho": 0.2, "forward": "hard_ste"}, {"grad": "jfb", "tau": 1e-3}]
    for dtype, mode, rules in itertools.product((torch.bfloat16, torch.float16), modes, RULES):
        yield dtype, {**mode, **rules}


def check_shards(folder, processes, options):
    run(shards, folder, processes, options)
    for number, (dtype, rules) in enumerate(options):
        expected = alone(*case(dtype), **rules)
        parts = [torch.load(folder / f"{number}-{rank}.pt") for rank in range(processes)]
        output, grad = (torch.cat([part[i] for part in parts]) for i in (0, 2))
        exact = alone(
            *(x.double() for x in case(dtype)), **rules
        )  # the same in fp64: what the roundings are measured by
        for name, o, e, r in (("output", output, expected[0], exact[0]), ("gradient", grad, expected[2], exact[2])):
            off = (o.double() - r).abs().max()
            by = (e.double() - r).abs().max() + torch.finfo(dtype).eps * r.abs().max()
            assert o.dtype == dtype and off <= 2 * by, (name, dtype, rules, float(off), float(by))
        assert torch.equal(output, parts[0][4]) and torch.equal(parts[0][1], parts[0][5])
        for part in parts:
            torch.testing.assert_close(part[1].double(), exact[1], rtol=1e-5, atol=1e-7)
            assert torch.equal(part[1], parts[0][1])
            assert (part[3] is None) == (exact[3] is None)
            if part[3] is not None:
                torch.testing.assert_close(part[3].double(), exact[3], rtol=1e-4, atol=1e-4)


def test_one_process_equals_the_operator(tmp_path):
    """With one process no sum is split: in this process, every mode."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        options = list(all_options())
        shards(0, 1, tmp_path, options)
        for number, (dtype, rules) in enumerate(options):
            output, centroids, grad, d_centroids, *_ = torch.load(tmp_path / f"{number}-0.pt")
            expected = alone(*case(dtype), **rules)
            torch.testing.assert_close(output, expected[0])
            torch.testing.assert_close(centroids, expected[1], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grad.float(), expected[2].float(), rtol=2e-2, atol=1e-2)
            assert (d_centroids is None) == (expected[3] is None) == (rules["grad"] != "unroll")
            if d_centroids is not None:
                torch.testing.assert_close(d_centroids, expected[3], rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()


def test_two_shards_equal_the_whole(tmp_path):
    check_shards(tmp_path, 2, [(torch.bfloat16, {"grad": "unroll", "rho": 0.2})])


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 4])
def test_shards_equal_the_whole(tmp_path, processes):
    check_shards(tmp_path, processes, list(all_options()))


def tensors(rank, processes, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight, gradient, centroids = case(torch.bfloat16, 1540)
    weight, gradient = weight.view(77, 20), gradient.view(77, 20)
    mesh = init_device_mesh("cpu", (processes,))
    local = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    found = dkm_sharded(local, centroids, rho=0.2)
    assert found.output.placements == local.placements and found.output.shape == weight.shape
    found.output.backward(distribute_tensor(gradient, mesh, [Shard(0)]))
    expected = alone(weight, gradient, centroids, rho=0.2)
    torch.testing.assert_close(found.output.full_tensor(), expected[0])
    torch.testing.assert_close(local.grad.full_tensor(), expected[2], rtol=2e-2, atol=1e-2)
    replicated = distribute_tensor(weight, mesh, [Replicate()])
    with pytest.raises(
        ValueError, match="dkm_sharded: a DTensor must be sharded over a mesh of one dimension, got placem"
    ):
        dkm_sharded(replicated, centroids, rho=0.2)
    broken = weight.split(39)[rank].clone()
    broken[0, 0] = torch.nan if rank == 0 else 1.0
    with pytest.raises(
        ValueError, match="weight must be finite, got 1 NaN"
    ):  # in every process: none may wait for ever
        dkm_sharded(broken, centroids, rho=0.2)
    single = torch.distributed.new_group([0])
    if rank == 0:
        alone_here = dkm_sharded(weight, centroids, rho=0.2, process_group=single)
        torch.testing.assert_close(alone_here.output, expected[0])


@pytest.mark.full
def test_sharded_tensors_and_groups(tmp_path):
    run(tensors, tmp_path, 2)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda w, c: dkm_sharded(w.float(), c, rho=1.0),
            TypeError,
            "must be bfloat16 or float16, whose values can be",
        ),
        (lambda w, c: dkm_sharded(w, c.double(), rho=1.0), TypeError, "centroids must be float32, got torch.float64"),
        (
            lambda w, c: dkm_sharded(w, c.expand(2, -1, -1), rho=1.0),
            ValueError,
            r"centroids must have shape \[1, clusters, 1\] \(one palette, scalars\), got \[2, 5, 1\]",
        ),
        (lambda w, c: dkm_sharded(w, c), ValueError, "dkm_sharded: one of tau and rho must be given"),
        (lambda w, c: dkm_sharded(w, c, rho=1.0, tau=1.0), ValueError, "dkm_sharded: one of tau and rho must be given"),
        (
            lambda w, c: dkm_sharded(w, c, tau=torch.ones(2)),
            ValueError,
            r"dkm_sharded: tau must be a number or have shape \[1\], got \[2\]",
        ),
        (lambda w, c: dkm_sharded(w, c, rho=0.0), ValueError, "dkm_sharded: rho must be positive and finite, got 0.0"),
        (
            lambda w, c: dkm_sharded(w, c, rho=1.0, forward="x"),
            ValueError,
            "dkm_sharded: forward must be one of soft, hard_ste, got 'x'",
        ),
    ],
)
def test_refusals(call, error, sentence):
    weight, _, centroids = case(torch.bfloat16)
    with pytest.raises(error, match=sentence):
        call(weight, centroids)


# ------------------------------------------------------------------------------------------------ gathered weights


class Network(nn.Module):
    """An embedding that shares its weight with the head, and two blocks between."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


WORDS = torch.arange(24).view(8, 3) * 7 % 32
LABELS = WORDS.flip(0)


def method():
    return EDKM(bits=2, embedding_bits=3, weight_threshold=100, total_steps=8, milestone=1, hard_last=0.3)


def prepared():
    torch.manual_seed(0)
    return method().prepare(Network())


def train(model, words, labels, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(words).flatten(0, 1), labels.flatten()) + method().loss(model)
        loss.backward()
        optimizer.step()
        method().step(model)
        losses.append(loss.detach())
    return torch.stack(losses)


def parallel(rank, processes, folder, kind):
    model = prepared()
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        wrapped = fully_shard(model)
    share = len(WORDS) // processes
    losses = train(wrapped, *(x[rank * share : (rank + 1) * share] for x in (WORDS, LABELS)))
    dist.all_reduce(losses)
    if kind == "fsdp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

        layer = model.blocks[0][0]
        assert type(layer.centroids) is torch.Tensor and hasattr(layer.weight, "full_tensor")
        for buffer in model.buffers():  # plain tensors, and the same everywhere
            copies = [torch.empty_like(buffer) for _ in range(processes)]
            dist.all_gather(copies, buffer)
            assert all(torch.equal(copy, buffer) for copy in copies)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        report = method().report(model)
        packed = layer.pack()
        full = prepared()
        full.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) or state)
        assert torch.equal(packed.weight, full.blocks[0][0].pack().weight)
        assert report.as_dict() == method().report(full).as_dict()
        back = prepared()
        for block in back.blocks:
            fully_shard(block)
        fully_shard(back)
        set_model_state_dict(back, full.state_dict(), options=StateDictOptions(full_state_dict=True))
        assert back.blocks[0][0].palette.count == 6 and back.blocks[0][0].palette.hard
        assert torch.equal(back(WORDS), model(WORDS))
    else:
        state = model.state_dict()
    if rank == 0:
        torch.save((losses / processes, state), folder / "state.pt")


def check_parallel(folder, processes, kind):
    single = prepared()
    losses = train(single, WORDS, LABELS)
    run(parallel, folder, processes, kind)
    found, state = torch.load(folder / "state.pt")
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
    expected = single.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        torch.testing.assert_close(
            state[name], expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_in_two_processes_equals_one(tmp_path, kind):
    check_parallel(tmp_path, 2, kind)


def test_the_network_of_these_tests():
    model = prepared()
    layers = [m for m in model.modules() if isinstance(m, Palettized)]
    assert len(layers) == 6 and len({id(layer.palette) for layer in layers}) == 5
    before = copy.deepcopy(model.state_dict())
    train(model, WORDS, LABELS)
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_the_examples_of_the_docstrings():
    results = doctest.testmod(importlib.import_module("cofire.distributed"))
    assert results.attempted > 0 and results.failed == 0
