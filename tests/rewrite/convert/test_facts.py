"""What is remembered of a chain holds for chains of the same facts: each fact changes between two
calls of a converted pair, once it has been called often enough to remember everything."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst.rewrite.convert import pairs, rules

Change = Callable[[Any, Tensor], Any]  # of a model and its input: a context that gives the input


def pair(training: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(12), nn.ReLU(),
        nn.Conv3d(12, 8, (3, 1, 1), padding=(1, 0, 0)),
    )  # fmt: skip
    with torch.no_grad():
        for name, t in model[1].state_dict().items():
            if name != "num_batches_tracked":
                t.copy_(torch.rand_like(t) + 0.5)
    return model.train(training)


def results(model: nn.Module, x: Tensor, grad: bool) -> list[Any]:
    """y, every gradient and every buffer; or the type of the error."""
    model.zero_grad()
    x = x if x.requires_grad else x.detach()
    x.grad = None
    with torch.set_grad_enabled(grad):
        try:
            y = model(x)
            y = y + 0  # who reads it
            if grad and y.requires_grad:
                y.float().square().mean().backward()
        except (RuntimeError, TypeError, ValueError) as error:
            return [type(error)]
    grads = [None if t.grad is None else t.grad.clone() for t in (x, *model.parameters())]
    return [y.detach(), y.requires_grad, *grads, *(b.clone() for b in model.buffers())]


def setting(place: int, **values: Any) -> Change:
    """Attributes of a module have other values."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        before = {name: getattr(model[place], name) for name in values}
        for name, value in values.items():
            setattr(model[place], name, value)
        yield x
        for name, value in before.items():
            setattr(model[place], name, value)

    return change


def other(place: int, make: Callable[[], nn.Module]) -> Change:
    """Another module stands in a place of the model."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        torch.manual_seed(1)
        before, model[place] = model[place], make().train(model.training)
        yield x
        model[place] = before

    return change


def tensor(place: int, name: str, make: Callable[[Tensor], Any]) -> Change:
    """A module has another tensor."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        before = getattr(model[place], name)
        made = make(before.detach())
        if type(before) is nn.Parameter and isinstance(made, Tensor):
            made = nn.Parameter(made)
        setattr(model[place], name, made)
        yield x
        setattr(model[place], name, before)

    return change


