"""The machine on kernels written by hand: what it computes, and what it says of wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator.ptx.machine import Error, Memory, Module

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(.param .u64 a, .param .u64 b, .param .u64 d, .param .u32 n)
{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<33>;
  .reg .b64 %rd<17>;
  ld.param.u64 %rd1, [a];
  ld.param.u64 %rd2, [b];
  ld.param.u64 %rd3, [d];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd4, %r1, 4;
  add.s64 %rd1, %rd1, %rd4;
  add.s64 %rd2, %rd2, %rd4;
  add.s64 %rd3, %rd3, %rd4;
"""
LOAD = "  ld.global.b32 %r2, [%rd1];\n  ld.global.b32 %r3, [%rd2];\n"
STORE = "  st.global.b32 [%rd3], %r4;\n"


def run(body: str, threads: int = 32, shared: int = 0, **how: object) -> np.ndarray:
    """``body`` on random words a (in %r2) and b (in %r3); what it stores at d."""
    a, b = words(threads, 1), words(threads, 2)
    d = np.zeros(threads, np.uint32)
    memory = [Memory(x.ctypes.data, x.nbytes) for x in (a, b, d)]
    Module(HEAD + body + "  ret;\n}\n").launch(
        "kernel", (1,), (threads,), [a.ctypes.data, b.ctypes.data, d.ctypes.data, threads], memory,
        shared=shared, **how,
    )  # fmt: skip
    return d


def words(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 2**32, count, dtype=np.uint32)
    found[:4] = 0, 1, 0xFFFFFFFF, 0x80000000
    return found


def signed(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32).astype(np.int64)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r4, %r2, %r3", lambda a, b: a + b),
        ("sub.s32 %r4, %r2, %r3", lambda a, b: a - b),
        ("mul.lo.s32 %r4, %r2, %r3", lambda a, b: a * b),
        ("mul.hi.u32 %r4, %r2, %r3", lambda a, b: a * b >> 32),
        ("mul.hi.s32 %r4, %r2, %r3", lambda a, b: signed(a) * signed(b) >> 32),
        ("min.s32 %r4, %r2, %r3", lambda a, b: np.minimum(signed(a), signed(b))),
        ("max.u32 %r4, %r2, %r3", lambda a, b: np.maximum(a, b)),
        ("shr.s32 %r4, %r2, 7", lambda a, b: signed(a) >> 7),
        ("shr.u32 %r4, %r2, 40", lambda a, b: a * 0),
        ("shl.b32 %r4, %r2, 9", lambda a, b: a << 9),
        ("prmt.b32 %r4, %r2, %r3, 0x5410", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16),
        ("prmt.b32 %r4, %r2, %r3, 30258", lambda a, b: a >> 16 | b >> 16 << 16),
        ("bfe.u32 %r4, %r2, 5, 9", lambda a, b: a >> 5 & 511),
        ("bfe.s32 %r4, %r2, 24, 8", lambda a, b: signed(a) >> 24),
        ("lop3.b32 %r4, %r2, %r3, 255, 0x96", lambda a, b: a ^ b ^ 255),
        ("shf.l.wrap.b32 %r4, %r2, %r3, 8", lambda a, b: (b << 8) | a >> 24),
        ("popc.b32 %r4, %r2", lambda a, b: np.array([bin(n).count("1") for n in a])),
        ("bfi.b32 %r4, %r2, %r3, 4, 8", lambda a, b: (b & 0xFFFFF00F) | (a & 255) << 4),
        ("cvt.s32.s8 %r4, %r2", lambda a, b: a.astype(np.int8).astype(np.int64)),
        ("abs.s32 %r4, %r2", lambda a, b: np.abs(signed(a))),
    ],
)
def test_integers(instruction: str, expected) -> None:
    a, b = words(32, 1).astype(np.uint64), words(32, 2).astype(np.uint64)
    np.testing.assert_array_equal(
        run(f"{LOAD}  {instruction};\n{STORE}"), expected(a, b).astype(np.uint64).astype(np.uint32)
    )


