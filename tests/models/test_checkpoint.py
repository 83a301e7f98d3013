"""Models: counts and keys of the published networks, checkpoints from disk."""

from __future__ import annotations

import pytest
import torch

from fastst.models import r2plus1d_18
from tests.support.peers import torchvision_video


def test_r2plus1d_18_counts_and_keys():
    with torch.device("meta"):
        model = r2plus1d_18()
    assert sum(p.numel() for p in model.parameters()) == 31_505_325
    keys = set(model.state_dict())
    for prefix in ("stem.0", "stem.3", "layer1.0.conv1.0.0", "layer4.1.conv2.0.3", "fc"):
        assert f"{prefix}.weight" in keys
    for prefix in (
        "stem.1",
        "stem.4",
        "layer2.0.conv1.0.1",
        "layer2.0.conv1.1",
        "layer3.0.downsample.1",
    ):
        assert f"{prefix}.running_var" in keys
    assert model.get_submodule("layer2.0.conv1.0.0").weight.shape == (230, 64, 1, 3, 3)
    assert model.get_submodule("layer2.0.conv2.0.0").weight.shape == (230, 128, 1, 3, 3)


def test_r2plus1d_18_is_torchvisions():
    peer = torchvision_video().r2plus1d_18
    torch.manual_seed(0)
    theirs = peer(num_classes=7)
    torch.manual_seed(0)
    ours = r2plus1d_18(7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 3, 4, 24, 20)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_checkpoint_loads(tmp_path):
    model = r2plus1d_18(5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = r2plus1d_18(5, weights=tmp_path / "weights.pth")
    for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_checkpoint_of_another_network_is_refused_as_a_whole(tmp_path):
    path = tmp_path / "weights.pth"
    state = r2plus1d_18(5).state_dict()
    state["extra"] = state.pop("stem.0.weight")
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"1 missing: stem\.0\.weight; 1 unexpected: extra; 2 of another shape: fc"
    ):
        r2plus1d_18(6, weights=path)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="must be a state_dict"):
        r2plus1d_18(5, weights=path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="got a list"):
        r2plus1d_18(5, weights=path)
    with pytest.raises(FileNotFoundError):
        r2plus1d_18(5, weights=tmp_path / "nowhere.pth")
    for junk in (b"", b"junk", b"PK\x03\x04 cut off"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="must be a file of tensors"):
            r2plus1d_18(5, weights=path)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "400"])
def test_bad_num_classes(bad):
    with pytest.raises(ValueError, match="num_classes must be a positive int"):
        r2plus1d_18(bad)
