"""Runs a program converted and plain, and says where they differ."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastst
from fastst import dispatch

from .source import Program

CONVERT = fastst.convert


class Run:
    """Everything that somebody could see of a run, by name."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.fused = 0

    def largest(self, call: str) -> float:
        """The largest entry of the gradients of a call."""
        grads = [t for n, t in self.seen.items() if n.endswith(f".grad {call}") and t is not None]
        finite = [t[torch.isfinite(t)].abs().max().item() for t in grads if t.isfinite().any()]
        return max(finite, default=0.0)


def judge(
    program: Program, plant: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
) -> str | None:
    """Where the converted module differs from the plain one, or None. ``plant`` makes a fault."""
    plain = run(program, converted=False)
    with plant() if plant is not None else contextlib.nullcontext():
        ours = run(program, converted=True)
    errors = plain.error, ours.error
    if refused(ours.error) or any("modified by an inplace" in str(e) for e in errors):
        return None  # one keeps more than the other, or a copy of what was written to
    why = _errors(plain.error, ours.error)
    if why is not None:
        return why
    for name in sorted(plain.seen.keys() | ours.seen.keys()):
        if _recomputes(program) and name.split(".")[-1] in _SIDE_EFFECTS:
            continue
        if name != "output 0" and _recomputes_something_else(program):
            continue
        if name not in plain.seen or name not in ours.seen:
            return f"{name} is there once only"
        least = 1e-2
        if ".grad " in name:  # of a bias before a norm, say, only rounding is left
            least = max(least, 1e-4 * plain.largest(name.split(".grad ")[1]))
        why = _differ(plain.seen[name], ours.seen[name], tolerance(program), least)
        if why is not None:
            return f"{name}: {why}"
    return None


_SIDE_EFFECTS = (
    "log", "kept", "caches", "count", "last", "running_mean", "running_var", "num_batches_tracked",
)  # fmt: skip


def _recomputes(program: Program) -> bool:
    """Whether side effects may happen again in backward, which they need not."""
    return "use_reentrant=False" in program.source()


def _recomputes_something_else(program: Program) -> bool:
    """Whether backward may compute with something else than the forward had: the gradients are then
    not those of what it computed, in PyTorch's own modules either.

    It computes again what the forward itself has written; or hooks have copied the noise of RReLU,
    which PyTorch saves before it is drawn.
    """
    text = program.source()
    if "RReLU" in text and "saved_tensors_hooks(torch.clone" in text:
        return True
    return _recomputes(program) and ("running_var.mul_" in text or "self.caches" in text)


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 400) -> Program:
    """A smaller program that fails as well."""
    again = True
    while again and tries > 0:
        again = False
        for candidate in program.smaller():
            tries -= 1
            if tries < 0:
                break
            if fails(candidate):
                program, again = candidate, True
                break
    return program


def tolerance(program: Program) -> float:
    """Relative to the largest value: float64 computes what a program does not round itself."""
    text = str(program)
    if any(word in text for word in ("bfloat16", "half()", "autocast")):
        return 0.1
    return 1e-3 if "float()" in text or "after='float'" in text else 1e-8


def run(program: Program, *, converted: bool) -> Run:
    """Build, call and differentiate the module of a program."""
    done, how = Run(), program.how
    # Those over space and time, too: on PyTorch's operators, as nothing else computes in float64.
    alone = mock.patch.object(dispatch, "has_kernels", lambda problem: True)
    torch.manual_seed(program.seed)
    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings(), alone:
        warnings.simplefilter("ignore")
        module = program.build()().double().train(how["training"])
        x = _input(how)
        try:
            module = _prepared(module, how["after"], x, converted)
            _steps(module, x, how, done)
        except Exception as error:
            done.error = error
        try:
            _look(module, x, done)
        except Exception as error:
            done.error = error if refused(error) else done.error or error
    return done


def _input(how: dict[str, Any]) -> Tensor:
    n, sizes = how["batch"], (4, 4, 5, 5)
    x = torch.randn(n, *sizes, dtype=torch.float64)
    if how["inputs"] == "nan" and n:
        x[0, 0, 0, 0, 0] = float("nan")
    if how["inputs"] == "large":
        x = 20 * x
    if how["inputs"] == "small":
        x = 1e-3 * x[..., :4]
    match how["layout"]:
        case "sliced":
            x = torch.cat([x, x], -1)[..., : x.shape[-1]]
        case "offset":
            x = torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape)
        case "channels-last":
            x = x.contiguous(memory_format=torch.channels_last_3d)
    return x


def _prepared(module: Any, after: str, x: Tensor, converted: bool) -> Any:
    """The module as its user has it after conversion."""
    state = torch.get_rng_state()
    if converted:
        if after == "sample":  # whose report may fail as the forward does
            with contextlib.suppress(Exception):
                CONVERT(module, x.clone())
        CONVERT(module)
        if after == "twice":
            CONVERT(module)
        torch.set_rng_state(state)
    module.records.clear()
    match after:
        case "deepcopy":
            module = copy.deepcopy(module)
        case "load":
            module.load_state_dict({n: 0.9 * t for n, t in module.state_dict().items()})
        case "channels-last":
            module = module.to(memory_format=torch.channels_last_3d)
        case "float":
            module = module.float().double()
        case "freeze":
            for m in module.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval().requires_grad_(False)
    return module


