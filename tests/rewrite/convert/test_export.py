"""Converted models under PyTorch's compilers, CUDA graphs, and ONNX."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastst
from tests.rewrite.convert.test_forms import FORMS
from tests.rewrite.convert.test_people import FlatBlock
from tests.rewrite.test_optimize import settle


def pair(form: str):
    torch.manual_seed(0)
    model = FORMS[form][0]().eval()
    original = copy.deepcopy(model)
    assert fastst.convert(model).replaced
    return model, original


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compile_fullgraph(form):
    if form == "untraceable":
        pytest.skip("branches on a size by itself")
    model, original = pair(form)
    model.train()
    original.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 8, 7)
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), model.parameters()),
                    torch.autograd.grad(original(x).square().sum(), original.parameters()),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for a, b in zip(model.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["flat", "factorized", "causal", "pseudo"])
def test_export(form, strict):
    model, original = pair(form)
    x = torch.randn(2, 4, 5, 8, 7)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_optimised_model(strict):
    """A residual block is one op, the shortcut and the last activation with it."""
    model = settle(nn.Sequential(FlatBlock()))
    x = torch.randn(2, 4, 5, 8, 7)
    program = torch.export.export(fastst.optimize_for_inference(model), (x,), strict=strict)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls == ["fastst.conv2plus1d.default"] * 2
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_export_with_a_dynamic_batch():
    model, original = pair("flat")
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"x": {0: batch}}
    program = torch.export.export(model, (torch.randn(2, 4, 5, 8, 7),), dynamic_shapes=shapes)
    x = torch.randn(3, 4, 5, 8, 7)
    torch.testing.assert_close(program.module()(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inductor_and_aot_inductor(tmp_path):
    model, original = pair("flat")
    x = torch.randn(2, 4, 5, 8, 7)
    with torch.no_grad():
        wanted = original(x)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_of_the_reverted_model(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, original = pair("factorized")
    x = torch.randn(1, 4, 5, 8, 8)
    wanted = model(x).detach()
    fastst.revert(model)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(original(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("optimised", [False, True])
def test_cuda_graph(optimised):
    model, original = pair("flat")
    if optimised:
        model = fastst.optimize_for_inference(original)
    model, original = model.cuda(), original.cuda()
    x = torch.randn(2, 4, 5, 8, 8, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, original(x), rtol=1e-3, atol=1e-3)
