"""What a promise reads keeps its memory, of which others may have the address."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst.rewrite.convert import kept, rules

STATES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
EXPORTS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "array of a view": lambda x: x[1:].numpy(),
    "array of another": lambda x: x.detach().numpy(),
    "capsule": lambda x: x.__dlpack__(),
    "array by DLPack": np.from_dlpack,
}


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 6, (1, 3, 3), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0)),
    ).eval()


@pytest.fixture(params=["converted", "served"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "served":
        return fastst.optimize_for_inference(pair())
    converted = pair()
    fastst.convert(converted)
    return converted


@pytest.mark.parametrize("part", ["first", "whole"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("export", EXPORTS)
def test_memory_that_was_exported_stays(net: Any, export: str, state: Any, part: str) -> None:
    with state():
        for x in (torch.zeros(2, 3, 4, 9, 9), torch.zeros(2, 4, 3, 9, 9).transpose(1, 2)):
            exported, address = EXPORTS[export](x), x.data_ptr()
            y = net[0](x) if part == "first" else net(x)
            x.sum()
            assert x.data_ptr() == address
            wanted = pair()[0](x) if part == "first" else pair()(x)
            x.add_(1)
            assert x.data_ptr() == address
            torch.testing.assert_close(y + 0, wanted)
            del exported


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of memory whoever else holds it: x moves, and the array sees it no longer."""
    monkeypatch.setattr(kept, "_has_other_owners", lambda t: False)
    with pytest.raises(AssertionError):
        test_memory_that_was_exported_stays(
            fastst.optimize_for_inference(pair()), "array", torch.no_grad, "whole"
        )
    monkeypatch.undo()
    monkeypatch.setattr(kept, "_is_held_elsewhere", lambda t: False)
    with pytest.raises(AssertionError):
        test_memory_that_was_exported_stays(
            fastst.optimize_for_inference(pair()), "capsule", torch.no_grad, "whole"
        )


@pytest.mark.parametrize("state", STATES[:2])
def test_an_array_is_filled_between_calls(state: Any) -> None:
    """In a process of its own: where x has moved, the array is of memory that is freed."""
    script = f"""
import torch, fastst
from tests.rewrite.convert.test_memory import pair
plain, served = pair(), fastst.optimize_for_inference(pair())
with torch.{state.__name__}():
    for size in (9, 160):
        x = torch.zeros(1, 3, 4, size, size)
        a = x.numpy()
        unread = served(x)
        for i in range(3):
            a[:] = i
            y = served(x)
            a[:] = 7
            z = served(x)
            a[:] = i
            torch.testing.assert_close(y + 0, plain(x))
            unread = served(x)
            x.add_(1)
            del unread
            torch.randn_like(x)
            assert (a == i + 1).all() and a.ctypes.data == x.data_ptr()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_weights_that_were_exported_stay(net: Any) -> None:
    x, array = torch.randn(1, 3, 4, 9, 9), net[0].weight.detach().numpy()
    with torch.no_grad():
        unread = net(x)
        net(x).sum()
        assert np.shares_memory(array, net[0].weight.detach().numpy())
        del unread


@pytest.mark.parametrize("state", STATES)
def test_exported_while_a_promise_is_unread(net: Any, state: Any) -> None:
    """The array is of the memory that x has from then on."""
    with state():
        x = torch.zeros(1, 3, 4, 9, 9)
        u = net[0](x)
        array, wanted = x.numpy(), pair()[0](x)
        array[:] = 1
        v = net[0](x)
        array[:] = 2
        assert x.sum() == 2 * x.numel()
        torch.testing.assert_close(u + 0, wanted)
        array[:] = 1
        torch.testing.assert_close(v + 0, pair()[0](x))
        array[:] = 3
        assert x.sum() == 3 * x.numel()


def test_memory_of_an_activation_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor that of a permuted tensor: nobody else has its address."""
    net = pair()
    fastst.convert(net)
    copied: list[Tensor] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **kw: copied.append(t) or clone(t, **kw))
    a = torch.randn(1, 3, 4, 9, 9, requires_grad=True)
    b = torch.randn(1, 4, 3, 9, 9)
    net(F.relu(a)).sum().backward()
    net(F.relu(a * 2, inplace=True)).sum().backward()
    with torch.no_grad():
        net(b.transpose(1, 2)).sum(), net(F.relu(a)).sum()
    assert not copied
    array = b.numpy()
    net(b.transpose(1, 2)).sum()
    assert len(copied) == 1
    del array


def shorter(net: Any, x: Tensor) -> None:
    x.data = x.data[:1]


def turned(net: Any, x: Tensor) -> None:
    x.data = x.data.transpose(3, 4)


def spread(net: Any, x: Tensor) -> None:
    x.data = x.data.as_strided(x.shape, (0, *x.stride()[1:]))


def turned_weight(net: Any, x: Tensor) -> None:
    net[0].weight.data = net[0].weight.data.transpose(3, 4)


