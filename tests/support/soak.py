r"""Random configurations in child processes under a checking allocator (guard.c).

PyTorch's convolutions may read or write outside their tensors. Every way in which fastst calls
them, forward and backward, is run here until it has been seen not to::

    python -m tests.support.soak --cases 3000
    python -m tests.support.soak --paths aten --dtypes bfloat16 --layouts contiguous --isas AVX2 \
        --first 812 --cases 1

A crash, a result that is no rounding of the right one and what twice did not end in time are
reported with their configuration and seed. Without arguments beside ``--cases`` all paths, dtypes,
layouts and instruction sets are run, each from ``--first`` on. What a time limit ends (SIGTERM) is
counted up to there.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastst
from fastst import functional
from fastst.backends import aten, conv_pass
from fastst.backends.aten import convolution, onednn
from fastst.problem.spec import Pass
from tests.support import fuzz
from tests.support.fuzz import Config

ROOT = Path(__file__).resolve().parents[2]
# "composed" is what double backward and functorch run, "passes" the single convolutions of aten and
# of what is composed, "conv3d" those of conv3d: a hundred times as many in the same time.
PATHS = ("passes", "conv3d", "aten", "composed", "reference", "auto")
SINGLE = ("passes", "conv3d")
DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("contiguous", "channels_last")  # of x and dy; those of weights are drawn
# "" is the best of the machine. oneDNN takes no more than what is named, if the machine has it.
ISAS = ("", "AVX512_CORE_BF16", "AVX512_CORE", "AVX2", "SSE41")
PLANTED = "planted"  # aten with a write of one element behind y
THREADS = 2  # oneDNN writes out of bounds with several threads that it does not with one
SECONDS = 120.0  # for one configuration, and again if it needed more: a machine may be busy
TROUBLE = ("wrong", "crash", "late")
Run = tuple[str, str, str]  # path, dtype and layout


@dataclass
class Outcome:
    """What one child process found."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)  # "right", "refused" and TROUBLE
    trouble: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """What the child says of one seed."""
        what = line.split()[0]
        self.counts[what] += 1
        if what in TROUBLE:
            self.trouble.append(f"{self.name}: {line.rstrip()}")


