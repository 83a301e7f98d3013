"""Operators as the compiler sees them: fakes, opcheck, torch.compile, export, AOTInductor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastst
from fastst import dispatch
from fastst.backends.cpu import library
from fastst.functional import conv2plus1d, parallel_conv2plus1d
from fastst.ops.schema import encode_spec, pair_arguments, parallel_arguments
from fastst.problem import checks
from fastst.problem.spec import PairTensors, ParallelTensors, Problem, in_execution_order
from tests.support import fuzz
from tests.support.fuzz import Config

OPS = torch.ops.fastst


def op_calls(config: Config) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator that a configuration may reach, with the arguments it gets."""
    t, dy = fuzz.make(config)
    k = config.kwargs()
    main = (t["x"], *(t.get(n) for n in fuzz.NAMES[1:5]))
    geometry = (k["stride"], k["padding"], k["dilation"], k["groups"], k["padding_mode"])
    if config.parallel:
        tensors = ParallelTensors(*main)
        spec = checks.parallel(
            tensors, None, None, *geometry, config.branch_activation, config.activation,
            config.slope, config.combine, config.causal,
        )  # fmt: skip
        args = (*tensors, *encode_spec(spec), "auto")
        needs = [t is not None for t in tensors]
        return [
            (OPS.parallel_conv2plus1d, args),
            (OPS.parallel_conv2plus1d_backward, (dy, *args, needs)),
        ]
    norm = None
    if config.norm != "none":
        norm = fastst.functional.BatchNorm(
            t["running_mean"], t["running_var"], t.get("norm_weight"), t.get("norm_bias"),
            config.norm == "batch", 0.1, config.eps,
        )  # fmt: skip
    _, ws, wt, bs, bt = main
    weights, biases = (in_execution_order(config.order, *both) for both in ((ws, wt), (bs, bt)))
    main = (t["x"], *weights, *biases)
    found, _ = checks.pair(
        PairTensors(*main), None, norm, *geometry, config.activation, config.slope, config.order,
        config.causal, config.recompute,
    )  # fmt: skip
    stats = (t["running_mean"], t["running_var"]) if config.norm == "frozen" else (None, None)
    tensors = PairTensors(*main, t.get("norm_weight"), t.get("norm_bias"), *stats)
    spec = found.spec
    args = (*tensors, *encode_spec(spec), "auto")
    kept = iter(OPS.conv2plus1d_train(*args)[1:])
    u = None if config.recompute else next(kept)
    mean, var = (next(kept), next(kept)) if config.norm == "batch" else (None, None)
    needs = [t is not None for t in tensors[:7]] + [False] * 4
    calls = [
        (OPS.conv2plus1d_train, args),
        (OPS.conv2plus1d_backward, (dy, u, mean, var, *args, needs)),
    ]
    asking = spec._replace(output_statistics=True)
    if dispatch.choose_with_statistics(
        Problem.of(tensors, spec), Problem.of(tensors, asking), "auto"
    ):
        calls.append((OPS.conv2plus1d_train, (*tensors, *encode_spec(asking), "auto")))
    if config.norm == "batch":
        return calls
    tensors = tensors._replace(residual=t.get("residual"))
    spec = spec._replace(outer_activation=config.outer_activation, outer_norm=config.outer_norm)
    if config.outer_norm:
        table = torch.rand(5, config.out, dtype=Problem.of(tensors, spec).accumulate_dtype)
        tensors = tensors._replace(outer_table=table)
    return [(OPS.conv2plus1d, (*tensors, *encode_spec(spec), "auto")), *calls]


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("chunk", range(4))
def test_fake_strides_are_real_strides(chunk: int) -> None:
    """Shape, strides and dtype of all outputs of all ops, for any layout of the inputs."""
    for seed in range(fuzz.SEED + 100 * chunk, fuzz.SEED + 100 * chunk + 40):
        config = fuzz.random_config(seed, fuzz.SMALL)
        for op, args in op_calls(config):
            real = flat(op(*args))
            with FakeTensorMode() as mode:
                faked = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = flat(op(*faked))
            for i, (f, r) in enumerate(zip(fake, real, strict=True)):
                told = (f"FASTST_SEED={seed}", op, i, config)
                assert (f.shape, f.dtype) == (r.shape, r.dtype), told
                assert f.stride() == r.stride(), told


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_results_are_new_tensors(backend: str) -> None:
    """No output shares memory with an input or another output: compilers rely on it."""
    if backend == "cpu" and isinstance(library.load(), str):
        pytest.skip("the native CPU kernels are not built")
    ran = 0
    for seed in range(fuzz.SEED, fuzz.SEED + 30):
        for op, args in op_calls(fuzz.random_config(seed, fuzz.SMALL)):
            try:
                results = flat(
                    op(*(backend if isinstance(a, str) and a == "auto" else a for a in args))
                )
            except fastst.BackendError:
                continue
            tensors = results + [a for a in args if isinstance(a, Tensor)]
            storages = [t.untyped_storage()._cdata for t in tensors]
            fresh = len(results) + len(set(storages[len(results) :]))
            assert len(set(storages)) == fresh, (f"FASTST_SEED={seed}", op)
            ran += op is not OPS.conv2plus1d
    assert ran > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        Config(dtype=torch.float32),
        Config(norm="batch", x_layout="channels_last"),
        Config(norm="frozen", order="temporal-first", x_layout="permuted", recompute=True),
        Config(op="parallel_conv2plus1d", mid=5, grad_layout="expanded"),
        Config(op="parallel_conv2plus1d", combine="cat", x_layout="sliced"),
    ],
    ids=["plain", "batch", "frozen", "add", "cat"],
)
def test_opcheck(config: Config) -> None:
    for op, args in op_calls(config):
        torch.library.opcheck(op.default, args)


