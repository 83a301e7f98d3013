"""The native library without a GPU: that it builds and loads, and what is said where not."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastst
from fastst.backends import cuda
from fastst.backends.cuda import library
from fastst.functional import conv2plus1d
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import ROOT, hide_native_libraries

INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}")
BUILT = importlib.util.find_spec("fastst._C") is not None
needs_library = pytest.mark.skipif(not BUILT, reason="fastst._C is not built: no nvcc")


def problem(device: str = "cpu") -> Problem:
    shapes = ((1, 4, 3, 5, 5), (6, 4, 1, 3, 3), (5, 6, 3, 1, 1))
    tensors = PairTensors(*(torch.empty(s, device=device) for s in shapes))
    return Problem.of(tensors, PairSpec(padding=(1, 1, 1, 1, 1, 1)))


def on_gpu() -> Problem:
    """A problem of CUDA tensors, as far as dispatch looks at it."""
    found = problem("meta")
    object.__setattr__(found, "device", torch.device("cuda", 0))
    return found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_library_was_built_where_nvcc_is() -> None:
    if os.environ.get("FASTST_BUILD_CUDA") == "0":
        pytest.skip("FASTST_BUILD_CUDA=0")
    assert BUILT, "nvcc is on PATH, but fastst._C is missing: install fastst again"


@needs_library
def test_library_loads_without_a_gpu() -> None:
    from fastst import _C

    assert not _C.EMULATED
    assert _C.TOOLKIT >= 12050
    if not torch.cuda.is_available():
        assert _C.device_count() == 0
        assert _C.device_error()
        assert _C.driver_entry_point("cuTensorMapEncodeTiled", 12000) == 0


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_library_links_neither_driver_nor_runtime_nor_torch() -> None:
    from fastst import _C

    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True).stdout
    assert not any(name in needed for name in ("libcuda", "libcudart", "libtorch", "libc10"))


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_that_fails_says_which_kernel_and_shape() -> None:
    from fastst import _C

    x = torch.zeros(1, 2, 1, 4, 4)
    view = _C.View(x.data_ptr(), x.shape, x.stride())
    partials = _C.Array(x.data_ptr(), 6)
    with pytest.raises(RuntimeError, match=r"channel_statistics for \(1, 2, 1, 4, 4\).*driver"):
        _C.channel_statistics(_C.Dtype.f32, view, partials, 1, 1, 0)


def test_cpu_tensors_are_refused_by_name() -> None:
    x, ws, wt = torch.ones(1, 4, 3, 5, 5), torch.ones(6, 4, 1, 3, 3), torch.ones(5, 6, 3, 1, 1)
    if library.is_emulated():
        pytest.skip("FASTST_CUDA_EMULATE is set")
    with (
        fastst.use_backend("cuda"),
        pytest.raises(fastst.BackendError, match="needs an NVIDIA GPU, the tensors are on cpu"),
    ):
        conv2plus1d(x, ws, wt)


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTST_CUDA_EMULATE", raising=False)
    hide_native_libraries(monkeypatch)
    library.load.cache_clear()
    try:
        assert "FASTST_BUILD_CUDA=1" in str(cuda.BACKEND.why_not(on_gpu(), "forward"))
        with pytest.raises(ImportError, match="was not built"):
            library.library()
    finally:
        library.load.cache_clear()


@pytest.mark.slow
def test_corrupt_library_gives_one_clear_reason(tmp_path: Path) -> None:
    """A copy of the package whose library is no library still imports and computes."""
    shutil.copytree(
        ROOT / "fastst", tmp_path / "fastst", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / "fastst" / f"_C{suffix}").write_bytes(b"no library")
    code = (
        "import torch, fastst\n"
        "from fastst.backends.cuda import library as native\n"
        "from fastst.functional import conv2plus1d\n"
        "conv2plus1d(torch.ones(1,2,3,4,4), torch.ones(2,2,1,3,3), torch.ones(2,2,3,1,1))\n"
        "print(fastst.__file__); print(native.load())\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "FASTST_CUDA_EMULATE"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**env, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    where, *told = run.stdout.strip().splitlines()
    assert where.startswith(str(tmp_path))
    assert "cannot be loaded" in told[0]
    assert "install fastst again" in told[-1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_static_inspection_finds_a_spill(tmp_path: Path) -> None:
    """With 24 registers the reductions must spill, and that must be seen."""
    static = library.import_file("static_cuda", ROOT / "tests" / "static" / "cuda.py")
    cubin = tmp_path / "spilling.sm_90a.cubin"
    subprocess.run(
        [
            "nvcc", "-std=c++20", *INCLUDES, "-cubin", "-maxrregcount=24",
            "-gencode", "arch=compute_90a,code=sm_90a", "-o", str(cubin),
            str(ROOT / "csrc" / "cuda" / "reductions.cu"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    resources = [r for _, r in static.inspect(cubin)]
    assert resources
    assert any(r["STACK"] > 0 and r["local"] > 0 for r in resources)


SERIAL = r"""
#include <device/wgmma.cuh>
using namespace fastst;
template <class T, int N>
__global__ void __launch_bounds__(128) product(float* out) {
  float d[N / 2] = {};
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    wgmma<T, N>(d, descriptor(shared<T>(0)), descriptor(shared<T>(8192)), true);
    TOUCH
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(d);
  for (int i = 0; i < N / 2; ++i) out[threadIdx.x + 128 * i] = d[i];
}
template __global__ void product<__half, 24>(float*);
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("touch", ["", "d[k] += 1;"])
def test_static_inspection_finds_products_that_wait(touch: str, tmp_path: Path) -> None:
    static = library.import_file("static_cuda", ROOT / "tests" / "static" / "cuda.py")
    (tmp_path / "serial.cu").write_text(SERIAL.replace("TOUCH", touch))
    cubin = tmp_path / "serial.cubin"
    subprocess.run(
        [
            "nvcc", "-std=c++20", *INCLUDES, "-cubin", "-arch=sm_90a", "-o", str(cubin),
            str(tmp_path / "serial.cu"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    [(_, resources)] = static.inspect(cubin)
    faults = ["every product waits for the one before"] if touch else []
    assert static.product_faults("product<__half, 24>", resources) == faults
    assert static.product_faults("product<__half, 32>", resources) == ["products of [24] columns"]
    assert "no TMA loads" in static.hopper_faults("product<__half, 24>", resources)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"tma": 0}, "no TMA loads"),
        ({"multicast": 0}, "no TMA loads for several blocks"),
        ({"setmaxnreg": 0}, "setmaxnreg was ignored"),
        ({"columns 144": 0, "columns 128": 8}, "products of [128] columns"),
        ({"columns 16": 1}, "products of [16, 144] columns"),
        ({"columns 144": 0, "products": 0}, "products of no columns"),
        ({"waits": 10}, "every product waits for the one before"),
    ],
)
def test_static_inspection_finds_what_a_hopper_kernel_lacks(
    change: dict[str, int], fault: str | None
) -> None:
    static = library.import_file("static_cuda", ROOT / "tests" / "static" / "cuda.py")
    right = {
        "columns 144": 8, "products": 8, "waits": 2, "tma": 8, "multicast": 2, "setmaxnreg": 2,
    }  # fmt: skip
    resources = Counter({k: v for k, v in (right | change).items() if v})
    name = "hopper_spatial_kernel<__half, 144, 2, 2>"
    assert name in static.shipped()
    assert static.hopper_faults(name, resources) == ([] if fault is None else [fault])