def build_guard(folder: Path) -> Path:
    """guard.c as a library to preload.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: there is no C compiler that can.
    """
    library = folder / "guard.so"
    source = ROOT / "tests" / "support" / "guard.c"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        command = ["cc", "-O2", "-shared", "-fPIC", str(source), "-o", f"{library}.{os.getpid()}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(f"{library}.{os.getpid()}", library)
    return library


def soak(
    runs: Sequence[Run],
    isa: str,
    first: int,
    cases: int,
    guard: Path,
    threads: int = THREADS,
    seconds: float = SECONDS,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run ``cases`` seeds of each in a child process that survives the crashes of configurations.

    Args:
        told: is given what was found of each, also of the one that this process ends in.
    """
    environment = os.environ | {
        "LD_PRELOAD": str(guard), "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0",
    }  # fmt: skip
    environment |= {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    child = ["--child", str(first), str(cases), str(seconds), *map(":".join, runs)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.soak", *child], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        found = []
        try:
            for run in runs:
                found.append(outcome := Outcome(f"{' '.join(run)} {isa or 'best'}"))
                try:
                    for line in itertools.islice(process.stdout, cases):
                        outcome.note(line)
                finally:
                    told(outcome)
        except BaseException:
            process.terminate()
            raise
        code = process.wait()
        errors.seek(0)
        if code or any(sum(o.counts.values()) != cases for o in found):
            said = errors.read()
            raise RuntimeError(f"the child of {runs} with {isa!r} ended with {code}: {said}")
    return found


# ---- in the child


def _child(first: int, cases: int, seconds: float, runs: Iterable[Run]) -> None:
    """Fork for the seeds, and again after each that ended the process; a line for each seed."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for run in runs:
        done, again = 0, False
        while done < cases:
            for line in _forked(run, first + done, first + cases, seconds):
                again = line.startswith("late") and not again
                if not again:
                    print(line, flush=True)
                    done += 1


def _prepare(path: str) -> str:
    """Have this process take a path; the one whose configurations it draws."""
    if path == "composed":
        functional._composes = lambda x: True
    if path == PLANTED:
        aten.leave = _write_behind
        return "aten"
    return path


def _write_behind(rows: Tensor, out: Tensor) -> Tensor:
    out.copy_(rows.permute(0, 4, 1, 2, 3))
    ctypes.memset(out.data_ptr() + out.numel() * out.element_size(), 0, out.element_size())
    return out


def _forked(run: Run, first: int, end: int, seconds: float) -> Iterator[str]:
    """A line for each seed up to the end or to the first that ends the process, inclusive."""
    reading, writing = os.pipe()
    process = os.fork()
    path, dtype, layout = run
    if process == 0:
        os.close(reading)
        path = _prepare(path)
        for seed in range(first, end):
            os.write(writing, (_run(path, dtype, layout, seed).replace("\n", " ") + "\n").encode())
        os._exit(0)
    os.close(writing)
    seed = first
    with os.fdopen(reading) as lines:
        while seed < end:
            if not select.select([lines], [], [], seconds)[0]:
                os.kill(process, signal.SIGALRM)
            line = lines.readline()
            if not line:
                break
            yield line.rstrip()
            seed += 1
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if seed < end:
        told, why = "crash", signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if code == -signal.SIGALRM:
            told, why = "late", f"did not end within {seconds:g} s"
        drawn = _draw_pass(path, seed) if path in SINGLE else _config(*run, seed)
        yield f"{told} seed {seed}: {why} in {drawn}"


def _config(path: str, dtype: str, layout: str, seed: int) -> Config:
    fixed: dict[str, Any] = dict(x_layout=layout, grad_layout=layout)
    if path == "composed":
        fixed |= dict(residual=False, outer_activation="none", outer_norm=False)
    limits = fuzz.Limits(
        batch=9, channels=48, frames=20, space=24, work=6_000_000,
        dtypes=(getattr(torch, dtype),), fixed=fixed,
    )  # fmt: skip
    return fuzz.random_config(seed, limits)


def _run(path: str, dtype: str, layout: str, seed: int) -> str:
    """One configuration, every result held to what cannot be rounding."""
    if path in SINGLE:
        return _run_pass(path, getattr(torch, dtype), layout, seed)
    config = _config(path, dtype, layout, seed)
    tensors, dy = fuzz.make(config)
    grad = dy if fuzz.clear_of_kinks(config, tensors) else None
    ways = random.Random(seed)
    onednn.rule = lambda problem: ways.choice(onednn.ways(problem))
    with fastst.use_backend("auto" if path in ("auto", "composed") else path), fuzz.poisoned():
        try:
            trained = fuzz.results(fuzz.call, config, tensors, grad)
            with torch.no_grad():
                inferred = fuzz.results(fuzz.call, config, tensors, None)
        except fastst.BackendError as refusal:
            return f"refused {refusal}"
        except Exception as error:
            return f"wrong seed {seed}: {type(error).__name__} {error} in {config}"
    if config.norm == "batch" and float(fuzz.first_pass(config, tensors)[2].min()) < 1e-3:
        return "right"  # over a constant: nothing but roundings, divided by sqrt(eps)
    truth = fuzz.results(lambda c, t: fuzz.compose(c, t)[0], config, tensors, grad, torch.float64)
    scale = fuzz.scales(config, tensors, grad, truth)
    found = fuzz.no_rounding(config, trained, truth, scale)
    known = {name: truth[name] for name in inferred}
    found += [f"at inference {what}" for what in fuzz.no_rounding(config, inferred, known, scale)]
    return f"wrong seed {seed}: {'; '.join(found)} in {config}" if found else "right"


def _draw_pass(path: str, seed: int) -> tuple[Pass, tuple[int, int, int, int]]:
    """One convolution, of a pair or of ``conv3d``, and N, T, H, W of its input."""
    rng = random.Random(seed)
    channels = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 31, 32, 33, 45, 48, 64)
    while True:
        c, k, g = rng.choice(channels), rng.choice(channels), 1
        if rng.random() < 0.25:
            k = g = c
        elif rng.random() < 0.25:
            g = rng.choice((2, 3, 4))
            c, k = (g * rng.choice((1, 2, 3, 5, 8, 16)) for _ in range(2))
        kind = "full" if path == "conv3d" else rng.choice(("spatial", "temporal"))
        axes = {"full": (0, 1, 2), "spatial": (1, 2), "temporal": (0,)}[kind]
        taps = (1, 1, 2, 3, 3, 4, 5, 7)
        kernel = tuple(rng.choice(taps) if i in axes else 1 for i in range(3))
        stride = tuple(rng.choice((1, 1, 2, 3)) for _ in range(3))
        dilation = tuple(rng.choice((1, 1, 1, 2, 3)) for _ in range(3))
        pads = [
            rng.choice((0, 0, d * (n - 1) // 2, rng.randrange(4))) if i in axes else 0
            for i, (d, n) in enumerate(zip(dilation, kernel, strict=True))
        ]
        padding = tuple(n for pad in pads for n in (pad, rng.choice((pad, pad, pad + 1))))
        padding = tuple(n if i // 2 in axes else 0 for i, n in enumerate(padding))
        batch, size = rng.choice((1, 2, 3, 5)), tuple(rng.randint(1, n) for n in (12, 20, 32))
        p = Pass(kind, c, k, kernel, stride, padding, dilation, g, "zeros")
        if min(p.out_size(size)) >= 1 and batch * math.prod(size) * c * k < 3e6 * g:
            return p, (batch, *size)


def _run_pass(path: str, dtype: torch.dtype, layout: str, seed: int) -> str:
    """The same of one convolution, by the calls of aten and by those of what is composed."""
    p, (n, t, h, w) = _draw_pass(path, seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = normal(n, t, h, w, p.in_channels)
    fan = p.in_channels // p.groups
    weight = normal(p.out_channels, fan, *p.kernel) / (fan * math.prod(p.kernel)) ** 0.5
    if seed % 2:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    bias = normal(p.out_channels)
    dy = normal(n, *p.out_size((t, h, w)), p.out_channels)
    given = (fuzz.lay_out(rows.permute(0, 4, 1, 2, 3), layout), weight, bias)
    dy5 = fuzz.lay_out(dy.permute(0, 4, 1, 2, 3), layout)

    def composed(*leaves: Tensor) -> list[Tensor]:
        x, *parameters = (leaf.detach().requires_grad_() for leaf in leaves)
        y = conv_pass.conv_pass(x, *parameters, p)
        return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy5.to(y.dtype))]

    truth = composed(*(leaf.double() for leaf in given))
    every = (True, True, True)
    if path == "conv3d":
        x = given[0]
        ours = [conv_pass.conv_pass(x, weight, bias, p)]
        ours += convolution.conv_gradients(dy5, x, weight, p, every)
    else:
        y = aten.conv(rows, weight, bias, p)
        dx, dw, db = aten.conv_backward(dy, rows, weight, p, every)
        ours = [y.permute(0, 4, 1, 2, 3), dx.permute(0, 4, 1, 2, 3), dw, db]
    bound = fuzz.VENDOR_BUG.get(dtype, 4096.0) * torch.finfo(dtype).eps
    found = []
    for how, results in (("aten", ours), ("composed", composed(*given))):
        for name, got, true in zip(("y", "dx", "dw", "db"), results, truth, strict=True):
            largest = float(true.abs().max())
            if name == "db":  # a sum that may cancel
                largest = max(largest, (dy.numel() / p.out_channels) ** 0.5)
            error = float((got.double() - true).abs().max()) / max(largest, 1e-30)
            if not error <= bound:
                found.append(f"{name} of {how}: {error:.3g} of the largest")
    return f"wrong seed {seed}: {'; '.join(found)} in {p}, {(n, t, h, w)}" if found else "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="for each path, dtype, layout, set")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--isas", nargs="+", default=ISAS, help="ONEDNN_MAX_CPU_ISA; '': best")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one configuration")
    options = parser.parse_args()
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    guard = build_guard(folder)
    total: Counter[str] = Counter()

    def tell(outcome: Outcome) -> None:
        total.update(outcome.counts)
        print(f"{outcome.name}, seeds from {options.first}: {dict(outcome.counts)}", flush=True)
        for line in outcome.trouble:
            print(f"  {line}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before all were run"))
    runs = [*itertools.product(options.paths, options.dtypes, options.layouts)]
    for isa in options.isas:
        soak(runs, isa, options.first, options.cases, guard, options.threads, options.seconds, tell)
    print(f"in all {dict(total)}")
    sys.exit(any(total[what] for what in TROUBLE))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        seeds, limit, of = sys.argv[2:4], sys.argv[4], sys.argv[5:]
        _child(*map(int, seeds), float(limit), [tuple(r.split(":")) for r in of])  # type: ignore[misc]
    else:
        main()