def test_opcheck_covers_every_op() -> None:
    """An op that is added must come under these tests, or those of test_conv3d."""
    schemas = torch._C._jit_get_all_schemas()
    ops = {s.name for s in schemas if s.name.startswith("fastst::")}
    ops -= {"fastst::conv3d", "fastst::conv3d_train", "fastst::conv3d_backward"}
    assert ops == {
        "fastst::conv2plus1d", "fastst::conv2plus1d_train", "fastst::conv2plus1d_backward",
        "fastst::parallel_conv2plus1d", "fastst::parallel_conv2plus1d_backward",
    }  # fmt: skip


class Net(nn.Module):
    """Both layers, with everything that has state."""

    def __init__(self, norm: str | None = "batch") -> None:
        super().__init__()
        self.pair = fastst.Conv2Plus1d(3, 8, 3, padding=1, norm=norm)
        self.parallel = fastst.ParallelConv2Plus1d(8, 6, 3, padding=1, activation="silu")
        self.last = fastst.Conv2Plus1d(6, 4, 3, (2, 2, 2), 1, order="temporal-first")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.parallel(self.pair(x)))


def step(net: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = net(x)
    params = [p for p in net.parameters() if p.requires_grad]
    return y.detach(), list(torch.autograd.grad(y.square().mean(), [x, *params]))


@pytest.mark.parametrize(
    ("dynamic", "training", "channels_last"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
def test_compile_fullgraph(dynamic: bool, training: bool, channels_last: bool) -> None:
    torch._dynamo.reset()
    net = Net().train(training)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    sizes = [(2, 3, 5, 8, 11), (4, 3, 6, 10, 13), (5, 3, 4, 7, 9)] if dynamic else [(2, 3, 4, 8, 8)]
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for size in sizes:
            x = torch.randn(size)
            if channels_last:
                x = x.to(memory_format=torch.channels_last_3d)
            x.requires_grad_()
            before = {k: v.clone() for k, v in net.state_dict().items()}
            y, grads = step(net, x)
            after = {k: v.clone() for k, v in net.state_dict().items()}
            net.load_state_dict(before)
            got, got_grads = step(compiled, x)
            torch.testing.assert_close(got, y)
            assert got.stride() == y.stride()
            for a, b in zip(got_grads, grads, strict=True):
                torch.testing.assert_close(a, b)
            for name, value in net.state_dict().items():
                torch.testing.assert_close(value, after[name], msg=name)


@pytest.mark.slow
def test_compile_inductor() -> None:
    """The default compiler, forward and backward, on a dense permuted layout as well."""
    torch._dynamo.reset()
    net = Net()
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(4, 2, 3, 8, 8).permute(1, 2, 0, 3, 4).requires_grad_()
    y, grads = step(net, x)
    net.eval()
    net.train()
    got, got_grads = step(compiled, x)
    torch.testing.assert_close(got, y)
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_autocast_and_checkpoint() -> None:
    torch._dynamo.reset()
    net = fastst.Conv2Plus1d(4, 4, 3, padding=1)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

    x = torch.randn(1, 4, 4, 8, 8, requires_grad=True)
    y = run(x)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(got, y)
    (dx,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(strict: bool, dynamic: bool) -> None:
    net = Net().eval()
    x = torch.randn(5, 3, 6, 10, 12)
    dims = {0: "batch", 2: "time"} if dynamic else None
    shapes = None
    if dims:
        shapes = ({i: torch.export.Dim(n, min=4, max=64) for i, n in dims.items()},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=strict)
    module = program.module()
    torch.testing.assert_close(module(x), net(x))
    if dynamic:
        other = torch.randn(4, 3, 9, 10, 12)
        torch.testing.assert_close(module(other), net(other))
    graphs = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    names = {str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"}
    assert any(n.startswith("fastst.conv2plus1d") for n in names)
    assert not any("aten.conv" in n for n in names)


@pytest.mark.slow
def test_export_in_training_mode() -> None:
    """Running statistics are mutated buffers of the exported program."""
    net = Net()
    x = torch.randn(2, 3, 4, 8, 8)
    program = torch.export.export(net, (x,))
    expected = Net()
    expected.load_state_dict(net.state_dict())
    torch.testing.assert_close(program.module()(x), expected(x))


@pytest.mark.slow
def test_functions_compile_too() -> None:
    torch._dynamo.reset()
    ws, wt = torch.randn(4, 3, 1, 3, 3), torch.randn(4, 3, 3, 1, 1)
    x = torch.randn(1, 3, 4, 6, 6)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        a = conv2plus1d(x, ws, wt.new_ones(2, 4, 3, 1, 1), padding="same", activation="gelu")
        b = parallel_conv2plus1d(x, ws, wt, padding=1, combine="cat")
        return a, b

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, both(x), strict=True):
        torch.testing.assert_close(a, b)


def test_meta_device() -> None:
    net = Net().to("meta")
    y = net(torch.randn(2, 3, 4, 8, 8, device="meta"))
    assert y.shape == (2, 4, 2, 4, 4) and y.device.type == "meta"


def test_problem_is_the_config() -> None:
    """The description that backends see, against sizes worked out by hand in the fuzzer."""
    for seed in range(100):
        config = fuzz.random_config(seed)
        op, args = op_calls(replace(config, dtype=torch.float32))[0]
        arguments = parallel_arguments if config.parallel else pair_arguments
        _, spec, problem, backend = arguments(args)
        assert (backend, encode_spec(spec)) == ("auto", args[-1 - len(encode_spec(spec)) : -1])
        assert problem.out_size == config.sizes()[1], (op, config)
        assert problem.pass_sizes[0] == config.sizes()[0]
        dense = replace(config, groups=(1, 1))
        if config.groups == dense.groups and not config.parallel:
            assert problem.flops() == 2 * config.work()