# ---- setup.py


def script(
    monkeypatch: pytest.MonkeyPatch, nvcc: str | None, **environment: str
) -> dict[str, object]:
    """The names that setup.py defines, with setup() recorded instead of run."""
    import setuptools

    called: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: called.update(kwargs))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: nvcc)
    for name in ("FASTST_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTST_BUILD_CPU", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {**runpy.run_path(str(ROOT / "setup.py")), "called": called}


def test_without_nvcc_it_installs_and_keeps_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made = script(monkeypatch, None)
    assert made["called"]["ext_modules"] == []  # type: ignore[index]
    assert made["left_out"]["_C"] == "nvcc was not found"  # type: ignore[index]


def test_build_may_be_required_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="FASTST_BUILD_CUDA=1, but nvcc was not found"):
        script(monkeypatch, None, FASTST_BUILD_CUDA="1")
    with pytest.raises(SystemExit, match="auto, 0 or 1"):
        script(monkeypatch, None, FASTST_BUILD_CUDA="yes")
    off = script(monkeypatch, "/nvcc", FASTST_BUILD_CUDA="0")
    assert off["called"]["ext_modules"] == []  # type: ignore[index]
    on = script(monkeypatch, "/nvcc")
    assert len(on["called"]["ext_modules"]) == 1  # type: ignore[index]


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    made = script(monkeypatch, None)
    flags = made["architecture_flags"]
    assert flags("8.6") == ["-gencode", "arch=compute_86,code=sm_86"]  # type: ignore[operator]
    default = " ".join(flags(made["DEFAULT_ARCHITECTURES"]))  # type: ignore[operator]
    codes = ("code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
    assert all(code in default for code in codes)
    assert "code=sm_90 " not in default
    assert flags("Hopper") == flags("9.0+PTX")  # type: ignore[operator]
    assert flags("Ampere Ada") == flags("8.0;8.6+PTX;8.9+PTX")  # type: ignore[operator]
    with pytest.raises(made["BuildError"], match="'Grace' is neither"):  # type: ignore[call-overload]
        flags("Grace")  # type: ignore[operator]


def test_architectures_below_the_least_are_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = script(monkeypatch, None)
    flags = made["architecture_flags"]
    for _ in range(2):
        assert flags("6.1, 7.0+PTX, 7.5") == flags("7.5")  # type: ignore[operator]
    assert capsys.readouterr().err == (
        "fastst: TORCH_CUDA_ARCH_LIST: 6.1, 7.0+PTX is below 7.5, the least, and left out\n"
    )
    with pytest.raises(made["BuildError"], match=r"7\.0 is below 7\.5"):  # type: ignore[call-overload]
        flags("7.0")  # type: ignore[operator]
