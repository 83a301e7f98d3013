"""Gradients of promises, and of what is made of them: whoever asks for them, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.utils.checkpoint import checkpoint

import fastst
from tests.rewrite.convert.programs.helpers import Doubles, Scale
from tests.support.blocks import Block, Reverse, compute_pair


@pytest.mark.parametrize("ask", [
    lambda u, y: u.register_hook(lambda g: 2 * g),
    lambda u, y: u.retain_grad(),
    lambda u, y: torch.autograd.grad(y.sum(), [u], allow_unused=True),
    lambda u, y: y.sum().backward(inputs=[u]),
    lambda u, y: torch.autograd.backward([y.sum()], inputs=u),
], ids=["hook", "retained", "differentiated", "inputs", "inputs of several"])  # fmt: skip
@pytest.mark.parametrize("named", ["u", "z", "y"])
def test_gradients_of_what_lies_in_an_operation_are_refused(named: str, ask: Any) -> None:
    """The operation passes them by: asked for before, they are what they were."""
    block = Block(compute_pair)
    fastst.convert(block)
    u = block.s(torch.randn(2, 4, 5, 6, 6))
    z = F.relu(block.n(u))
    y = block.t(z)
    v = nn.BatchNorm3d(4)(y)  # takes the statistics of y's kernel
    with pytest.raises(RuntimeError, match="part of an operation that has run"):
        ask({"u": u, "z": z, "y": y}[named], v)
    F.silu(u).register_hook(lambda g: 2 * g)


def retained(t: Tensor) -> Callable[[], Any]:
    t.retain_grad()
    return lambda: t.grad


def hooked_by(register: Callable[[Tensor, Any], Any]) -> Callable[[Tensor], Callable[[], Any]]:
    def ask(t: Tensor) -> Callable[[], Any]:
        grads: list[Any] = []
        register(t, grads)
        return lambda: grads[0]

    return ask


HOOKS: dict[str, Callable[[Tensor], Callable[[], Any]]] = {
    "retained": retained,
    "hook": hooked_by(lambda t, grads: t.register_hook(grads.append)),
    "hook of several": hooked_by(
        lambda t, grads: register_multi_grad_hook([t], lambda given: grads.extend(given))
    ),
    "hook of the node": hooked_by(
        lambda t, grads: t.grad_fn.register_hook(lambda _, given: grads.extend(given))  # type: ignore[union-attr]
    ),
}


def plain_and_converted() -> tuple[Block, Block]:
    plain = Block(compute_pair).double()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    return plain, converted


@pytest.mark.parametrize("named", ["u", "v", "padded"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_what_was_extended_already(name: str, named: str) -> None:
    """The pair that would have taken it in leaves it out: a plan that knew nothing of it, once."""
    x, found = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64), []
    for m in plain_and_converted():
        u = m.s(x)
        v = m.n(u)
        z = F.pad(v, (0, 0, 0, 0, 1, 1)) if named == "padded" else F.relu(v)
        asked = HOOKS[name](u if named == "u" else v)
        m.t(z).square().sum().backward()
        found.append((asked(), m.s.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_hooks_that_change_gradients_of_what_was_extended_already() -> None:
    block = Block(compute_pair)
    fastst.convert(block)
    u = block.s(torch.randn(2, 4, 5, 6, 6))
    z, read = F.relu(u), Reverse.apply(F.silu(u))
    u.register_hook(lambda g: 0 * g)
    read.sum().backward()
    y = block.t(z).sum()
    y.backward(retain_graph=True)
    assert not block.s.weight.grad.any()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="was read by a custom autograd function"):
        (y + Reverse.apply(u).sum() + read.sum()).backward()


@pytest.mark.parametrize("ask", [
    lambda y, t: torch.autograd.grad(y.square().sum(), t)[0],
    lambda y, t: (y.square().sum().backward(inputs=[t]), t.grad)[1],
    lambda y, t: (y.backward(torch.ones(y.shape, dtype=y.dtype), inputs=t), t.grad)[1],
    lambda y, t: (torch.autograd.backward([y.sum()], inputs=(t,)), t.grad)[1],
    lambda y, t: torch.autograd.grad(y.square().sum(), get_gradient_edge(t))[0],
], ids=["grad", "inputs", "of a promise", "of several", "edge"])  # fmt: skip
def test_gradients_of_what_was_extended(ask: Any) -> None:
    """What reads it is made of the value that somebody still has, not of one of its own."""
    x, found = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64), []
    for m in plain_and_converted():
        u = m.s(x)
        found.append(ask(F.relu(m.n(u)), u))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_gradients_of_what_a_custom_function_has_read_are_refused() -> None:
    """Its graph goes to the leaves at once."""
    block = Block(compute_pair)
    fastst.convert(block)
    u = block.s(torch.randn(2, 4, 5, 6, 6))
    for read in (Reverse.apply(F.relu(u)).sum() + u.sum(), Reverse.apply(u)):
        with pytest.raises(RuntimeError, match="was read by a custom autograd function"):
            torch.autograd.grad(read.sum(), u, allow_unused=True)
    copied = u.clone()
    torch.autograd.grad(Reverse.apply(copied).sum(), [copied, u])


def test_written_after_its_gradient_was_asked_for() -> None:
    """What was made of it before would be of another value, without hooks."""
    block = Block(compute_pair)
    fastst.convert(block)
    u = block.s(torch.randn(2, 4, 5, 6, 6))
    z = F.relu(u)
    u.register_hook(lambda g: 0 * g)
    with torch.no_grad():
        u.mul_(2)
    with pytest.raises(RuntimeError, match="written to after its gradient was asked for"):
        z.sum()


def test_frozen_before_backward() -> None:
    """Gradients of gradients need what the first ones needed."""
    block = Block(compute_pair).double().eval()
    x = torch.randn(1, 4, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for convert in (False, True):
        if convert:
            fastst.convert(block)
        y = block(x)
        block.requires_grad_(False)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
        block.requires_grad_(True)
    torch.testing.assert_close(*found)


def test_gradients_of_a_promise_and_of_its_value() -> None:
    """A custom function's two ways to the same promise share no graph that the first one frees."""
    block = Block(lambda m, x: Doubles.apply(m.t(m.s(x)))).double()
    x = torch.randn(1, 4, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for convert in (False, True):
        if convert:
            fastst.convert(block)
        (g,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
        (g.square().sum() + block(x).sum()).backward()
        found.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*found)


def test_backward_of_a_function_computes_nothing_again() -> None:
    """What a custom function reads has a graph: weights may be gone by now, as FSDP's are."""
    block = Block(lambda m, x: Doubles.apply(m.t(m.s(x))))
    fastst.convert(block)
    y = block(torch.randn(1, 4, 5, 6, 6)).sum()
    with fastst.dispatch.recording() as calls:
        y.backward()
    assert {call.phase for call in calls} == {"backward"}


class Thirds(torch.autograd.Function):
    """Calls a module within its forward, and has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        with torch.enable_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, (grad.sum(1, keepdim=True) / 3).expand(ctx.shape)


def by_checkpoint(module: nn.Module, x: Tensor) -> Tensor:
    def call(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return module(x)

    found: Tensor = checkpoint(call, x, use_reentrant=True)
    return found


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "returned": lambda m, u: u,
    "activated": lambda m, u: F.relu(u),
    "of a pair": lambda m, u: m.t(F.relu(u)),
    "of a pair with a norm": lambda m, u: m.t(F.relu(m.n(u))),
}


def gradients_as_plain(build: Callable[[], nn.Module], x: Tensor) -> None:
    """Of x and of every parameter, none where there is none."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        module, leaf = build().double(), x.detach().clone().requires_grad_(x.requires_grad)
        if converted:
            fastst.convert(module)
        y = module(leaf)
        if y.requires_grad:
            y.square().sum().backward()
        found.append([y.requires_grad, leaf.grad, *(p.grad for p in module.parameters())])
    for plain, ours in zip(*found, strict=True):
        assert type(plain) is type(ours)
        if isinstance(plain, Tensor):
            torch.testing.assert_close(ours, plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", [Thirds.apply, by_checkpoint], ids=["own", "checkpoint"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_leaves_a_custom_function_has_its_gradient(call: Any, how: Any, grad: bool) -> None:
    """Its own, or none where nothing that it was given needs one."""
    x = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64, requires_grad=grad)
    gradients_as_plain(lambda: Block(lambda m, x: call(m, how(m.s, x))), x)


class Square(Block):
    """All of whose convolutions have four channels."""

    def __init__(self, body: Any) -> None:
        super().__init__(body)
        self.s = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
        self.n, self.t = nn.BatchNorm3d(4), nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))


READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "called twice": lambda m, x: Doubles.apply(m.s(m.s(x))),
    "called twice, with a norm": lambda m, x: Doubles.apply(m.n(m.s(m.n(m.s(x))))),
    "called on what its weight made": lambda m, x: Doubles.apply(F.relu(m.s(x * m.s.weight.sum()))),
    "of a weight that is made of its own": lambda m, x: Doubles.apply(
        torch.func.functional_call(m.s, {"weight": m.s.weight * x.mean()}, (x,))
    ),
    "a pair called twice": lambda m, x: Doubles.apply(m.t(m.s(m.t(m.s(x))))),
    "both": lambda m, x: Doubles.apply(u := m.s(m.s(x))) * u,
    "written to": lambda m, x: Doubles.apply(m.s(x).add_(m.t.weight.mean())),
    "written to twice": lambda m, x: Doubles.apply(m.s(x).mul_(2).add_(m.t.weight.mean())),
    "read and written to": lambda m, x: Scale.apply(u := m.s(x)) + u.mul_(m.t.weight.mean()),
    "read, written to, read": lambda m, x: (
        Scale.apply(u := m.s(x)) + Scale.apply(u.mul_(3)) - u.add_(m.t.weight.sum())
    ),
    "filled": lambda m, x: Doubles.apply(F.silu(u := m.s(x)).copy_(m.t(u))),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("call", READ.values(), ids=READ)
