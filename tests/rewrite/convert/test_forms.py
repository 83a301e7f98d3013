"""Pairs of frames and pixels, causal ones, padded ones: which fuse, and that all stay right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst.rewrite.convert import axes, forms

N, C, T, H, W = SHAPE = 2, 4, 5, 6, 7


class Frames(nn.Module):
    """Convolutions of frames, of pixels and of clips, called by a function of the test's."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.s2, self.t1 = nn.Conv2d(4, 6, 3, (1, 2), 1), nn.Conv1d(6, 4, 3, padding=1)
        self.t2 = nn.Conv2d(6, 4, (3, 1), (2, 1), (1, 0), bias=False)
        self.first1, self.last2 = nn.Conv1d(4, 6, 3, 2), nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.first2 = nn.Conv2d(4, 6, (3, 1), padding=(1, 0))
        self.s3 = nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))
        self.t3 = nn.Conv3d(6, 4, (3, 1, 1), (2, 1, 1))
        self.n2, self.n3 = nn.BatchNorm2d(6), nn.BatchNorm3d(6)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def frames(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def clips(x: Tensor, n: int = N) -> Tensor:
    return x.unflatten(0, (n, -1)).transpose(1, 2)


def pixels(x: Tensor) -> Tensor:
    return x.permute(0, 3, 4, 1, 2).reshape(-1, x.shape[1], x.shape[2])


def of_pixels(x: Tensor, h: int, w: int) -> Tensor:
    return x.view(-1, h, w, *x.shape[1:]).permute(0, 3, 4, 1, 2)


def causal(x: Tensor, count: int = 2) -> Tensor:
    return torch.cat([x[:, :, :1, ...].repeat(1, 1, count, 1, 1), x], dim=2)


def pseudo(m: Any, x: Tensor) -> Tensor:
    u = clips(m.s2(frames(x)))
    return of_pixels(m.t1(pixels(u)), *u.shape[3:])


def movinet(m: Any, x: Tensor, act: Any = F.hardswish) -> Tensor:
    u = clips(act(m.n2(m.s2(frames(x)))))
    return m.t2(u.flatten(3)).unflatten(3, u.shape[3:])


def norm_of_clips(m: Any, x: Tensor) -> Tensor:
    u = F.silu(m.n3(clips(m.s2(frames(x)))), inplace=True)
    return m.t3(u)


def frames_first(m: Any, x: Tensor) -> Tensor:
    """Batches of (T, N) frames."""
    u = m.s2(x.permute(2, 0, 1, 3, 4).reshape(-1, C, H, W))
    u = u.view(T, N, *u.shape[1:]).permute(1, 2, 0, 3, 4)
    return m.t3(F.relu(u))


def pixels_first(m: Any, x: Tensor) -> Tensor:
    u = of_pixels(F.relu(m.first1(pixels(x))), H, W)
    return clips(m.last2(frames(u)))


def pixels_first_2d(m: Any, x: Tensor) -> Tensor:
    u = m.first2(x.flatten(3)).view(N, 6, T, H, W)
    return clips(m.last2(u.movedim(2, 1).reshape(-1, 6, H, W)))


def rows_as_frames(m: Any, x: Tensor) -> Tensor:
    """A pair as well, along other axes than their names say."""
    u = m.s2(x.permute(0, 3, 1, 2, 4).reshape(-1, C, T, W)).unflatten(0, (N, H))
    return m.t3(u.movedim(2, 1))


def padded_form(m: Any, x: Tensor) -> Tensor:
    u = F.pad(clips(m.s2(frames(x))), (0, 0, 0, 0, 2, 0))
    return m.t2(u.flatten(3))


def causal_form(m: Any, x: Tensor) -> Tensor:
    u = causal(clips(m.s2(frames(x))))
    return m.t3(F.pad(u, (0, 0)))


def expanded(m: Any, x: Tensor) -> Tensor:
    u = m.n3(m.s3(x))
    return m.t3(torch.cat((u.narrow(2, 0, 1).expand(-1, -1, 3, -1, -1), u), 2))


def one_by_one(m: Any, x: Tensor) -> Tensor:
    u = m.s3(x)
    return m.t3(torch.cat([u[:, :, :1], u[:, :, 0:1], u], 2))


def there_and_back(m: Any, x: Tensor) -> Tensor:
    u = m.s3(x).contiguous()
    u = u.permute(0, 2, 1, 3, 4).unsqueeze(0).squeeze(0).permute(0, 2, 1, 3, 4)
    return m.t3(F.relu(u.view(u.shape)))


# Left: the mechanism follows them no further, or they are no pairs.


def last_frame(m: Any, x: Tensor) -> Tensor:
    u = m.s3(x)
    return m.t3(torch.cat([u[:, :, -1:], u], 2))


def first_frame_of_another(m: Any, x: Tensor) -> Tensor:
    return m.t3(torch.cat([m.s3(2 * x)[:, :, :1], m.s3(x)], 2))


def first_row(m: Any, x: Tensor) -> Tensor:
    u = m.s3(x)
    return m.t3(torch.cat([u[:, :, :, :1], u], 3))


def mixed(m: Any, x: Tensor) -> Tensor:
    """(N, T) frames read as (T, N)."""
    u = m.s2(frames(x))
    return m.t3(u.reshape(T, N, *u.shape[1:]).permute(1, 2, 0, 3, 4).flip(2))


def channels_as_frames(m: Any, x: Tensor) -> Tensor:
    return m.t3(m.s2(frames(x)).reshape(N, 6, T, H, -1))


def part_of_time(m: Any, x: Tensor) -> Tensor:
    """Two halves of each clip as two clips, with a row of each between: a copy would be needed."""
    u = m.s2(x.permute(0, 2, 3, 1, 4).reshape(-1, C, 1, W)[:, :, [0, 0, 0]])
    return m.t3(u.unflatten(0, (N, T, H)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1))


def written(m: Any, x: Tensor) -> Tensor:
    """A view is written to, and its base read."""
    u = m.s2(frames(x))
    v = u.view(N, T, *u.shape[1:]).transpose(1, 2)
    w = F.relu(v)
    F.relu_(v)
    return m.t3(v) + u.mean() + m.t3(w)


def base_written(m: Any, x: Tensor) -> Tensor:
    u = m.s3(x)
    v, copied = u.transpose(3, 4), u.transpose(3, 4).reshape(N, 6, T, -1)
    first = u[:, :, :1]
    u.mul_(2)
    return m.t3(u) + m.t3(v.transpose(3, 4)) + copied.mean() + first.mean()


def refused(m: Any, x: Tensor) -> Tensor:
    u = m.s3(x)
    try:
        u = u.transpose(1, 2).view(N * T, 6, H, W)
    except RuntimeError:
        u = u.transpose(1, 2).reshape(N * T, 6, H, W) * 2
    return m.t3(clips(u))


FORMS: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {  # with how many pairs
    f.__name__: (f, pairs)
    for pairs, functions in {
        1: (
            pseudo, movinet, norm_of_clips, frames_first, pixels_first, pixels_first_2d,
            rows_as_frames, padded_form, causal_form, expanded, one_by_one, there_and_back,
            written,
        ),
        0: (
            last_frame, first_frame_of_another, first_row, mixed, channels_as_frames, part_of_time,
            base_written, refused,
        ),
    }.items()
    for f in functions
}  # fmt: skip
# Whose second convolution is nn.Conv3d: in float64 that leaves channels_last_3d to nobody.
OF_CLIPS = ("norm_of_clips", "frames_first", "rows_as_frames", "causal_form", "expanded",
            "one_by_one", "there_and_back")  # fmt: skip


def pair(body: Callable[[Any, Tensor], Any]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Frames(body).double()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    return plain, converted


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, layout: torch.memory_format) -> None:
    body, pairs = FORMS[name]
    plain, converted = pair(body)
    x = torch.randn(SHAPE, dtype=torch.float64).contiguous(memory_format=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastst.FallbackWarning)  # float64 has no kernels here
        for training in (False, True):
            results = []
            for m in (plain, converted):
                m.zero_grad()
                with fastst.dispatch.recording() as calls:
                    results.append(steps(m, x, training))
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
            assert sum(c.phase == "forward" and c.problem is not None for c in calls) == pairs, (
                training
            )
    with torch.no_grad():
        a, b = plain(x), converted(x)
        if layout == torch.contiguous_format or name not in OF_CLIPS:
            assert a.stride() == b.stride()


def steps(m: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    m.train(training)
    x = x.detach().clone().requires_grad_()
    y = m(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    grads = [p.grad.clone() for p in m.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in m.buffers())]  # type: ignore[list-item]


def test_other_numbers_of_clips_and_images() -> None:
    """Only shapes say how many clips there are."""

    def body(m: Any, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return m.s2(x)
        return m.t2(clips(m.n2(m.s2(frames(x))), x.shape[0]).flatten(3))

    plain, converted = pair(body)
    for shape in (SHAPE, (1, C, T, H, W), (2, C, 1, H, W), (3, C, H, W), (1, C, 1, 3, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            for training in (True, False):
                a, b = (m.train(training)(x) for m in (plain, converted))
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plain.state_dict(), converted.state_dict())


def test_reshaping_is_followed_exactly() -> None:
    """Random permutes and reshapes: what the axes say, the recipe makes."""
    generator = torch.Generator().manual_seed(0)
    followed = 0
    for _ in range(300):
        x = torch.arange(2 * 3 * 4 * 6).view(6, 2, 12)
        dims: Any = axes.whole_dims("abc", x.shape)
        y = x
        for _ in range(4):
            order = torch.randperm(y.dim(), generator=generator).tolist()
            y, dims = y.permute(order), tuple(dims[i] for i in order)
            sizes, left = [], y.numel()
            while left > 1:
                options = [n for n in (2, 3, 4, 6, 12) if left % n == 0]
                sizes.append(options[int(torch.randint(len(options), (1,), generator=generator))])
                left //= sizes[-1]
            found = axes.reshape_dims(dims, sizes)
            if found is None:
                continue
            y, dims = y.reshape(sizes), found
        how = axes.recipe(axes.whole_dims("abc", x.shape), dims)
        assert how is not None
        assert torch.equal(forms.arrange(x, how), y)
        followed += y.dim() != x.dim()
    assert followed > 100


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimensions in the right sizes and the wrong order."""
    monkeypatch.setattr(forms, "arrange", lambda x, how: x.reshape(how.sizes))
    with pytest.raises(AssertionError):
        test_form("movinet", torch.contiguous_format)