def spread_bias(net: Any, x: Tensor) -> None:
    net[0].bias.data = net[0].bias.data[:1].expand(6)


CHANGES = [shorter, turned, spread, turned_weight, spread_bias]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_laid_out_anew_in_the_same_memory(change: Any, grad: bool) -> None:
    """Neither version nor address change: computed as promised, or an error that says so."""
    outputs = []
    for convert in (False, True):
        net = pair()
        x = torch.arange(2.0 * 3 * 5 * 6 * 7).cos().view(2, 3, 5, 6, 7)
        if convert:
            fastst.convert(net)
        with torch.set_grad_enabled(grad):
            u = net[0](x)
            change(net, x)
            if convert and grad and change in (turned_weight, spread_bias):
                with pytest.raises(RuntimeError, match="of 0 changed after the call"):
                    net[2](F.relu(u))
                return
            outputs.append(net[2](F.relu(u)))
    torch.testing.assert_close(*outputs)


def test_a_planted_bug_in_layouts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and addresses alone."""
    monkeypatch.setattr(kept, "_layout", lambda t: mock.ANY)
    for change in CHANGES:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_laid_out_anew_in_the_same_memory(change, change in (turned_weight, spread_bias))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("holder", ["state_dict", "graph"])
def test_statistics_that_others_hold(holder: str, grad: bool) -> None:
    """PyTorch counts no version of them: they are copied."""
    outputs = []
    for convert in (False, True):
        net = pair().train()
        net.insert(1, nn.BatchNorm3d(6))
        if convert:
            fastst.convert(net)
        z = torch.arange(6.0 * 40).cos().view(1, 6, 2, 4, 5)
        held = net.state_dict() if holder == "state_dict" else net[1](z)
        with torch.set_grad_enabled(grad):
            net[1].eval()
            v = net[1](net[0](torch.ones(1, 3, 4, 6, 6)))
            net[1].train()(z * 9)
            outputs.append(net[3](F.relu(v)) + 0)
        del held
    torch.testing.assert_close(*outputs)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "counted": lambda t: t.mul_(2),
    "data": lambda t: t.data.mul_(2),
    "array": lambda t: np.multiply(t.detach().numpy(), 2, out=t.detach().numpy()),
}


def with_frozen_norm(convert: bool) -> tuple[nn.Sequential, nn.BatchNorm3d]:
    net, norm = pair(), nn.BatchNorm3d(6).eval()
    net.insert(1, norm)
    if convert:
        fastst.convert(net)
    return net, norm


def outputs_of_a_written_norm(write: str, name: str, read: bool) -> list[Tensor]:
    """Of a pair whose frozen norm is written to once it has been called; ``read``: v is read by
    itself, too."""
    outputs = []
    for convert in (False, True):
        net, norm = with_frozen_norm(convert)
        with torch.no_grad():
            v = norm(net[0](torch.ones(1, 3, 4, 6, 6)))
            WRITES[write](getattr(norm, name))
            outputs += [net[3](F.relu(v)) + 0, v + 0 if read else torch.zeros(1)]
    return outputs


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("write", WRITES)
def test_frozen_norms_are_as_they_were_when_they_were_called(
    write: str, name: str, read: bool
) -> None:
    plain, v, converted, own = outputs_of_a_written_norm(write, name, read)
    torch.testing.assert_close((converted, own), (plain, v))


def test_a_planted_alias_of_a_frozen_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rules,
        "copy_vectors",
        lambda given: tuple((name, kept.Copied((t.detach(),))) for name, t in given),
    )
    for write in WRITES:
        plain, _, converted, _ = outputs_of_a_written_norm(write, "running_var", False)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(converted, plain)


def shift(t: Tensor) -> None:
    """Other values of the same memory, in the same shape."""
    both = torch.cat([t.detach(), 2 * t.detach()])
    t.data = both[len(t) :] if t.storage_offset() == 0 else both[: len(t)]


def outputs_of_norms_written_between_calls(
    write: Callable[[Tensor], Any], held: str, name: str
) -> list[list[Tensor]]:
    """Of a converted pair and of a plain one, called before and after each of two writes to its
    frozen norm; ``held``: what else has its memory, from before the first call on."""
    outputs = []
    for convert in (False, True):
        net, norm = with_frozen_norm(convert)
        t = getattr(norm, name)
        other = {"nothing": None, "an alias": t.detach(), "an array": t.detach().numpy()}[held]
        made, x = [], torch.ones(1, 3, 4, 6, 6)
        with torch.no_grad():
            for _ in range(3):
                made += [net(x) + 0 for _ in range(3)]
                write(t)
                if held == "an array":
                    other *= 3  # type: ignore[operator]
                elif held == "an alias" and other is not None:
                    other.mul_(3)  # type: ignore[union-attr]
        outputs.append(made)
    return outputs


BETWEEN: dict[str, Callable[[Tensor], Any]] = {
    **WRITES, "nothing": lambda t: None, "shift": shift,
    "statistics": lambda t: F.batch_norm(
        torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0)), t, torch.ones(6),
        training=True, momentum=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("held", ["nothing", "an alias", "an array"])
@pytest.mark.parametrize("name", ["weight", "running_var"])
@pytest.mark.parametrize("write", BETWEEN)
def test_frozen_norms_that_are_written_between_calls(write: str, name: str, held: str) -> None:
    plain, converted = outputs_of_norms_written_between_calls(BETWEEN[write], held, name)
    torch.testing.assert_close(converted, plain)


def mapped(t: Tensor) -> Tensor:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 -- which lives on in the mapping
    return torch.from_file(file.name, True, t.numel(), dtype=t.dtype).view_as(t).copy_(t)


# Memory that PyTorch has not allocated, of which there are no copy-on-write clones.
FOREIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "shared": lambda t: t.share_memory_(), "mapped": mapped,
    "array": lambda t: torch.from_numpy(t.numpy().copy()),
    "buffer": lambda t: torch.frombuffer(bytearray(t.numpy().tobytes()), dtype=t.dtype).view_as(t),
    "capsule": lambda t: torch.from_dlpack(t.numpy().copy()),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_all_that_a_model_reads_in_memory_of_others(foreign: str, served: bool, state: Any) -> None:
    """Frozen norms' vectors too, read as they were at the call, whoever writes to them since."""
    outputs = []
    for convert in (False, True):
        net, _ = with_frozen_norm(convert and not served)
        if convert and served:
            net = fastst.optimize_for_inference(net)  # type: ignore[assignment]
        for p in net.parameters():
            p.data = FOREIGN[foreign](p.detach())
        norm: Any = net[1]
        for name in ("running_mean", "running_var"):
            setattr(norm, name, FOREIGN[foreign](getattr(norm, name)))
        with state():
            x, z = FOREIGN[foreign](torch.ones(1, 3, 4, 6, 6)), torch.ones(1, 6, 1, 1, 2).cumsum(4)
            y = net(x) + 0
            v = norm(net[0](x))
            norm.train()(z)
            outputs += [y, v + 0, net.eval()(x) + 0]
    torch.testing.assert_close(outputs[3:], outputs[:3])


