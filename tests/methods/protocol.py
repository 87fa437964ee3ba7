# SPDX-License-Identifier: Apache-2.0
"""What every training method has to survive, as checks that any method can be put through::

    CHECKS = check_protocol(method=FTWT, model=tiny_network, batch=(x, y))

    @pytest.mark.parametrize("check", CHECKS)
    def test_protocol(check):
        check()

``method`` and ``model`` are called without arguments and, since a second process calls them too, live at the top of a
module. The model is a classifier with or without batch norm; ``batch`` holds its input and labels, evenly many.
"""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cofire.methods import Method

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A method on a small model, and how to train it."""

    method: Callable[[], Method]
    model: Callable[[], nn.Module]
    batch: tuple[Tensor, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def prepare(self, model: nn.Module) -> nn.Module:
        return self.method().prepare(model, **self.options)

    def prepared(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.prepare(self.model()).train()

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
            self.method().step(model)

    def loss(self, model: nn.Module, rows: slice = slice(None), call: Callable[..., Any] | None = None) -> Tensor:
        x, y = (part[rows] for part in self.batch)
        output = (model if call is None else call)(x)
        return F.cross_entropy(output.float(), y) + self.method().loss(model, output, y)

    def gradients(self, model: nn.Module, **options: Any) -> State:
        model.zero_grad()
        self.loss(model, **options).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_protocol(
    method: Callable[[], Method], model: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], **prepare: Any
) -> list[Any]:
    """One pytest parameter per check; ``prepare``: what the method's ``prepare`` gets beside the model."""
    case = Case(method, model, batch, prepare)
    return [pytest.param(functools.partial(check, case), id=check.__name__) for check in CHECKS]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def assert_same(a: State, b: State) -> None:
    """Equal, bit by bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def freeze_norms(model: nn.Module) -> nn.Module:
    """With the statistics of a batch, halves of a batch would differ from the whole, method or no method."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def prepare_leaves_its_argument_alone(case: Case) -> None:
    model = case.model()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    case.prepare(model)
    assert_same(before, model.state_dict())
    assert modules == list(model.modules())


def loss_reaches_something(case: Case) -> None:
    model = case.prepared()
    case.loss(model)
    loss = case.method().loss(model, model(case.batch[0]), case.batch[1])
    assert loss.dim() == 0
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def training_resumes_exactly(case: Case) -> None:
    through = case.prepared()
    optimizer = sgd(through)
    case.train(through, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": through.state_dict(), "optimizer": optimizer.state_dict()}, file)
    case.train(through, optimizer, 2)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = case.prepared(seed=1)
    resumed.load_state_dict(saved["model"])
    optimizer = sgd(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    case.train(resumed, optimizer, 2)
    assert_same(through.state_dict(), resumed.state_dict())


def copies_train_on_alike(case: Case) -> None:
    model = case.prepared()
    case.train(model, sgd(model), 1)
    loss = case.loss(model)  # what a method keeps of a forward is no leaf, and must not stop the copy
    duplicate = copy.deepcopy(model)
    loss.backward()
    assert_same(model.state_dict(), duplicate.state_dict())
    for network in (model, duplicate):
        case.train(network, sgd(network), 2)
    assert_same(model.state_dict(), duplicate.state_dict())


def whole_model_saves_and_loads(case: Case) -> None:
    model = case.prepared()
    case.train(model, sgd(model), 1)
    case.loss(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for network in (model, loaded):
        case.train(network, sgd(network), 2)
    assert_same(model.state_dict(), loaded.state_dict())


def safetensors_round_trip(case: Case) -> None:
    model = case.prepared()
    case.train(model, sgd(model), 2)
    other = case.prepared(seed=1)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    assert_same(model.state_dict(), other.state_dict())


def mixed_precision_trains(case: Case) -> None:
    model = case.prepared()
    exact = case.loss(model)
    optimizer = sgd(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(model)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(v.isfinite().all() for v in model.state_dict().values())


def accumulated_halves_equal_the_batch(case: Case) -> None:
    model = freeze_norms(case.prepared())
    half = len(case.batch[0]) // 2
    whole = case.gradients(model)
    model.zero_grad()
    for rows in (slice(None, half), slice(half, None)):
        (case.loss(model, rows) / 2).backward()
    assert_near(whole, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def compiles_without_a_break(case: Case) -> None:
    model, twin = case.prepared(), case.prepared()
    torch.compiler.reset()
    # this backend traces, functionalises and differentiates: all that a method can get wrong, and no code generation
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert_near(case.gradients(model), case.gradients(twin, call=compiled))
    case.method().step(compiled)
    case.method().step(model)
    assert_near(dict(model.state_dict()), dict(twin.state_dict()))
    assert case.method().loss(compiled, compiled(case.batch[0]), case.batch[1]).requires_grad


def gradient_checkpointing_changes_nothing(case: Case) -> None:
    plain, checkpointed = case.prepared(), case.prepared()
    call = functools.partial(checkpoint, checkpointed, use_reentrant=False)
    assert_same(case.gradients(plain), case.gradients(checkpointed, call=call))


def two_processes_equal_one(case: Case) -> None:
    single = freeze_norms(case.prepared())
    case.train(single, sgd(single), 2)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_train_in_parallel, (case, folder), nprocs=2)
        parallel = torch.load(Path(folder, "state.pt"))
    assert_near(dict(single.state_dict()), parallel)


def _train_in_parallel(rank: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    # a file to meet at, since ports may be taken
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = len(case.batch[0]) // 2
    own = Case(
        case.method, case.model, tuple(part[rank * half : (rank + 1) * half] for part in case.batch), case.options
    )
    model = freeze_norms(own.prepared())
    own.train(nn.parallel.DistributedDataParallel(model), sgd(model), 2)
    if rank == 0:
        torch.save(model.state_dict(), Path(folder, "state.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def finalized_model_stands_alone(case: Case) -> None:
    model = case.prepared()
    case.train(model, sgd(model), 2)
    before, x = copy.deepcopy(model.state_dict()), case.batch[0]
    final = case.method().finalize(model)
    assert_same(before, model.state_dict())
    with torch.no_grad():
        expected = final(x)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(final(x), expected), "the finalized model shares memory with the prepared one"
    assert torch.equal(copy.deepcopy(final)(x), expected)


def report_reads_like_a_mapping(case: Case) -> None:
    report = case.method().report(case.prepared(), [case.batch, case.batch[0]])
    assert dict(report).keys() == report.as_dict().keys()
    with pytest.raises(KeyError, match="no entry named"):
        report["no such thing"]


def misuse_is_named(case: Case) -> None:
    method, plain = case.method(), case.model()
    for call in (method.loss, method.step, method.finalize, lambda model: method.report(model, [case.batch])):
        with pytest.raises(ValueError, match=rf"{type(method).__name__}\.\w+: .*prepare"):
            call(plain)
    prepared = case.prepared()
    with pytest.raises(ValueError, match=r"prepare: .*already"):
        method.prepare(prepared)
    with pytest.raises(ValueError, match=r"finalize: .*already"):
        method.finalize(method.finalize(prepared))


CHECKS = (
    prepare_leaves_its_argument_alone,
    loss_reaches_something,
    training_resumes_exactly,
    copies_train_on_alike,
    whole_model_saves_and_loads,
    safetensors_round_trip,
    mixed_precision_trains,
    accumulated_halves_equal_the_batch,
    compiles_without_a_break,
    gradient_checkpointing_changes_nothing,
    two_processes_equal_one,
    finalized_model_stands_alone,
    report_reads_like_a_mapping,
    misuse_is_named,
)
