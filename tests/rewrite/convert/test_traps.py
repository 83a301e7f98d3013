"""What must be left alone, with its reason; and changes of a model after its conversion."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastst
from tests.rewrite.convert.test_converter import assert_same, small, step


@pytest.fixture(autouse=True)
def _say_everything_again(monkeypatch):
    monkeypatch.setattr(fastst.dispatch.selection, "_warned", set())


class Pair(nn.Module):
    """A pair whose forward a test replaces."""

    def __init__(self):
        super().__init__()
        self.s = nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.BatchNorm3d(6)
        self.t = nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        return self.t(F.relu(self.norm(self.s(x))))


class MidUsed(Pair):
    def forward(self, x):
        u = self.norm(self.s(x))
        return self.t(F.relu(u)) + u.mean()


class MidKept(Pair):
    def forward(self, x):
        self.kept = self.s(x)
        return self.t(F.relu(self.norm(self.kept)))


class MidReturned(Pair):
    def forward(self, x):
        u = self.s(x)
        return self.t(u), u


class Twice(Pair):
    def forward(self, x):
        return self.t(F.relu(self.norm(self.s(x)))) + self.t(F.relu(self.norm(self.s(x * 2))))


class OnlyTraining(Pair):
    def forward(self, x):
        u = self.s(x)
        if self.training:
            u = u * 0.5
        return self.t(F.relu(self.norm(u)))


class DroppedOut(Pair):
    def forward(self, x):
        return self.t(F.dropout(F.relu(self.norm(self.s(x))), 0.5, self.training))


class ActFirst(Pair):
    def forward(self, x):
        return self.t(self.norm(F.relu(self.s(x))))


class OnSize(Pair):
    def forward(self, x):
        u = self.norm(self.s(x))
        return self.t(F.relu(u)) if x.shape[3] > 12 else self.t(u)


class PadsForeignAxis(Pair):
    def forward(self, x):
        return self.t(F.pad(F.relu(self.norm(self.s(x))), (1, 1)))


class Counting(Pair):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class WritesBuffer(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return super().forward(x)


class WithoutGradients(Pair):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class WithGradients(Pair):
    def forward(self, x):
        with torch.enable_grad():
            return super().forward(x)


class WithoutAutocast(Pair):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class WithAutocast(Pair):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Checkpointed(Pair):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Standardized(nn.Conv3d):
    def forward(self, x):
        return F.conv3d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


def with_group_norm():
    model = Pair()
    model.norm = nn.GroupNorm(2, 6)
    return model


def hooked():
    model = Pair()
    model.norm.register_forward_hook(lambda m, args, out: out * 2)
    return model


def hooked_above():
    model = nn.Sequential(nn.Sequential(Pair().s, nn.ReLU()), Pair().t)
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    return model


def shared():
    model = Pair()
    model.again = model.s
    return model


def parametrized():
    model = Pair()
    torch.nn.utils.parametrizations.weight_norm(model.s)
    return model


def pruned():
    model = Pair()
    prune.random_unstructured(model.t, "weight", 0.5)
    return model


def standardized():
    model = Pair()
    model.s = Standardized(4, 6, (1, 3, 3), padding=(0, 1, 1))
    return model


def replaced_forward():
    model = Pair()
    forward = model.forward
    model.forward = lambda x: forward(x) * 2
    return model


def full_convolution():
    return nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.Conv3d(6, 4, (3, 1, 1)), nn.ReLU())


TRAPS = {
    MidUsed: "the output of norm is used 2 times",
    MidKept: "changes the attribute 'kept'",
    MidReturned: "its output is used 2 times",
    Twice: "s is called 2 times",
    OnlyTraining: "another one in training than in evaluation",
    DroppedOut: "another one in training than in evaluation",
    ActFirst: "norm, a BatchNorm3d, stands between",
    OnSize: "branches or loops on values or sizes",
    PadsForeignAxis: "its input is padded in space though it is temporal",
    Counting: "changes the attribute 'calls'",
    WritesBuffer: "changes the attribute 'steps'",
    WithoutGradients: "switches gradients, autocast",
    WithGradients: "switches gradients, autocast",
    WithoutAutocast: "switches gradients, autocast",
    WithAutocast: "switches gradients, autocast",
    Checkpointed: "switches gradients, autocast",
    with_group_norm: "norm, a GroupNorm, stands between",
    hooked: "has hooks",
    hooked_above: "0: has hooks",
    shared: "s is shared: the model holds it 2 times",
    parametrized: "s is parametrized",
    pruned: "has hooks",
    standardized: "no forward that could be traced calls it as a plain convolution",
    replaced_forward: "its forward was replaced on the object",
    full_convolution: "the model has no spatial convolution left to pair it with",
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: t.__name__)
def test_left_alone(trap):
    torch.manual_seed(0)
    model = trap().double()
    kinds = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    report = fastst.convert(model)
    assert report.replaced == []
    assert any(TRAPS[trap] in str(entry) for entry in report.left), str(report)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    for k, b in model.named_buffers():
        assert torch.equal(b, buffers[k])


def test_lazy_and_meta_parameters():
    lazy = nn.Sequential(nn.LazyConv3d(6, (1, 3, 3)), nn.LazyConv3d(4, (3, 1, 1)))
    assert "0 is lazy" in str(fastst.convert(lazy))
    with torch.device("meta"):
        meta = Pair()
    assert "s.weight is on the meta device" in str(fastst.convert(meta))
    assert type(meta) is Pair


def test_a_value_read_only_by_its_type():
    """A forward that asks for the type of its input is traced as for a tensor."""

    class Asks(Pair):
        def forward(self, x):
            x = x if torch.is_tensor(x) else x[0]
            assert isinstance(x, torch.Tensor)
            return super().forward(x)

    model = Asks().double()
    original = copy.deepcopy(model)
    assert len(fastst.convert(model).replaced) == 1
    x = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    assert_same(model, original, x)
    with pytest.warns(fastst.FallbackWarning, match="argument 'x' is a list"):
        torch.testing.assert_close(model([x]), original(x))


def test_input_changed_in_place_between_the_convolutions():
    class Changes(Pair):
        def forward(self, x):
            u = self.norm(self.s(x))
            x.add_(100)
            return self.t(F.relu(u))

    model = Changes().double().eval()
    original = copy.deepcopy(model)
    assert len(fastst.convert(model).replaced) == 1
    x = torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), original(x.clone()))


# ---- changes after the conversion


def converted():
    model = nn.Sequential(Pair(), nn.Sequential(nn.Sequential(Pair().s, nn.ReLU()), Pair().t))
    original = copy.deepcopy(model)
    assert len(fastst.convert(model).replaced) == 2
    return model, original


@pytest.mark.parametrize("path", ["0.s", "0.norm", "1.0", "1.0.0", "1.0.1", "1.1"])
def test_hooks_added_later_are_called(path):
    model, original = converted()
    calls = []
    for m in (model, original):
        m.get_submodule(path).register_forward_hook(lambda m, a, out: calls.append(0) or out * 2)
    x = torch.randn(1, 4, 3, 5, 5)
    with pytest.warns(fastst.FallbackWarning, match="has hooks"):
        torch.testing.assert_close(model(x), original(x))
    assert len(calls) == 2


def test_parametrization_added_later_is_used():
    model, original = converted()
    for m in (model, original):
        torch.nn.utils.parametrizations.orthogonal(m[0].t, "weight")
        m[0].t.parametrizations.weight.original.data.mul_(2)
    x = torch.randn(1, 4, 3, 5, 5)
    with pytest.warns(fastst.FallbackWarning, match="not a plain"):
        torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "norm", nn.BatchNorm3d(6, eps=1.0)),
        lambda m: setattr(m[0], "norm", nn.GroupNorm(2, 6)),
        lambda m: m[1][0].append(nn.Sigmoid()),
        lambda m: m[1].append(nn.Sigmoid()),
        lambda m: m[1].__setitem__(0, nn.Sequential(nn.Conv3d(4, 6, 1), nn.Sigmoid())),
        lambda m: m[1][0].__setitem__(1, nn.Sigmoid()),
        lambda m: m[0].s.__setattr__("bias", None),
    ],
)
def test_changed_modules_are_used(change):
    model, original = converted()
    x = torch.randn(2, 4, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastst.FallbackWarning)
        for m in (model, original):
            torch.manual_seed(1)
            change(m.eval())
        torch.testing.assert_close(model(x), original(x))


def test_changed_attributes_are_used():
    class Scaled(Pair):
        scale = 1.0

        def __init__(self):
            super().__init__()
            self.shift = 1.0
            self.pool = None

        def forward(self, x):
            y = super().forward(x) + self.shift
            return y if self.pool is None else self.pool(y)

    for name, value in (("shift", 2.0), ("pool", nn.AvgPool3d(2))):
        model = Scaled().eval()
        original = copy.deepcopy(model)
        fastst.convert(model)
        model.shift = 1.0  # the same again: stays converted
        assert type(model) is not Scaled
        with pytest.warns(fastst.FallbackWarning, match=f"attribute '{name}' changed"):
            setattr(model, name, value)
        setattr(original, name, value)
        assert type(model) is Scaled
        x = torch.randn(1, 4, 4, 6, 6)
        torch.testing.assert_close(model(x), original(x))


def test_sync_batch_norm_conversion_after():
    model, original = converted()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(1, 4, 3, 5, 5)
    torch.testing.assert_close(model.eval()(x), original.eval()(x))


def test_replicas_are_converted():
    model, _ = converted()
    replica = model[0]._replicate_for_data_parallel()
    assert type(replica) is type(model[0])
    assert replica is not model[0]


def test_a_class_changed_after_conversion_is_not_lost():
    model, _ = converted()
    kind = type(model[0])
    model[0].__class__ = type("Sharded", (kind,), {})
    assert fastst.convert(model).replaced == []
    assert type(model[0]).__name__ == "Sharded"
    with pytest.raises(ValueError, match="the class of 0 was changed after"):
        fastst.revert(model)


def test_strict_mode_refuses_to_fall_back(monkeypatch):
    model, _ = converted()
    model[0].s.register_forward_hook(lambda m, a, out: None)
    monkeypatch.setenv("FASTST_STRICT", "1")
    with pytest.raises(fastst.BackendError, match="has hooks"):
        model(torch.randn(1, 4, 3, 5, 5))


def test_frozen_norm_inside_a_training_model():
    model = small().double()
    original = copy.deepcopy(model)
    fastst.convert(model)
    results = []
    x = torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)
    for m in (model, original):
        m.train()
        m[0][1].eval()
        y = m(x)
        y.square().sum().backward()
        results.append([y.detach(), m[0][1].weight.grad, *m.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_two_threads_at_once():
    model = small().eval()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(1, 3, 4, 12, 12)
    wanted, wrong = original(x), []

    def work():
        for _ in range(20):
            if not torch.allclose(model(x), wanted, atol=1e-5):
                wrong.append(0)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_and_checkpointing():
    model = small()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(2, 3, 5, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == original(x).dtype == torch.bfloat16
    x = x.requires_grad_()
    for m in (model, original):
        m.eval()
        checkpoint(m, x, use_reentrant=False).sum().backward()
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_functorch():
    model = small().double().eval()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)
    found = []
    for m in (model, original):
        parameters = dict(m.named_parameters())

        def loss(p, sample, m=m):
            return torch.func.functional_call(m, p, (sample[None],)).square().sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    for k, g in found[0].items():
        torch.testing.assert_close(g, found[1][k], rtol=1e-9, atol=1e-9)


def test_a_planted_bug_is_caught(monkeypatch):
    """The comparison of this file sees an op that is slightly wrong."""
    model = small().double()
    original = copy.deepcopy(model)
    fastst.convert(model)
    run = fastst.functional.ops.conv2plus1d
    monkeypatch.setattr(
        fastst.functional.ops, "conv2plus1d", lambda *a: (run(*a)[0] * (1 + 1e-8), *run(*a)[1:])
    )
    x = torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            step(model, x, True), step(original, x, True), rtol=1e-10, atol=1e-10
        )


class Assigns(Pair):
    """Augmented assignments, which write to a tensor under all of its names; numbers have one."""

    def forward(self, x):
        x = x * 1
        alias, n = x.view(-1), x.shape[2]
        m = n
        alias += 1
        alias *= 2
        m += 1
        y = self.t(F.relu(self.norm(self.s(x))))
        y -= alias.view_as(x) / n
        return y + x * m


def test_augmented_assignments_write_to_every_name():
    model = Assigns().double()
    original = copy.deepcopy(model)
    assert len(fastst.convert(model).replaced) == 1
    assert_same(model, original, torch.randn(2, 4, 3, 5, 5, dtype=torch.float64))