def data(place: int, name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """A tensor has another memory, which no version counter tells of."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        t = getattr(model[place], name)
        before, t.data = t.data, make(t.data)
        yield x
        t.data = before

    return change


def frozen(place: int, name: str) -> Change:
    """A parameter needs no gradient."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        getattr(model[place], name).requires_grad_(False)
        yield x
        getattr(model[place], name).requires_grad_()

    return change


def hook(place: int, register: str) -> Change:
    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        handle = getattr(model[place], register)(HOOKS[register])
        yield x
        handle.remove()

    return change


HOOKS: dict[str, Callable[..., Any]] = {
    "register_forward_hook": lambda module, args, y: 2 * y,
    "register_forward_pre_hook": lambda module, args: (args[0] + 1,),
    "register_full_backward_hook": lambda module, into, out: (2 * into[0],),
}


def within(make: Callable[[], Any]) -> Change:
    """A mode is on."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        with make():
            yield x

    return change


def given(make: Callable[[Tensor], Tensor]) -> Change:
    """The input is another one."""
    return lambda model, x: contextlib.nullcontext(make(x))


def whole(change_: Callable[[Any], Any], back: Callable[[Any], Any]) -> Change:
    """Something becomes of the model."""

    @contextlib.contextmanager
    def change(model: Any, x: Tensor) -> Iterator[Tensor]:
        change_(model)
        yield x
        back(model)

    return change


@contextlib.contextmanager
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    yield
    torch.set_num_threads(before)


def offset(x: Tensor) -> Tensor:
    """At an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAST = torch.channels_last_3d
CHANGES: dict[str, Change] = {
    "first stride": setting(0, stride=(1, 2, 2)),
    "first padding": setting(0, padding=(0, 2, 0)),
    "first padding of floats": setting(0, padding=(0.0, 1.0, 1.0)),
    "first dilation": setting(0, dilation=(1, 2, 1)),
    "first groups": setting(0, groups=2),
    "first padding mode": other(
        0, lambda: nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate")
    ),
    "second stride": setting(3, stride=(2, 1, 1)),
    "second padding": setting(3, padding=(2, 0, 0)),
    "second padding of floats": setting(3, padding=(1.0, 0.0, 0.0)),
    "second padding in space": setting(3, padding=(1, 1, 0)),
    "second dilation": setting(3, dilation=(2, 1, 1)),
    "eps": setting(1, eps=0.5),
    "eps that is refused": setting(1, eps=-1.0),
    "momentum": setting(1, momentum=0.7),
    "cumulative momentum": setting(1, momentum=None),
    "training of the norm": whole(
        lambda m: m[1].train(not m[1].training), lambda m: m[1].train(not m[1].training)
    ),
    "training": whole(lambda m: m.train(not m.training), lambda m: m.train(not m.training)),
    "no statistics": setting(1, track_running_stats=False),
    "no statistics at all": setting(1, running_mean=None, running_var=None),
    "no affine": setting(1, weight=None, bias=None),
    "activation": other(2, nn.SiLU),
    "slope": other(2, lambda: nn.LeakyReLU(0.3)),
    "in place": setting(2, inplace=True),
    "no activation": other(2, nn.Identity),
    "first weight": tensor(0, "weight", lambda t: t + 1),
    "first weight's data": data(0, "weight", lambda t: t * 2),
    "first weight in channels-last": data(0, "weight", lambda t: t.to(memory_format=LAST)),
    "first weight of a kernel": tensor(0, "weight", lambda t: t[..., :1, :].contiguous()),
    "first weight in double": tensor(0, "weight", lambda t: t.double()),
    "first bias": tensor(0, "bias", lambda t: t + 1),
    "no first bias": setting(0, bias=None),
    "second weight": tensor(3, "weight", lambda t: t + 1),
    "second weight's data": data(3, "weight", lambda t: t * 2),
    "second weight of more channels": tensor(3, "weight", lambda t: torch.cat([t, t[:3]])),
    "no second bias": setting(3, bias=None),
    "gamma": tensor(1, "weight", lambda t: t * 2),
    "gamma's data": data(1, "weight", lambda t: t * 2),
    "gamma in double": tensor(1, "weight", lambda t: t.double()),
    "variance": tensor(1, "running_var", lambda t: t * 2),
    "variance's data": data(1, "running_var", lambda t: t * 2),
    "variance with strides": tensor(1, "running_var", lambda t: t.repeat_interleave(2)[::2]),
    "frozen first weight": frozen(0, "weight"),
    "frozen second weight": frozen(3, "weight"),
    "frozen gamma": frozen(1, "weight"),
    **{
        f"{register} of {place}": hook(place, register)
        for place in range(4) for register in HOOKS
    },
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "no gradients": within(torch.no_grad),
    "inference": within(torch.inference_mode),
    "threads": within(threads),
    "another backend": within(lambda: fastst.use_backend("aten")),
    "exact": within(fastst.exact),
    "recompute": within(lambda: mock.patch.dict("os.environ", FASTST_RECOMPUTE="1")),
    "x of another batch": given(lambda x: torch.cat([x, x])),
    "x of another size": given(lambda x: x[..., :5]),
    "x in channels-last": given(lambda x: x.contiguous(memory_format=LAST)),
    "x with strides": given(lambda x: x.repeat_interleave(2, 4)[..., ::2]),
    "x turned": given(lambda x: x.transpose(3, 4)),
    "x expanded": given(lambda x: x[:1].expand(2, -1, -1, -1, -1)),
    "x somewhere else": given(offset),
    "x of other channels": given(lambda x: x[:, :4]),
    "x without a batch": given(lambda x: x[0]),
    "x of bfloat16": given(lambda x: x.bfloat16()),
    "x that is no leaf": given(lambda x: x * 1),
    "x that needs a gradient": given(lambda x: x.detach().requires_grad_(not x.requires_grad)),
    "x to be negated": given(lambda x: torch.complex(x, x).conj().imag),
    "all of bfloat16": whole(lambda m: m.bfloat16(), lambda m: m.float()),
    "all in channels-last": whole(
        lambda m: m.to(memory_format=LAST), lambda m: m.to(memory_format=torch.contiguous_format)
    ),
}  # fmt: skip


def differences(name: str, training: bool, grad: bool) -> list[str]:
    """What is another with a change than it is without conversion."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 6, 6)
    plain = pair(training)
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    change, told = CHANGES[name], []
    for step in ("before", "changed", "again", "back"):
        found = []
        for model in (plain, converted):
            given = x.clone().requires_grad_(grad)
            if step in ("before", "back"):
                found.append([results(model, given, grad) for _ in range(4)][-1])
                continue
            with change(model, given) as other:
                if name == "all of bfloat16":
                    other = other.detach().bfloat16()
                found.append(results(model, other, grad))
        told += [f"{step}: {what}" for what in unlike("bfloat16" in name, *found)]
    return told


def unlike(coarse: bool, plain: list[Any], converted: list[Any]) -> list[str]:
    if len(plain) == 1 or len(converted) == 1:
        one, two = plain[0], converted[0]
        alike = isinstance(one, type) and isinstance(two, type) and issubclass(two, one)
        return [] if alike else [f"{one} and {two}"]
    tensors = [t for t in plain if isinstance(t, Tensor)]
    # That of a bias before a batch norm in training is 0 but for rounding.
    largest = max(float(t.abs().max()) for t in tensors[1:])
    coarse = coarse or any(t.dtype == torch.bfloat16 for t in tensors)
    told = []
    for i, (a, b) in enumerate(zip(plain, converted, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is not b:
                told.append(f"{i}: {a} and {b}")
        elif (a.dtype, a.shape, i or a.stride()) != (b.dtype, b.shape, i or b.stride()):
            told.append(f"{i}: {a.dtype} {a.shape} and {b.dtype} {b.shape}")
        else:
            of = float(a.abs().max()) if i == 0 else largest
            error = float((a.float() - b.float()).abs().max()) / (of or 1)
            if not error < (0.05 if coarse else 2e-5):
                told.append(f"{i}: {error}")
    return told


@pytest.mark.parametrize("grad", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_fact_changes(name: str, training: bool, grad: bool) -> None:
    assert differences(name, training, grad) == []


def forgetful(function: Any, left_out: set[int]) -> Callable[..., Any]:
    """A function that is remembered by all its arguments but some."""
    known: dict[Any, Any] = {}

    def remembered(*args: Any) -> Any:
        key = tuple(a for i, a in enumerate(args) if i not in left_out)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    remembered.__wrapped__ = function.__wrapped__  # type: ignore[attr-defined]
    return remembered


# What is remembered, which arguments are left out, and the changes by one of which that shows.
FORGOTTEN = {
    "first x": (rules, "_start", {0}, ["x of another size", "x of another batch"]),
    "first weight": (rules, "_start", {1}, ["first weight of a kernel", "first weight in double"]),
    "first settings": (rules, "_start", {3, 4}, ["first padding", "first stride"]),
    "first settings' types": (rules, "_start", {4}, ["first padding of floats"]),
    "autocast": (rules, "_start", {6}, ["autocast"]),
    "norm's training": (rules, "_cached_plan_with_norm", {6}, ["training of the norm"]),
    "norm's eps": (rules, "_cached_plan_with_norm", {7}, ["eps", "eps that is refused"]),
    "norm's weight": (rules, "_cached_plan_with_norm", {4}, ["no affine", "gamma in double"]),
    "second weight": (pairs, "_fit", {2}, ["second weight of more channels"]),
    "second settings' types": (pairs, "_fit", {5}, ["second padding of floats"]),
    "second settings": (pairs, "_fit", {4, 5}, ["second padding", "second stride"]),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_fact_that_is_left_out_is_seen(name: str) -> None:
    where, function, left_out, changes = FORGOTTEN[name]
    planted = forgetful(getattr(where, function), left_out)
    with mock.patch.object(where, function, planted):
        assert any(
            differences(change, training, grad)
            for change in changes for training in (False, True) for grad in (False, True)
        )  # fmt: skip
