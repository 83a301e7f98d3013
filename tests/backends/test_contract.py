"""What a backend must offer, and what it may leave out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import fastst
from fastst import dispatch
from fastst.backends import aten
from fastst.backends.contract import Backend, no_reason
from fastst.problem.spec import PairSpec, ParallelSpec

LEAST: dict[str, Any] = dict(
    name="least", pair_fields=frozenset(PairSpec._fields), why_not=no_reason,
    conv2plus1d=aten.conv2plus1d, conv2plus1d_backward=aten.conv2plus1d_backward,
)  # fmt: skip


def test_a_missing_function_is_an_error() -> None:
    assert Backend(**LEAST).why_unhonoured(PairSpec()) is None
    for name in LEAST:
        with pytest.raises(TypeError, match=name):
            Backend(**{n: v for n, v in LEAST.items() if n != name})


def test_a_misspelt_function_is_an_error() -> None:
    with pytest.raises(TypeError, match="norm_backwards"):
        Backend(**LEAST, norm_backwards=no_reason)


def test_a_misspelt_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="honours activatoin, which are no fields of PairSpec"):
        Backend(**LEAST | {"pair_fields": frozenset({"activatoin"})})


@pytest.mark.parametrize("field", PairSpec._fields)
def test_a_setting_that_is_not_honoured_is_refused(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each field in turn, as if it had been added and a backend did not know it yet."""
    others: dict[str, Any] = dict(
        stride=(1, 2, 2), padding=(1,) * 6, dilation=(1, 2, 2), groups=(2, 2),
        padding_mode=("replicate", "zeros"), activation="silu", slope=0.3, norm="batch", eps=0.1,
        order="temporal-first", recompute=True, outer_activation="relu", group="world",
        output_statistics=True, outer_norm=True,
    )  # fmt: skip
    spec = PairSpec()._replace(**{field: others[field]})
    knows_all_but = frozenset(PairSpec._fields) - {field}
    backend = Backend(**LEAST | {"pair_fields": knows_all_but})
    assert backend.why_unhonoured(spec) == f"does not know {field}={others[field]!r}"
    assert backend.why_unhonoured(PairSpec()) is None


def test_dispatch_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = frozenset(PairSpec._fields) - {"dilation"}
    blind = Backend(**LEAST | {"name": "aten", "pair_fields": fields})
    monkeypatch.setitem(dispatch.BACKENDS, "aten", blind)
    layer = fastst.Conv2Plus1d(2, 2, 3, dilation=(1, 2, 2))
    x = torch.randn(1, 2, 3, 7, 7)
    refused = r"cannot run the forward: it does not know dilation=\(1, 2, 2\)"
    with fastst.use_backend("aten"), pytest.raises(fastst.BackendError, match=refused):
        layer(x)
    parallel = fastst.ParallelConv2Plus1d(2, 2, 3, padding=1)
    with fastst.use_backend("aten"), pytest.raises(fastst.BackendError, match="has no parallel"):
        parallel(x)


def test_a_field_that_is_added_is_known_to_no_backend() -> None:
    """Each names what it honours: none takes all fields that there are, whatever they become."""

    class Wider(NamedTuple):
        stride: tuple[int, int, int] = (1, 1, 1)
        tomorrow: bool = False

    for backend in dispatch.BACKENDS.values():
        assert "tomorrow=True" in str(backend.why_unhonoured(Wider(tomorrow=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(dispatch.BACKENDS))
def test_backends_have_their_names(name: str) -> None:
    backend = dispatch.BACKENDS[name]
    assert backend.name == name
    assert backend.pair_fields <= set(PairSpec._fields)
    assert backend.parallel_fields <= set(ParallelSpec._fields)