@pytest.mark.parametrize(
    ("instruction", "dtype", "expected"),
    [
        ("fma.rn.f32 %r4, %r2, %r3, 0f3F800000", "f32", lambda a, b: a * b + 1),
        ("div.full.f32 %r4, %r2, %r3", "f32", lambda a, b: a / b),
        ("max.NaN.f32 %r4, %r2, %r3", "f32", torch.maximum),
        ("cvt.rzi.f32.f32 %r4, %r2", "f32", lambda a, b: a.trunc()),
        ("cvt.rni.f32.f32 %r4, %r2", "f32", lambda a, b: a.round()),
        ("cvt.rn.bf16x2.f32 %r4, %r3, %r2", "pair", lambda a, b: torch.stack([a, b], 1).bfloat16()),
        ("cvt.rn.f16x2.f32 %r4, %r3, %r2", "pair", lambda a, b: torch.stack([a, b], 1).half()),
    ],
)
def test_floats(instruction: str, dtype: str, expected) -> None:
    torch.manual_seed(3)
    a, b = torch.randn(32), torch.randn(32)
    a[0] = torch.nan
    d = torch.zeros(32, dtype=torch.int32)
    memory = [Memory(x.data_ptr(), x.nbytes) for x in (a, b, d)]
    Module(f"{HEAD}{LOAD}  {instruction};\n{STORE}  ret;\n}}\n").launch(
        "kernel", (1,), (32,), [a.data_ptr(), b.data_ptr(), d.data_ptr(), 32], memory
    )
    wanted = expected(a.double(), b.double()) if dtype == "f32" else expected(a, b)
    wanted = wanted.float() if dtype == "f32" else wanted
    torch.testing.assert_close(
        d.view(wanted.dtype).reshape(wanted.shape), wanted, rtol=2e-7, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("mode", "wanted"), [("rn", 1.0), ("rz", 1.0), ("rm", 1.0), ("rp", 1.0 + 2**-23)]
)
def test_directed_rounding(mode: str, wanted: float) -> None:
    """1 + 2⁻²⁶ lies between two floats, far less than half of a unit from the lower."""
    found = run(f"  mov.b32 %r2, 0f3F800000;\n  fma.{mode}.f32 %r4, %r2, %r2, 0f32800000;\n{STORE}")
    assert found.view(np.float32)[0] == np.float32(wanted)


@pytest.mark.parametrize("type_", ["f16x2", "bf16x2", "f32"])
@pytest.mark.parametrize(("how", "unordered"), [("lt", False), ("ltu", True)])
def test_two_predicates(type_: str, how: str, unordered: bool) -> None:
    """Of two values in a register one each; of one value, what it is and what it is not."""
    body = f"  setp.{how}.{type_} %p1|%p2, %r2, %r3;\n  selp.b32 %r4, 1, 0, %p1;\n"
    body += "  selp.b32 %r5, 2, 0, %p2;\n  or.b32 %r4, %r4, %r5;\n"
    dtype = {"f16x2": torch.half, "bf16x2": torch.bfloat16, "f32": torch.float}[type_]
    a, b = (torch.from_numpy(words(256, n).view(np.int32)).view(dtype).float() for n in (1, 2))
    less = (a < b) | (unordered & (a.isnan() | b.isnan()))
    less = less.view(256, -1)
    wanted = less[:, 0] + 2 * (less[:, 1] if type_ != "f32" else ~less[:, 0])
    np.testing.assert_array_equal(run(LOAD + body + STORE, threads=256), wanted.numpy())


def test_lanes_part_and_meet_again() -> None:
    """Each lane counts to its own number; the shuffle behind the loop needs all of them."""
    found = run(
        """
  mov.u32 %r4, 0;
again:
  add.s32 %r4, %r4, 1;
  setp.le.u32 %p1, %r4, %r1;
  @%p1 bra again;
  shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1;
"""
        + STORE
    )
    np.testing.assert_array_equal(found, (np.arange(32) ^ 1) + 1)


def test_warps_meet_at_a_barrier() -> None:
    found = run(
        """
  mov.u32 %r5, dynamic;
  shl.b32 %r6, %r1, 2;
  add.s32 %r7, %r5, %r6;
  st.shared.b32 [%r7], %r1;
  bar.sync 0;
  sub.s32 %r8, 127, %r1;
  shl.b32 %r8, %r8, 2;
  add.s32 %r8, %r5, %r8;
  ld.shared.b32 %r4, [%r8];
"""
        + STORE,
        128,
        512,
    )
    np.testing.assert_array_equal(found, 127 - np.arange(128))


SHARED = "  mov.u32 %r5, dynamic;\n"
COPY = SHARED + "  shl.b32 %r6, %r1, 4;\n  add.s32 %r5, %r5, %r6;\n"
ASYNC = "  and.b64 %rd5, %rd1, -16;\n  cp.async.cg.shared.global [%r5], [%rd5], 16;\n"


@pytest.mark.parametrize(
    ("body", "telling"),
    [
        ("  ld.global.b32 %r4, [%rd1+4096];\n", "outside of every tensor"),
        ("  ld.global.b32 %r4, [%rd1+2];\n", "no multiple of them"),
        ("  st.shared.b32 [1024], %r1;\n", "outside of shared memory"),
        (SHARED + "  ld.shared.b32 %r4, [%r5];\n", "nothing has written"),
        (COPY + ASYNC + "  ld.shared.b32 %r4, [%r5];\n", "copy under way will write"),
        (COPY + ASYNC + "  st.shared.b32 [%r5], %r1;\n", "copy under way will write"),
        ("  bar.sync 1, 64;\n", "deadlock"),
        ("  mbarrier.try_wait.parity.shared.b64 %p1, [0], 0;\n", "no mbarrier"),
        (
            "  setp.lt.u32 %p1, %r1, 4;\n  @%p1 shfl.sync.idx.b32 %r4, %r1, 9, 31, 15;\n",
            "take part",
        ),
        ("  addd.s32 %r4, %r1, %r1;\n", "unknown instruction: addd.s32 %r4 %r1 %r1"),
        ("  add.sat.s32 %r4, %r1, %r1;\n", "unknown instruction: add.sat.s32"),
    ],
)
def test_errors_say_what_and_where(body: str, telling: str) -> None:
    with pytest.raises(Error, match=telling) as error:
        run(body, shared=512)
    assert "line" in str(error.value)


