# SPDX-License-Identifier: Apache-2.0
"""Reading a network's structure with ``torch.fx``, for methods that must know which layer feeds which.

What the methods need: the groups convolution - norm - [residual sum] - activation, to replace each by one
module; and, for each convolution, the convolutions that produce its input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import GraphModule, Node
from torch.nn.modules import activation as activations
from torch.nn.utils.fusion import fuse_conv_bn_eval

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS: dict[Any, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    "relu": "relu",
    "relu_": "relu",
}
ACTIVATION_NAMES = {name.lower() for name in activations.__all__} | {"leaky_relu", "hard_swish", "log_sigmoid"}


class _Tracer(fx.Tracer):
    """Our own modules are units, as those of ``torch.nn`` are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("cofire.nn") or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> GraphModule:
    """The graph of ``model``'s forward, sharing its parameters.

    Raises:
        ValueError: ``torch.fx`` cannot trace it, or the forward itself asks ``self.training`` (a trace would
            freeze the answer).
    """
    name = type(model).__name__
    modes = {module: module.training for module in model.modules()}
    graphs = []
    try:
        for training in (True, False):
            model.train(training)
            graphs.append(_Tracer().trace(model))
    except Exception as error:  # whatever the forward raises when it is given symbols
        raise ValueError(f"torch.fx cannot trace {name}: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    in_training, in_evaluation = (str(graph).splitlines() for graph in graphs)
    if in_training != in_evaluation:
        pairs = zip(in_training, in_evaluation, strict=False)
        line = next((t for t, e in pairs if t != e), in_training[-1]).strip()
        raise ValueError(
            f"torch.fx cannot trace {name}: its forward depends on self.training (at '{line}'); use modules such as "
            "nn.Dropout instead of functions"
        )
    for node in graphs[0].nodes:
        if isinstance(node.type, str):  # an annotation as text (PEP 563); the graph could not be pickled with it
            node.type = None
    return GraphModule(model, graphs[0], class_name=name)


@dataclass(frozen=True)
class ConvGroup:
    """Nodes that one module replaces: convolution, norm, residual sum, activation; the last three may be absent."""

    conv: Node
    norm: Node | None
    addition: Node | None  #: the residual sum
    activation: str  #: "relu", "relu6" or "identity"
    nodes: tuple[Node, ...]  #: in order; the last one's value is the group's

    @property
    def name(self) -> str:
        return str(self.conv.target)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The convolution's input and, with a residual sum, its other operand. Edits of the graph change them."""
        x = self.conv.all_input_nodes[0]
        if self.addition is None:
            return (x,)
        return x, next(operand for operand in self.addition.all_input_nodes if operand is not self.norm)


def conv_groups(traced: GraphModule, fuse_residual: bool = True) -> list[ConvGroup]:
    """The groups of ``traced``, in order.

    A group is a convolution called once, with zero padding, followed by batch norm, or ReLU, or both. With
    ``fuse_residual``, a residual sum between norm and ReLU belongs to it, and the shortcut's own convolution
    is not a group (it would be gated twice). A convolution with a norm that nothing activates (a linear
    bottleneck) is a group of activation "identity"; one that another activation follows is none.
    """
    modules = dict(traced.named_modules())
    depth = conv_depths(traced)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    groups = []
    for node in traced.graph.nodes:
        conv = _module(node, modules, nn.Conv2d)
        if conv is not None and calls.count(node.target) == 1 and conv.padding_mode == "zeros":
            group = _group(node, modules, depth, fuse_residual)
            if group is not None:
                groups.append(group)
    return groups


def _group(conv: Node, modules: dict[str, nn.Module], depth: dict[Node, int], fuse_residual: bool) -> ConvGroup | None:
    nodes, norm, addition = [conv], None, None
    user = _only_user(conv)
    if user is not None and type(_module(user, modules, nn.BatchNorm2d)) is nn.BatchNorm2d:
        norm = user
        nodes.append(norm)
        user = _only_user(norm)
    if user is not None and norm is not None and _is_addition(user):
        if max(user.all_input_nodes, key=lambda operand: depth[operand]) is not norm:
            return None  # the shortcut's convolution: the main branch, which has more convolutions, holds the gate
        activation = _only_user(user)
        if fuse_residual and activation is not None and _relu(activation, modules):
            addition = user
            nodes.append(addition)
            user = activation
    kind = _relu(user, modules) if user is not None else None
    if kind is not None:
        assert user is not None
        return ConvGroup(conv, norm, addition, kind, (*nodes, user))
    if norm is None or any(_is_activation(user, modules) for user in norm.users):
        return None
    return ConvGroup(conv, norm, None, "identity", tuple(nodes))


def replace(traced: GraphModule, group: ConvGroup, module: nn.Module) -> None:
    """Put ``module`` in the place of ``group``, under the convolution's name; it is called with (input[, residual])."""
    traced.set_submodule(group.name, module)
    last = group.nodes[-1]
    with traced.graph.inserting_before(last):  # here input and residual both exist
        node = traced.graph.call_module(group.name, group.inputs)
    last.replace_all_uses_with(node)
    for old in reversed(group.nodes):
        traced.graph.erase_node(old)
        # at once: `clean` would take the norm, which now lives inside `module`, for used
        if old is not group.conv and old.op == "call_module" and not _is_called(traced, old.target):
            traced.delete_submodule(str(old.target))
    modules = dict(traced.named_modules())
    for user in node.users:
        _make_out_of_place(user, modules)  # the module keeps its output for the backward


def clean(traced: GraphModule) -> GraphModule:
    """Make the edits of the graph take effect, and drop the modules that nothing calls any more."""
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced


def drop_identities(traced: GraphModule) -> None:
    """Remove the calls of ``nn.Identity``, which would hide what follows what."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if _module(node, modules, nn.Identity) is not None:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def fold_norms(traced: GraphModule) -> None:
    """Fold each batch norm that follows a plain convolution into it; for inference only."""
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for source in list(traced.graph.nodes):
        conv, node = _module(source, modules, nn.Conv2d), _only_user(source)
        if conv is None or node is None or calls.count(source.target) > 1:
            continue
        norm = _module(node, modules, nn.BatchNorm2d)
        if norm is not None and norm.running_mean is not None:
            traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv.eval(), norm.eval()))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)


def conv_depths(traced: GraphModule) -> dict[Node, int]:
    """For each node, the most convolutions on a path from the network's inputs to it, itself included."""
    modules = dict(traced.named_modules())
    depth: dict[Node, int] = {}
    for node in traced.graph.nodes:
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = before + (_convolution(node, modules) is not None)
    return depth


def producers(traced: GraphModule) -> dict[str, list[str]]:
    """For each convolution, the names of those that produce its input.

    At a sum, the deeper operand counts (the main branch of a residual block); at a concatenation, all of
    them; none for the network's input.
    """
    modules = dict(traced.named_modules())
    depth = conv_depths(traced)

    def walk(value: Any) -> list[str]:
        if not isinstance(value, Node):
            return []
        if _convolution(value, modules) is not None:
            return [str(value.target)]
        if value.target in (torch.cat, torch.concat, torch.concatenate):
            return [name for source in value.all_input_nodes for name in walk(source)]
        return walk(max(value.all_input_nodes, key=lambda source: depth[source], default=None))

    return {
        str(node.target): walk(node.args[0]) for node in traced.graph.nodes if _convolution(node, modules) is not None
    }


def _module(node: Node, modules: dict[str, nn.Module], kind: type[nn.Module]) -> Any:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, kind) else None