@pytest.mark.parametrize("write", [*WRITES, "statistics"])
def test_a_planted_memory_of_frozen_norms_is_caught(
    write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "read_address", lambda t: 0)
    plain, converted = outputs_of_norms_written_between_calls(
        BETWEEN[write], "nothing", "running_var"
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(converted, plain)


@pytest.mark.parametrize("write", WRITES)
def test_an_output_that_is_read_again_is_what_it_was(write: str) -> None:
    """After the operation that took it in has run, and its weight was written to."""
    found = []
    for convert in (False, True):
        net = pair()
        if convert:
            fastst.convert(net)
        with torch.no_grad():
            u = net[0](torch.ones(1, 3, 4, 6, 6))
            y = net[2](F.relu(u)) + 0
            WRITES[write](net[0].weight)
            found.append((y, u + 0))
    torch.testing.assert_close(*found)


def test_threads_share_a_model() -> None:
    """Kernels of one thread read memory that another one has clones of, and lets go."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(16),
    ).eval()  # fmt: skip
    served = fastst.optimize_for_inference(model)
    x = torch.randn(2, 16, 4, 8, 8)
    wrong: list[object] = []

    def run(i: int) -> None:
        with torch.no_grad():
            truth = model(x + i)
            for _ in range(200):
                try:
                    torch.testing.assert_close(served(x + i), truth)
                except (AssertionError, RuntimeError) as error:
                    wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[0]


@pytest.mark.parametrize("padding", [(0, 0, 0), "valid", (2, 2, 2)])
def test_padding_written_where_modules_do_not_read_it(padding: object) -> None:
    """With another mode than zeros PyTorch pads by what ``padding`` was at construction."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1)),
        nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
        nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate"),
        nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"),
    ).eval()  # fmt: skip
    converted, served = copy.deepcopy(model), fastst.optimize_for_inference(model)
    fastst.convert(converted)
    x = torch.randn(1, 8, 4, 8, 8)
    for one in (model, converted, served):
        for i in (2, 5):
            one[i].padding = padding  # type: ignore[index, assignment]
    with torch.no_grad():
        for one in (converted, served):
            torch.testing.assert_close(one(x), model(x))


@pytest.mark.parametrize("fused", [False, True])
def test_addresses_of_what_hooks_save(fused: bool) -> None:
    """Who asks for them while autograd saves moves nothing, and counts no memory twice."""
    net = pair()
    fastst.convert(net)
    x = torch.randn(1, 3, 4, 6, 6, requires_grad=True)
    read = [x, *net.parameters()]
    before, found = [t.data_ptr() for t in read], set()

    def pack(t: Tensor) -> Tensor:
        found.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x) if fused else F.elu(net[0](x)).sum()
    assert [t.data_ptr() for t in read] == before
    assert {x.data_ptr(), net[0].weight.data_ptr()} <= found
    y.sum().backward()