def test_a_deadlock_tells_who_waits_where() -> None:
    body = """
  mov.u32 %r5, dynamic;
  mbarrier.init.shared.b64 [%r5], 1;
again:
  mbarrier.try_wait.parity.shared.b64 %p1, [%r5], 0;
  @!%p1 bra again;
"""
    with pytest.raises(Error, match=r"deadlock(.|\n)*try_wait(.|\n)*lacks 1 arrivals and 0 bytes"):
        run(body, shared=64)


def test_a_copy_arrives_when_it_is_waited_for() -> None:
    body = COPY + ASYNC + "  cp.async.commit_group;\n  cp.async.wait_group 0;\n"
    found = run(body + "  ld.shared.b32 %r4, [%r5];\n" + STORE, shared=512)
    np.testing.assert_array_equal(found, words(32, 1)[np.arange(32) // 4 * 4])


@pytest.mark.parametrize(
    ("types", "dtype", "depth"),
    [("bf16.bf16", torch.bfloat16, 16), ("f16.f16", torch.half, 16), ("tf32.tf32", torch.float, 8)],
)
def test_products_of_a_warp(types: str, dtype: torch.dtype, depth: int) -> None:
    """Fragments as the tables of the PTX ISA have them, element by element."""
    torch.manual_seed(5)
    a = torch.randint(-8, 9, (16, depth)).to(dtype)
    b = torch.randint(-8, 9, (depth, 8)).to(dtype)
    per = 4 // dtype.itemsize
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    fragments = []
    for n in range(4):  # of A: rows g and g + 8, then the columns behind
        k = per * (t + 4 * (n // 2))
        fragments.append(torch.stack([a[g + 8 * (n % 2), k + i] for i in range(per)], 1))
    for n in range(2):
        k = per * (t + 4 * n)
        fragments.append(torch.stack([b[k + i, g] for i in range(per)], 1))
    given = torch.stack([f.contiguous().view(torch.int32).flatten() for f in fragments])
    d = torch.zeros(4, 32, dtype=torch.int32)
    loads = "".join(f"  ld.global.b32 %r{10 + n}, [%rd1+{128 * n}];\n" for n in range(6))
    stores = "".join(f"  st.global.b32 [%rd3+{128 * n}], %r{20 + n};\n" for n in range(4))
    Module(
        f"{HEAD}{loads}  mma.sync.aligned.m16n8k{depth}.row.col.f32.{types}.f32 "
        "{%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, "
        f"{{%r30, %r30, %r30, %r30}};\n{stores}  ret;\n}}\n"
    ).launch(
        "kernel", (1,), (32,), [given.data_ptr(), 0, d.data_ptr(), 0],
        [Memory(x.data_ptr(), x.nbytes) for x in (given, d)],
    )  # fmt: skip
    wanted = a.float() @ b.float()
    for n in range(4):
        torch.testing.assert_close(
            d[n].view(torch.float32), wanted[g + 8 * (n // 2), 2 * t + n % 2]
        )


def test_counters() -> None:
    """One sector per 32 bytes, and one pass over the banks per word that shares one."""
    module = Module(
        HEAD
        + LOAD
        + "  shl.b32 %r6, %r1, 7;\n  mov.u32 %r5, dynamic;\n  add.s32 %r6, %r5, %r6;\n"
        + "  st.shared.b32 [%r6], %r2;\n"
        + "  stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {%r2, %r2, %r3, %r3};\n  ret;\n}\n"
    )
    a = np.zeros(64, np.uint32)
    counted = module.launch(
        "kernel", (1,), (32,), [a.ctypes.data, a.ctypes.data, 0, 0],
        [Memory(a.ctypes.data, a.nbytes)], shared=4096, count=True,
    )  # fmt: skip
    assert counted["bytes_read"] == 256 and counted["bytes_written"] == 0
    assert counted["instructions"]["ld.global.b32"] == 2
    ((requests, sectors),) = counted["global"].values()
    assert requests == 2 and sectors in (8, 10)  # 10 where the array begins within a sector
    rows = "stmatrix.sync.aligned.m8n8.x4.shared.b16"  # 8 rows of 16 bytes, all in the same banks
    assert counted["shared"] == {"st.shared.b32": [1, 32], rows: [4, 32]}
    places = [*counted["global_sites"].items()]
    assert [place.split(" at line ")[0] for place, _ in places] == ["ld.global.b32"] * 2
    assert sum(requests for _, (requests, _) in places) == 2
