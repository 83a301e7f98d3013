"""A promise as others meet it: copied, sent, exported, written to, given back."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastst
from fastst.rewrite.convert.promise import Promise
from tests.support.blocks import Block, compute_pair


def test_leaves_in_other_ways() -> None:
    """Pickled, copied, sent to another thread, shown, and asked for its sizes only."""
    conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    x = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        wanted = conv[0](x)
        fastst.convert(conv)
        promised = [conv[0](x) for _ in range(4)]
        assert (promised[0].shape, promised[0].dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(pickle.loads(pickle.dumps(promised[0])), wanted)
        assert torch.equal(copy.deepcopy(promised[1]), wanted)
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(promised[2] * 1))
        thread.start(), thread.join()
        assert torch.equal(found[0], wanted)
        assert repr(promised[3]) == repr(wanted)


class Named(Tensor):
    """A class that answers for its tensors, and for what is made of them."""


@pytest.mark.parametrize("call", [
    lambda u, t: u.as_subclass(Named), lambda u, t: u + t, lambda u, t: torch.relu(u) * t,
    lambda u, t: torch.cat([t, u]), lambda u, t: u.add_(t),
    lambda u, t: F.layer_norm(u, (4,), t[0, 0, 0, 0]),
])  # fmt: skip
@pytest.mark.parametrize("lone", [True, False])
def test_beside_tensors_of_another_class(call: Any, lone: bool) -> None:
    conv = nn.Sequential(nn.Conv3d(4, 6, 3 if lone else (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    x, other = torch.randn(1, 4, 3, 6, 6), torch.rand(1, 6, 1 if lone else 3, 4, 4)
    found = []
    with torch.no_grad():
        for convert in (False, True):
            if convert:
                fastst.convert(conv)
            found.append(call(conv[0](x), other.as_subclass(Named)))
    assert [type(y) for y in found] == [type(found[0])] * 2
    torch.testing.assert_close(*(y.as_subclass(Tensor) for y in found))


@pytest.mark.parametrize("copied", [copy.copy, lambda t: pickle.loads(pickle.dumps(t))])
def test_attributes_go_with_copies(copied: Any) -> None:
    conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    fastst.convert(conv)
    with torch.no_grad():
        u: Any = conv[0](torch.randn(1, 4, 3, 6, 6))
        u.fps, u.seen, u.differentiable = 25, "yes", None
        torch.testing.assert_close(conv[1](u), conv[1](u.clone()))
        assert copied(u).fps == 25
        assert not vars(copied(u)).keys() - {"fps", "seen", "differentiable"}


def test_sizes_that_are_given_beside_it() -> None:
    """Some functions take a ``torch.Size`` otherwise than a tuple of the same numbers."""
    conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    fastst.convert(conv)
    u = conv[0](torch.randn(1, 4, 3, 6, 6))
    assert u.new(u.shape).shape == u.shape


def test_memory_that_is_not_there() -> None:
    """Who asks by a protocol gets the tensor; C++ that reads an address raises."""
    conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    x = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        wanted = conv[0](x)
        fastst.convert(conv)
        assert torch.equal(torch.from_dlpack(conv[0](x)), wanted)
        assert (conv[0](x).numpy() == wanted.numpy()).all()
        promised = conv[0](x)
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            torch.utils.dlpack.to_dlpack(promised)
        assert torch.equal(promised, wanted)


class Questions(TorchFunctionMode):
    """Remembers what is asked of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked.append(func)
        return func(*args, **(kwargs or {}))


def test_how_many_dimensions() -> None:
    """Asked before and after others have changed them, which a mode of the user's sees."""
    seen = []
    for convert in (False, True):
        model = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
        if convert:
            fastst.convert(model)
        with torch.no_grad():
            u = model[0](torch.randn(1, 4, 3, 6, 6))
            assert isinstance(u, Promise) == convert
            dims = [u.dim()]
            with Questions() as mode:
                dims.append(u.dim())
            with torch._C.DisableTorchFunction():
                dims.append(u.dim())
            u.unsqueeze_(0)
            dims += [u.dim(), u.squeeze_(0).dim(), u.resize_(4).dim()]
            u.data = torch.ones(2, 3)
            dims.append(u.dim())
        seen.append((dims, mode.asked))
    assert seen[0] == seen[1] == ([5, 5, 5, 6, 5, 1, 2], [Tensor.dim])


def as_data(u: Tensor) -> Tensor:
    t = torch.zeros(1)
    t.data = u
    t.add_(1)
    return t + u


def as_parameter(u: Tensor) -> Tensor:
    t = nn.Parameter(torch.zeros(2, 3))
    t.data = u
    t.data.mul_(2)
    return t.detach() + u


def as_data_twice(u: Tensor) -> Tensor:
    one, other = torch.zeros(1), torch.zeros(1)
    one.data = u
    other.data = u
    u.mul_(3)
    return one + other.detach() * u.shape[3]


def other_data(u: Tensor) -> Tensor:
    t = torch.ones(2, 3)
    u.data = t
    u.data[0] = 5
    return u + t