def _convolution(node: Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The convolution that a node calls: a plain one, or one of ours that holds one."""
    module: nn.Module | None = _module(node, modules, nn.Module)
    is_convolution = isinstance(module, nn.Conv2d) or isinstance(getattr(module, "conv", None), nn.Conv2d)
    return module if is_convolution else None


def _is_called(traced: GraphModule, target: Any) -> bool:
    return any(node.op == "call_module" and node.target == target for node in traced.graph.nodes)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: Node) -> bool:
    two = len(node.args) == 2 and len(node.all_input_nodes) == 2 and not node.kwargs
    return two and node.op in ("call_function", "call_method") and node.target in ADDITIONS


def _kind(node: Node, modules: dict[str, nn.Module]) -> Any:
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def _relu(node: Node, modules: dict[str, nn.Module]) -> str | None:
    return RELUS.get(_kind(node, modules))


def _is_activation(node: Node, modules: dict[str, nn.Module]) -> bool:
    kind: str | type | Callable[..., Any] = _kind(node, modules)
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.lower().rstrip("_") in ACTIVATION_NAMES


def _make_out_of_place(node: Node, modules: dict[str, nn.Module]) -> None:
    module = _module(node, modules, nn.Module)
    if getattr(module, "inplace", False):
        module.inplace = False
    if node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
    if node.target is operator.iadd:
        node.target = operator.add
    elif node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        node.target = str(node.target).rstrip("_")