def _steps(module: Any, x: Tensor, how: dict[str, Any], done: Run) -> None:
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for call in range(how["calls"]):
        given = x.clone().requires_grad_(how["x_needs_grad"])
        # Not the leaf itself, so that a forward may write to it.
        with _mode(how["mode"]), contextlib.ExitStack():
            y = module(given * 1.0)
        done.seen[f"output {call}"] = _told(y)
        _differentiate(y, given, module, how["backward"], done, call)
        done.seen[f"x.grad {call}"] = given.grad
        for name, p in module.named_parameters():
            done.seen[f"{name}.grad {call}"] = None if p.grad is None else p.grad.clone()
        if how["step"]:
            optimizer.step()
            optimizer.zero_grad()


def _mode(name: str) -> Any:
    match name:
        case "no_grad":
            return torch.no_grad()
        case "inference":
            return torch.inference_mode()
        case "autocast":
            return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def _differentiate(y: Any, x: Tensor, module: Any, how: str, done: Run, call: int) -> None:
    y = y[0] if isinstance(y, (list, tuple)) and y else y
    done.seen[f"differentiable {call}"] = y.requires_grad
    if how == "none" or not y.requires_grad:
        return
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    if how == "mutated":
        with torch.no_grad():
            for p in module.parameters():
                if p.dim() < 5 and p.untyped_storage().size():
                    p.mul_(1.01)
    loss = (y * weight).sum() if how != "square" else (y * y * weight).mean()
    if how == "second" and x.requires_grad:
        (g,) = torch.autograd.grad(loss, x, create_graph=True, allow_unused=True)
        if g is None or not g.requires_grad:
            return
        loss = g.square().sum() + loss
    loss.backward(retain_graph=how == "twice")
    if how == "twice":
        loss.backward()


def _told(y: Any) -> Any:
    """A value, and what a tensor says of itself."""
    if isinstance(y, Tensor):
        kind = (tuple(y.shape), y.stride(), str(y.dtype), y.requires_grad, y.is_inference())
        return [y.detach().clone(), kind]
    return [_told(t) for t in y] if isinstance(y, (list, tuple)) else y


def _look(module: Any, x: Tensor, done: Run) -> None:
    for name, buffer in module.named_buffers():
        done.seen[name] = buffer.detach().clone()
    for name, p in module.named_parameters():
        if p.untyped_storage().size():
            done.seen[name] = p.detach().clone()
        done.seen[f"{name} needs a gradient"] = p.requires_grad
    done.seen["modes"] = [m.training for m in module.modules()]
    done.seen["x"] = x
    done.seen["log"] = [_told(list(values)) for values in module.records]
    done.seen["kept"], done.seen["last"] = _told(module.kept), _told(module.last)
    done.seen["count"], done.seen["caches"] = module.count, _told(module.caches)
    done.seen["retained"] = [t.grad for t in module.retained]
    done.seen["random state"] = torch.get_rng_state()
    done.seen["grad mode"] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    done.seen["types"] = [type(m).__qualname__ for m in module.modules()]


def refused(error: BaseException | None) -> bool:
    """Whether a promise could not be kept, and says so: something that it reads was written to."""
    return isinstance(error, RuntimeError) and str(error).startswith("fastst: ")


def _errors(plain: BaseException | None, ours: BaseException | None) -> str | None:
    if plain is None and ours is None:
        return None
    if plain is None:
        return f"the converted module raises {type(ours).__name__}: {ours}"
    if ours is None:
        return f"the converted module does not raise {type(plain).__name__}: {plain}"
    if isinstance(ours, type(plain)):
        return None
    return f"{type(plain).__name__}: {plain} became {type(ours).__name__}: {ours}"


def _differ(a: Any, b: Any, tolerance: float, least: float = 1e-2) -> str | None:
    """How two values differ, or None; ``least``: what a value is compared with at least."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{tuple(a.shape)} {a.dtype} became {tuple(b.shape)} {b.dtype}"
        if not a.is_floating_point():
            same = torch.equal(a, b) or tolerance > 1e-6
            return None if same else f"{a.flatten()[:4]} became {b.flatten()[:4]}"
        finite = a[torch.isfinite(a)]
        scale = max(least, finite.abs().max().item()) if finite.numel() else 1.0
        if torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return None
        return f"off by {(a - b).abs().max():.3g} of {scale:.3g}"
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{len(a)} entries became {len(b)}"
        found = (_differ(p, q, tolerance) for p, q in zip(a, b, strict=True))
        return next((why for why in found if why is not None), None)
    if isinstance(a, float) and isinstance(b, float):
        return _differ(torch.tensor(a), torch.tensor(b), max(tolerance, 1e-6))
    same = a == b or (tolerance > 1e-6 and isinstance(a, (bool, int)) and isinstance(b, int))
    return None if type(a) is type(b) and same else f"{a!r} became {b!r}"