def as_buffer(u: Tensor) -> Tensor:
    module = nn.Module()
    module.register_buffer("bank", u)
    module.bank.data = module.bank.data * 2  # type: ignore[operator, union-attr]
    return module.double().state_dict()["bank"]


def swapped(u: Tensor) -> Tensor:
    t = torch.ones(2, 3)
    torch.utils.swap_tensors(t, u)
    return t * 2 + u.sum()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("hand", [
    as_data, as_parameter, as_data_twice, other_data, as_buffer, swapped,
    lambda u: as_data(u.detach()), lambda u: as_data(F.relu(u)), lambda u: as_data(u[:, :2]),
])  # fmt: skip
def test_memory_that_is_handed_on(hand: Any, mode: Any) -> None:
    """``t.data = u`` and what is alike: the memory is that of the value, and both see writes."""
    outputs = []
    for convert in (False, True):
        torch.manual_seed(0)
        conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
        if convert:
            fastst.convert(conv)
        with mode():
            u = conv[0](torch.ones(1, 4, 3, 6, 6).cumsum(3))
            if mode is torch.enable_grad:
                u = u.detach()
            if convert and mode is not torch.enable_grad:
                assert type(u) is Promise
            outputs.append((hand(u), u + 0))
    torch.testing.assert_close(*outputs)


class Refusing(Tensor):
    """Knows no operators."""

    @staticmethod
    def __new__(cls) -> Refusing:
        made: Refusing = Tensor._make_wrapper_subclass(cls, (2, 3))  # type: ignore[attr-defined]
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class RefusingMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def test_data_of_other_classes_and_under_modes() -> None:
    """Nobody else hears of ``t.data = u`` through what promises hear of it."""
    fastst.convert(Block(compute_pair))
    t, other, refusing = torch.zeros(1), torch.ones(2, 3), Refusing()
    refusing.data = other
    t.data = refusing
    assert t.shape == (2, 3)
    t = torch.zeros(1)
    with RefusingMode():
        t.data = other
    assert torch.equal(t, other)


def test_set_is_refused() -> None:
    """PyTorch asks nobody about it, and a promise has no memory to set."""
    block = Block(compute_pair)
    fastst.convert(block)
    with torch.no_grad(), pytest.raises(RuntimeError, match="requires that it has been computed"):
        block.s(torch.randn(1, 4, 3, 6, 6)).set_(torch.zeros(1))


def test_written_in_place_after_it_left_a_function() -> None:
    """What a reentrant checkpoint returns has a gradient of its own: one tensor, however read."""
    block = Block(lambda m, x: F.relu_(checkpoint(m.s, x, use_reentrant=True)))
    x = torch.randn(1, 4, 5, 6, 6, requires_grad=True)
    wanted = block(x)
    fastst.convert(block)
    y = checkpoint(block.s, x, use_reentrant=True)
    F.relu_(y)
    torch.testing.assert_close(y + 0, wanted)


@pytest.mark.parametrize("call", [
    lambda v: F.relu(v, inplace=True), lambda v: F.relu(input=v, inplace=True),
    lambda v: v.mul_(2), lambda v: v.contiguous(), lambda v: v.to(v.dtype), lambda v: v.real,
    lambda v: F.dropout(v, 0.5, False), lambda v: F.dropout(v, 0.5, False, True),
    lambda v: v.requires_grad_(v.requires_grad), lambda v: v.type(v.dtype), lambda v: v.cpu(),
    lambda v: v.__iadd__(1), lambda v: v.clamp_(min=0), lambda v: torch.relu_(v),
    lambda v: v.detach(), lambda v: v.clone(), lambda v: v.view_as(v), lambda v: F.relu(v),
    lambda v: v.contiguous(memory_format=torch.channels_last_3d),
])  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("read", [True, False])
def test_what_gives_back_its_argument(call: Any, read: bool, grad: bool) -> None:
    """The same object, also when somebody has read it before, with what was set on it."""
    found = []
    for convert in (False, True):
        block = Block(lambda m, x: m.s(x))
        if convert:
            fastst.convert(block)
        with torch.set_grad_enabled(grad):
            v = block(torch.randn(1, 4, 3, 6, 6))
            v.mask = 3  # type: ignore[attr-defined]
            if read:
                v.sum().item()
            found.append((call(v) is v, getattr(call(v), "mask", None)))
    assert found[0] == found[1]


def minima_into(x: Tensor, u: Tensor) -> Tensor:
    torch.min(x, 1, out=(u, torch.empty(0, dtype=torch.long)))
    return u


@pytest.mark.parametrize("write", [lambda x, u: torch.add(x[:, :1], 1, out=u), minima_into])
def test_written_as_the_output_of_another_size(write: Any) -> None:
    found, x = [], torch.randn(1, 4, 4, 6, 6)
    for convert in (False, True):
        block = Block(lambda m, x: m.s(x))
        if convert:
            fastst.convert(block)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch would have outputs resized by hand
            u = block(x)
            given = write(x, u)
            found.append((u.shape, given.shape, u.numel(), u + 0))
    assert found[0][:3] == found[1][:3]
    torch.testing.assert_close(found[0][3], found[1][3])