def test_what_custom_functions_read(call: Any, frozen: bool, grad: bool) -> None:
    """Gradients of weights that x is made of as well, and of what was written to a promise."""

    def build() -> nn.Module:
        block = Square(lambda m, x: call(m, x))
        block.s.requires_grad_(not frozen)
        return block

    x = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64, requires_grad=grad)
    gradients_as_plain(build, x)


@pytest.mark.parametrize("call", READ.values(), ids=READ)
def test_second_gradients_of_what_custom_functions_read(call: Any) -> None:
    found, block = [], Square(lambda m, x: call(m, F.silu(x))).double().eval()
    x = torch.randn(1, 4, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    for converted in (False, True):
        if converted:
            fastst.convert(block)
        leaves = [x, block.s.weight]
        first = torch.autograd.grad(block(x).square().sum(), leaves, create_graph=True)
        total: Any = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(*found)


def test_views_written_to_between_two_custom_functions() -> None:
    """Which of the two read what was written, nothing tells."""
    block = Square(lambda m, x: m.s(x))
    fastst.convert(block)
    u = block(torch.randn(2, 4, 5, 6, 6))
    v = u[:, :2]
    v.mul_(block.t.weight.mean())
    with pytest.raises(RuntimeError, match="give the function a clone"):
        Doubles.apply(u).sum().backward()


@pytest.mark.parametrize("what", ["weight", "x", "retained"])
def test_hooks_of_what_a_custom_function_reads_run_once(what: str) -> None:
    """Those of the tensors that the convolution reads."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        block = Square(lambda m, x: m.t(Reverse.apply(m.s(x)))).double()
        if converted:
            fastst.convert(block)
        leaf = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        x, calls = leaf * 1, []
        if what == "weight":
            block.s.weight.register_hook(lambda g, calls=calls: calls.append(1) or g / 2)
        elif what == "x":
            x.register_hook(lambda g, calls=calls: calls.append(1) or 3 * g)
        else:
            x.retain_grad()
        block(x).square().sum().backward()
        kept = x.grad if what == "retained" else torch.tensor(len(calls))
        found.append([block.s.weight.grad, block.s.bias.grad, leaf.grad, kept])
    torch.testing.assert_close(*found)


CHECKPOINTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "elu": lambda m, x: by_hooks(lambda v: m.t(F.elu(m.n(m.s(v)))), x),
    "dropout": lambda m, x: by_hooks(lambda v: m.t(F.dropout(F.relu(m.n(m.s(v))), 0.2)), x),
    "relu": lambda m, x: by_hooks(lambda v: m.t(F.relu(m.n(m.s(v)))), x),
    "own": lambda m, x: by_hooks(lambda v: m.t(Doubles.apply(m.n(m.s(v)))), x),
    "nested": lambda m, x: by_hooks(lambda v: by_hooks(lambda u: m.t(F.relu(u)), m.s(v)), x),
    "between": lambda m, x: m.t(by_hooks(lambda v: F.relu(m.n(m.s(v))), x)),
    "read within": lambda m, x: by_hooks(lambda u: m.t(F.relu(m.n(u))), m.s(x)),
    "saved": lambda m, x: saved_on_cpu(lambda v: m.t(F.relu(m.n(m.s(v)))), x),
}


def by_hooks(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = checkpoint(call, x, use_reentrant=False)
    return found


def saved_on_cpu(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return call(x)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("call", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_steps_in_a_checkpoint(call: Any, twice: bool) -> None:
    """What the first run saves the second one saves, however often a pair has come to nothing;
    statistics are counted as often as by the modules."""
    torch.manual_seed(0)
    plain = Square(lambda m, x: call(m, x)).double()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    for step in range(12):
        found = []
        for m in (plain, converted):
            torch.manual_seed(step)
            m.zero_grad()
            x = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
            loss = m(x).square().sum()
            loss.backward(retain_graph=twice)
            if twice:
                loss.backward()
            found.append([x.grad, *(p.grad for p in m.parameters()), *m.buffers()])
        torch.testing.assert_close(*found)


class Passed(torch.autograd.Function):
    """What ``DistributedDataParallel`` hands all outputs through."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Any:
        return tuple(y.clone() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads


@pytest.mark.parametrize("hooked", [False, True])
def test_nodes_that_somebody_looked_at_before_a_custom_function_reads(hooked: bool) -> None:
    """Of several outputs, made of each other: a hook that hangs there is called with all of it."""
    grads = []
    for convert in (False, True):
        torch.manual_seed(0)
        block = Block(lambda m, x: m.t(F.relu(m.s(x))))
        head = nn.Conv3d(4, 2, (1, 3, 3))
        if convert:
            fastst.convert(nn.ModuleList([block, head]))
        y = block(torch.ones(1, 4, 3, 6, 6).cumsum(3).cos())
        z = head(y)
        nodes: list[Any] = [y.grad_fn, z.grad_fn]
        seen: list[Tensor] = []
        if hooked:
            for node in nodes:
                node.register_prehook(lambda given, seen=seen: seen.append(given[0]))
        y, z = Passed.apply(y, z)
        (y.sin().sum() + z.cos().sum()).backward()
        grads.append([p.grad for m in (block, head) for p in m.parameters()] + seen)
    torch.testing.assert_close(*grads)
