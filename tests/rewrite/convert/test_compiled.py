"""Converted models under PyTorch's compilers: pairs are one operation of the graph, and right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastst
from fastst.rewrite.convert import traced
from tests.rewrite.convert.test_forms import FORMS, Frames
from tests.support.blocks import Block, results

fuses = pytest.mark.skipif(not traced.LOWERS, reason="calls stay separate before PyTorch 2.13")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two(body: Callable[[Any, Tensor], Any], kind: type = Block) -> tuple[nn.Module, nn.Module]:
    """Plain and converted, in evaluation mode."""
    torch.manual_seed(0)
    plain = kind(body).eval()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    return plain, converted


def written_under_another_name(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    alias = u.transpose(3, 4)
    alias.mul_(2)
    return m.t(u)


BODIES: dict[str, tuple[Callable[[Any, Tensor], Any], int, type]] = {  # with how many pairs
    "in place": (lambda m, x: m.t(F.relu(m.n(m.s(x)), inplace=True)), 1, Block),
    "a first convolution is returned": (lambda m, x: F.relu(m.t(m.s(x)), inplace=True), 1, Block),
    "written": (written_under_another_name, 0, Block),
    "frames": (FORMS["movinet"][0], 1, Frames),
}


@fuses
@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_compiled(name: str) -> None:
    body, pairs, kind = BODIES[name]
    plain, converted = two(body, kind)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    found, wanted = results(compiled, x), results(plain, x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with fastst.dispatch.recording() as calls:
        compiled(x)
    assert sum(c.problem is not None for c in calls) == pairs


@fuses
@pytest.mark.slow
def test_sizes_that_vary_and_numbers_that_change() -> None:
    """The graph is guarded: by sizes where they are in it, by every number of a convolution."""
    plain, converted = two(lambda m, x: m.t(F.relu(m.n(m.s(x)))))
    compiled = torch.compile(converted, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), fastst.dispatch.recording() as calls:
        for size in (6, 8, 9):
            x = torch.randn(2, 4, 5, size, size + 1)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
        for m in (plain, converted):
            m.t.stride = (2, 1, 1)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert len([call for call in calls if call.problem is not None]) == 4


@pytest.mark.slow
def test_a_norm_in_training_is_counted_once() -> None:
    """In a graph it stands between the convolutions, which run as they are."""
    plain, converted = two(lambda m, x: m.t(F.relu(m.n(m.s(x)))))
    compiled = torch.compile(converted.train(), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 6, 6)
    torch.testing.assert_close(results(compiled, x), results(plain.train(), x))


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one() -> None:
    """Each meets the same code of another convolution, of which nothing may become a symbol."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block(lambda m, x: m.t(F.relu(m.n(m.s(x))))) for _ in range(3))).eval()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    for block in converted:
        block.compile(backend="eager")
    x = torch.randn(2, 4, 5, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_size_that_is_marked_as_dynamic_stays_a_symbol_in_training() -> None:
    plain, converted = two(lambda m, x: m.t(F.relu(m.n(m.s(x)))))
    plain.train(), converted.train()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        x = torch.randn(n, 4, 5, 6, 6)
        torch._dynamo.mark_dynamic(x, 0)  # which raises where the size becomes a constant
        torch.testing.assert_close(results(compiled, x), results(plain, x))


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_exported(grad: bool) -> None:
    """Without gradients pairs are one operation; with them PyTorch's operators, that have some."""
    plain, converted = two(lambda m, x: m.s(m.t(F.relu(m.n(m.s(x))))))
    x = torch.randn(2, 4, 5, 6, 6)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            converted, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=8)},)
        ).run_decompositions()
        x = torch.randn(3, 4, 5, 6, 6)
        found = program.module()(x)
        torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-5)
    assert ("fastst.conv2plus1d" in str(program.graph)) == (not grad)
    if grad:
        found.sum().backward()


def test_recorded_by_make_fx() -> None:
    """Outside of a compiler every operator is recorded as it stands."""
    plain, converted = two(lambda m, x: m.s(m.t(F.relu(m.n(m.s(x))))))
    x = torch.randn(2, 4, 5, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(make_fx(converted)(x)(x), plain(x))


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    """Which compiles by Inductor."""
    plain, converted = two(lambda m, x: m.t(F.relu(m.n(m.s(x)))))
    x = torch.randn(2, 4, 5, 6, 6)
    with torch.no_grad(), fastst.dispatch.recording() as calls:
        wanted = plain(x)
        program = torch.export.export(converted, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.precompile_headers": False},  # for one model: seconds
        )  # fmt: skip
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1


@fuses
@pytest.mark.slow
def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a graph that remember their chain whatever is written to them."""
    monkeypatch.setattr(fastst.rewrite.convert.chain, "is_unread", lambda p: True)
    with pytest.raises(AssertionError):
        test_compiled("written")


@pytest.mark.parametrize("grad", [False, True])
def test_a_part_that_is_compiled_reads_a_promise(grad: bool) -> None:
    """Dynamo traces what a promise does when it is read."""
    compiled = torch.compile(lambda v: v * torch.sigmoid(v) + 1, backend="eager")
    block = Block(lambda m, x: compiled(m.t(compiled(m.n(m.s(x)))))).eval()
    x, found = torch.randn(2, 4, 5, 6, 6), []
    for convert in (False, True):
        if convert:
            fastst.convert(block)
        block.zero_grad()
        with torch.set_grad_enabled(grad):
            y = block(x)
        if grad:
            y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in block.parameters() if grad)])  # type: ignore[union-attr]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
