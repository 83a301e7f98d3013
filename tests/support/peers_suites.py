"""Runs other people's own tests plain and through converted models, and compares what passes.

    python tests/support/peers_suites.py pytorchvideo /path/to/a/checkout

The folder is a checkout of that project, whose tests are none of ours; the package itself is
installed, or importable through PYTHONPATH. The second run loads this file as a pytest plugin: it
converts every module with an ``nn.Conv3d`` before its first call from outside.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]  # whose triton.py is no Triton

from torch import nn  # noqa: E402

import fastst  # noqa: E402
from fastst.rewrite.convert import begins  # noqa: E402
from fastst.rewrite.convert.chain import ChainPlan  # noqa: E402

SUITES = {  # tests of the blocks and networks that have pairs
    "pytorchvideo": (
        "tests/test_models_r2plus1d.py", "tests/test_models_csn.py", "tests/test_models_x3d.py",
        "tests/test_models_stem.py", "tests/test_models_resnet.py", "tests/test_fuse_bn.py",
        "tests/test_models_slowfast.py", "tests/test_layers_convolutions.py",
    ),
    "mmaction2": (
        "tests/models/common/test_conv2plus1d.py",
        "tests/models/backbones/test_resnet2plus1d.py",
        "tests/models/backbones/test_resnet3d.py",
        "tests/models/backbones/test_resnet3d_csn.py",
        "tests/models/backbones/test_resnet3d_slowfast.py",
        "tests/models/backbones/test_resnet3d_slowonly.py",
        "tests/models/backbones/test_x3d.py",
    ),
    "MONAI": (
        "tests/networks/blocks/dints_block", "tests/networks/nets/dints",
        "tests/networks/nets/test_dints_network.py", "tests/networks/nets/test_dynunet.py",
        "tests/networks/blocks/test_dynunet_block.py",
    ),
    "diffusers": (
        "tests/models/autoencoders/test_models_autoencoder_cosmos.py",
        "tests/models/autoencoders/test_models_autoencoder_wan.py",
        "tests/models/autoencoders/test_models_autoencoder_hunyuan_video.py",
        "tests/models/autoencoders/test_models_autoencoder_kl_cogvideox.py",
        "tests/models/autoencoders/test_models_autoencoder_kl_temporal_decoder.py",
        "tests/models/unets/test_models_unet_3d_condition.py",
        "tests/models/unets/test_models_unet_spatiotemporal.py",
    ),
}  # fmt: skip


class _Converting:
    """Converts modules before their first call."""

    def __init__(self) -> None:
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.models = self.pairs = 0
        self.within = threading.local()

    def install(self) -> None:
        call = nn.Module.__call__

        def converted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if getattr(self.within, "yes", False):
                return call(module, *args, **kwargs)
            self.within.yes = True
            try:
                self._convert(module)
                with begins.listening() as events:
                    return call(module, *args, **kwargs)
            finally:
                self.pairs += sum(
                    event.why is None and isinstance(event.plan, ChainPlan) for event in events
                )
                self.within.yes = False

        nn.Module.__call__ = converted  # type: ignore[method-assign]

    def _convert(self, module: nn.Module) -> None:
        if module not in self.seen and any(isinstance(m, nn.Conv3d) for m in module.modules()):
            self.seen.add(module)
            fastst.convert(module)
            self.models += 1


_converting = _Converting()


if how := os.environ.get("FASTST_PEERS"):  # as a plugin, before any conftest imports torchvision
    import peers  # a link beside that of this file: there are other packages called tests

    peers._define_nms()
    if how == "converted":
        _converting.install()


def pytest_sessionstart() -> None:
    """mmaction2's tests look for its blocks in a registry that one of them makes the default for
    those that run after it."""
    if importlib.util.find_spec("mmaction") is not None:
        importlib.import_module("mmaction.utils").register_all_modules()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    told = f"{_converting.models} modules converted, {_converting.pairs} pairs ran as one"
    terminalreporter.write_line(told)


def run(folder: Path, files: Sequence[str], how: str) -> tuple[set[str], set[str], str]:
    """Names of the tests that passed and failed, and what was converted."""
    with tempfile.TemporaryDirectory() as links, tempfile.NamedTemporaryFile() as report:
        for name in ("peers.py", "peers_suites.py"):
            (Path(links) / name).symlink_to(HERE / name)
        places = (str(folder), links, os.environ.get("PYTHONPATH", ""), str(HERE.parents[1]))
        path = os.pathsep.join(places)
        there = [f for f in files if (folder / f).exists()]
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "peers_suites",
             "-p", "no:cacheprovider", "--continue-on-collection-errors",
             f"--junitxml={report.name}", *there],
            cwd=folder, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": path, "FASTST_PEERS": how},
        )  # fmt: skip
        if not Path(report.name).stat().st_size:
            raise SystemExit(ended.stdout + ended.stderr)
        passed, failed = set(), set()
        for case in ET.parse(report.name).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                failed.add(name)
            elif case.find("skipped") is None:
                passed.add(name)
    told = [line for line in ended.stdout.splitlines() if "modules converted" in line]
    return passed, failed, told[-1] if told else ended.stdout[-2000:] + ended.stderr[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("folder", type=Path, help="a checkout of the project")
    parser.add_argument("files", nargs="*", help="only these of its tests")
    args = parser.parse_args()
    files = args.files or SUITES[args.suite]
    plain, broken, _ = run(args.folder, files, "plain")
    ours, _, told = run(args.folder, files, "converted")
    print(f"{args.suite}: {len(plain)} pass plain ({len(broken)} do not), of these "
          f"{len(plain & ours)} converted; {told}")  # fmt: skip
    for name in sorted(plain - ours):
        print(f"  only plain: {name}")
    sys.exit(bool(plain - ours))


if __name__ == "__main__":
    main()
