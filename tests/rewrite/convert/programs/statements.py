"""What may stand in a forward: each statement maps x, (N, 4, T, H, W), to such an x.

A statement is two texts, of ``__init__`` and of ``forward``, in which ``@`` stands for its number.
Statements know nothing of each other, so any of them may be left out. Some are illegal where they
come to stand: both modules must then refuse alike. None writes to what autograd has saved behind
its back (``.data``, where it records): PyTorch itself then computes other gradients. None asks for
a version counter, which says how a value was made.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class Statement(NamedTuple):
    """Lines of ``__init__`` and of ``forward``; ``head`` and ``tail`` enclose what follows it."""

    forward: str
    init: str = ""
    head: str = ""  # opens a block around the next ``size`` statements
    tail: str = ""
    size: int = 0


def one(module: str, call: str = "x = self.m@(x)") -> Statement:
    """A module of its own, called."""
    return Statement(call, f"self.m@ = {module}")


def some(*lines: str) -> list[Statement]:
    return [Statement(line) for line in lines]


SPATIAL = (
    "nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))",
    "nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), bias=False)",
    "nn.Conv3d(4, 4, (1, 2, 3), padding='same', dilation=(1, 1, 2))",
    "nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), padding_mode='replicate')",
    "nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), padding_mode='circular')",
    "nn.Conv3d(4, 4, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2)",
    "nn.Conv3d(4, 4, (1, 3, 3), stride=tuple(np.array([1, 1, 2])), padding=(0, 1, 1))",
    "nn.Conv3d(4, 4, (1, 3, 1), padding=(0, 1, 0), groups=4)",
    "nn.Conv3d(4, 4, (1, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1))",
    "Own(4, 4, (1, 3, 3), padding=(0, 1, 1))",
)
TEMPORAL = (
    "nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))",
    "nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), bias=False)",
    "nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))",
    "nn.Conv3d(4, 4, (2, 1, 1), padding=(1, 0, 0), groups=2)",
    "nn.Conv3d(4, 4, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1))",
    "nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), padding_mode='reflect')",
    "nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 1, 1))",
    "nn.Conv3d(4, 4, (3, 1, 1), stride=(1, 2, 2), padding=(1, 0, 0))",
    "nn.Conv3d(4, 4, (3, 1, 1), padding=tuple(np.array([1, 0, 0])))",
    "Own(4, 4, (3, 1, 1), padding=(1, 0, 0))",
)
WHOLE = (
    "nn.Conv3d(4, 4, 3, padding=1)",
    "nn.Conv3d(4, 4, (3, 3, 1), padding=(0, 1, 0))",
    "nn.Conv3d(4, 4, (2, 2, 2), padding='same', groups=2)",
    "nn.Conv3d(4, 4, 3, padding=1, padding_mode='replicate', bias=False)",
    "nn.Conv3d(4, 4, (3, 2, 3), stride=(1, 1, 2), padding=(2, 1, 0))",
    "Own(4, 4, (2, 3, 3), padding=(1, 1, 1))",
)
OTHER = (
    "nn.Conv3d(4, 4, 1)",
    "nn.Conv3d(5, 4, (1, 3, 3), padding=(0, 1, 1))",  # refuses
    "nn.Conv3d(4, 4, (1, 9, 9))",  # refuses
    "nn.Conv3d(4, 4, (9, 1, 1))",  # refuses
    "nn.ConvTranspose3d(4, 4, (1, 3, 3), padding=(0, 1, 1))",
)
# How a convolution is called, or what it has become; {} is one of those above.
CALLS = (
    ("self.m@ = {}", "x = self.m@.forward(x)"),
    ("self.m@ = {}", "x = self.m@._conv_forward(x, self.m@.weight, self.m@.bias)"),
    ("self.m@ = {}", "x = self.m@(self.m@(x))"),
    ("self.m@ = {}", "x = self.m@(x) - self.m@(2 * x)"),
    ("self.m@ = {}", "x = self.m@(input=x)"),
    ("self.m@ = {}", "x = F.conv3d(x, self.m@.weight, self.m@.bias, padding=self.m@.padding)"),
    ("self.m@ = {}", "x = torch.conv3d(x, self.m@.weight, None, 1, self.m@.padding)"),
    ("self.m@ = nn.utils.parametrizations.weight_norm({})", "x = self.m@(x)"),
    ("self.m@ = nn.utils.parametrizations.spectral_norm({})", "x = self.m@(x)"),
    ("self.m@ = nn.utils.prune.l1_unstructured({}, 'weight', 0.5)", "x = self.m@(x)"),
    ("self.m@ = {}; self.m@.register_forward_hook(lambda m, a, y: 2 * y)", "x = self.m@(x)"),
    ("self.m@ = {}; self.m@.register_forward_hook(self.seen)", "x = self.m@(x)"),
    ("self.m@ = {}; self.m@.register_forward_pre_hook(lambda m, a: (3 * a[0],))", "x = self.m@(x)"),
    ("self.m@ = {}; self.m@.register_full_backward_hook(self.halves)", "x = self.m@(x)"),
    ("self.m@ = {}; self.m@.register_full_backward_pre_hook(self.doubles)", "x = self.m@(x)"),
    ("self.m@ = sharded({})", "x = self.m@(x)"),
    ("self.m@ = tiled({})", "x = self.m@(x)"),
    ("self.m@ = {}", "with torch.no_grad():\n    self.m@.weight.mul_(1.1)\nx = self.m@(x)"),
    ("self.m@ = {}",
     "x = self.m@(x)\nif not torch.is_grad_enabled():\n    self.m@.weight.data.mul_(1.1)"),
    ("self.m@ = {}", "x = self.m@(x)\nwith torch.no_grad():\n    self.m@.weight.mul_(1.1)"),
    ("self.m@ = {}",
     "x = self.m@(x)\nself.m@.weight = nn.Parameter(0.9 * self.m@.weight.detach())"),
    ("self.m@ = {}", "x = self.m@(x)\nself.m@.weight.data = 0.9 * self.m@.weight.data"),
    ("self.m@ = {}",
     "x = self.m@(x)\nif self.m@.bias is not None:\n    self.m@.bias.data.add_(0.1)"),
    ("self.m@ = {}",
     "x = self.m@(x)\nself.m@.weight.requires_grad_(not self.m@.weight.requires_grad)"),
    ("self.m@ = {}", "x = self.m@(x)\nself.m@.stride = (1, 1, 1)"),
    ("self.m@ = {}", "k@ = x\nx = self.m@(x)\nk@.add_(1)"),
    ("self.m@ = {}", "k@ = x.detach()\nx = self.m@(k@)\nk@.mul_(2)"),
    ("self.m@ = {}",
     "k@ = x.clone()\nx = self.m@(k@)\nif not torch.is_grad_enabled():\n    k@.data.mul_(2)"),
    ("self.m@ = {}", "k@ = x\nx = self.m@(x)\nwith torch.no_grad():\n    k@[:, 0] = 0"),
    ("self.m@ = {}", "with torch.no_grad():\n    x = self.m@(x)"),
    ("self.m@ = {}", "with torch.inference_mode():\n    y = self.m@(x)\nx = x + y.mean().item()"),
    ("self.m@ = {}",
     "with torch.autocast('cpu', torch.bfloat16):\n    x = self.m@(x.float())\nx = x.double()"),
    ("self.m@ = {}", "x = self.m@(x[0])[None]"),
    ("self.m@ = {}", "x = torch.stack([self.m@(c) for c in x])"),
    ("self.m@ = {}", "x = checkpoint(self.m@, x, use_reentrant=False)"),
    ("self.m@ = {}", "x = checkpoint(self.m@, x, use_reentrant=True)"),
    ("self.m@ = nn.DataParallel({})", "x = self.m@(x)"),
    ("self.m@ = {}", "x = self.m@(x.to(memory_format=torch.channels_last_3d))"),
    ("self.m@ = {}", "x = self.m@(x.transpose(3, 4)).transpose(3, 4)"),
    ("self.m@ = {}", "x = copy.deepcopy(self.m@)(x)"),
    ("self.m@ = {}",
     "x = torch.func.functional_call(self.m@, {'weight': 2 * self.m@.weight}, (x,))"),
    ("self.m@ = {}", "x = in_thread(self.m@, x)"),
    ("self.m@ = {}; self.m@.requires_grad_(False)", "x = self.m@(x)"),
    ("self.m@ = {}.float()", "x = self.m@(x.float()).double()"),
    ("self.m@ = {}.float()", "x = self.m@(x)"),  # refuses
    ("self.m@ = {}",
     "try:\n    x = self.m@(x[:, :3])\nexcept RuntimeError as e:\n    log(type(e))"),
)  # fmt: skip
CALLS_OF_TWO = (
    Statement(  # Conv2d of frames, then Conv1d of pixels
        "b, c, t, h, w = x.shape\n"
        "x = self.m@(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))\n"
        "x = x.reshape(b, t, c, h, w).permute(0, 3, 4, 2, 1).reshape(b * h * w, c, t)\n"
        "x = self.n@(x).reshape(b, h, w, c, t).permute(0, 3, 4, 1, 2)",
        "self.m@, self.n@ = nn.Conv2d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)",
    ),
    Statement(  # MoViNet's: Conv2d of frames, then Conv2d of (T, H·W)
        "b, c, t, h, w = x.shape\n"
        "x = F.relu(self.m@(x.transpose(1, 2).flatten(0, 1))).unflatten(0, (b, t))\n"
        "x = self.n@(x.transpose(1, 2).flatten(3)).unflatten(3, (h, w))",
        "self.m@ = nn.Conv2d(4, 4, 3, padding=1)\n"
        "self.n@ = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))",
    ),
    Statement(  # the ambiguous one: N·T mistaken for T·N
        "b, c, t, h, w = x.shape\n"
        "x = self.m@(x.permute(2, 0, 1, 3, 4).reshape(t * b, c, h, w))\n"
        "x = x.reshape(b, t, c, h, w).transpose(1, 2)\nx = self.n@(x)",
        "self.m@, self.n@ = nn.Conv2d(4, 4, 3, padding=1), nn.Conv3d(4, 4, (3, 1, 1))",
    ),
    Statement(  # with a norm of frames, and the norm and the activation of clips
        "b, c, t, h, w = x.shape\n"
        "x = self.bn2(self.m@(x.transpose(1, 2).flatten(0, 1))).unflatten(0, (b, t))\n"
        "x = F.silu(x.transpose(1, 2))\nx = self.n@(F.pad(x, (0, 0, 0, 0, 2, 0)))",
        "self.m@, self.n@ = nn.Conv2d(4, 4, 3, padding=1), nn.Conv3d(4, 4, (3, 1, 1))\n"
        "self.bn2 = nn.BatchNorm2d(4)",
    ),
    Statement(  # pixels first
        "b, c, t, h, w = x.shape\n"
        "x = self.m@(x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t))\n"
        "x = x.reshape(b, h, w, c, -1).permute(0, 4, 3, 1, 2)\n"
        "x = self.n@(x.reshape(-1, c, h, w)).unflatten(0, (b, -1)).transpose(1, 2)",
        "self.m@, self.n@ = nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)",
    ),
    Statement(  # a causal cache
        "y = self.m@(x)\nx = self.n@(F.pad(y, (0, 0, 0, 0, 2, 0), mode='replicate'))\n"
        "self.caches.append(y[:, :, -2:].detach())",
        "self.m@ = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))\n"
        "self.n@ = nn.Conv3d(4, 4, (3, 1, 1))",
    ),
    Statement(  # cached frames of what a convolution over space and time reads
        "z = F.silu(self.g@(self.m@(x)))\nc = z[:, :, -2:].clone()\n"
        "y = torch.cat([self.caches.pop() if self.caches else torch.zeros_like(c), z], 2)\n"
        "x = self.n@(F.pad(y, (1, 1, 1, 1, 0, 0))) + x\nself.caches.append(c)",
        "self.m@ = nn.Conv3d(4, 4, 3, padding=1)\nself.n@ = nn.Conv3d(4, 4, 3)\n"
        "self.g@ = nn.BatchNorm3d(4)",
    ),
    Statement(
        "y = self.m@(x)\ny = torch.cat([self.caches.pop() if self.caches else y[:, :, :2], y], 2)\n"
        "x = self.n@(y)\nself.caches.append(y[:, :, -2:])",
        "self.m@ = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))\n"
        "self.n@ = nn.Conv3d(4, 4, (3, 1, 1))",
    ),
)

NORMS = (
    *[one(f"nn.BatchNorm3d(4{more})") for more in (
        "", "", "", ", momentum=None", ", affine=False", ", track_running_stats=False", ", eps=0.1",
    )],
    one("nn.BatchNorm3d(4)", "self.m@.eval()\nx = self.m@(x)"),
    one("nn.BatchNorm3d(4)", "x = self.m@(x)\nlog(int(self.m@.num_batches_tracked))"),
    one("nn.BatchNorm3d(4)", "x = self.m@(x)\nlog(self.m@.running_mean.clone())"),
    one("nn.BatchNorm3d(4)", "x = self.m@(x)\nself.m@.reset_running_stats()"),
    one("nn.BatchNorm3d(4)",
        "x = self.m@(x)\nif not torch.is_grad_enabled():\n    self.m@.weight.data.mul_(1.5)"),
    one("nn.BatchNorm3d(4)", "x = self.m@(x)\nself.m@.running_var.mul_(1.5)"),
    one("nn.BatchNorm3d(4)", "self.m@(x)"),  # for its statistics alone
    one("nn.BatchNorm3d(4)", "x = self.m@(x) + self.m@(x)"),
    one("nn.BatchNorm3d(4)", "y = self.m@(x)\nx = self.m@(y)"),
    one("nn.BatchNorm3d(4)", "x = self.m@(x[0])"),  # refuses
    one("nn.BatchNorm3d(4)", "with torch.no_grad():\n    x = self.m@(x)"),
    one("nn.BatchNorm3d(4)", "x = checkpoint(self.m@, x, use_reentrant=False)"),
    one("nn.BatchNorm3d(4); self.m@.register_forward_hook(self.seen)"),
    one("nn.BatchNorm3d(4)", "x = F.batch_norm(x, None, None, training=True)"),
    one("nn.BatchNorm3d(4)", "x = F.batch_norm(x, self.m@.running_mean, self.m@.running_var)"),
    one("nn.BatchNorm3d(4).requires_grad_(False)"),
    one("nn.BatchNorm3d(4).float()", "x = self.m@(x.float()).double()"),
    one("nn.BatchNorm3d(5)"),  # refuses
    one("nn.GroupNorm(2, 4)"), one("nn.InstanceNorm3d(4, affine=True)"), one("nn.Identity()"),
    one("nn.InstanceNorm3d(4, track_running_stats=True)"),
    Statement("x = F.normalize(x, dim=1)"),
    Statement("x = F.normalize(x, dim=1) * 2.0 * self.m@ + 0.0",
              "self.m@ = nn.Parameter(torch.rand(4, 1, 1, 1) + 0.5)"),
    Statement("x = F.normalize(x, dim=1) * 2.0 * self.m@ + self.n@",
              "self.m@, self.n@ = (nn.Parameter(torch.rand(4, 1, 1, 1)) for _ in range(2))"),
    one("nn.GroupNorm(2, 4)"), one("nn.GroupNorm(2, 4, affine=False)"), one("nn.GroupNorm(3, 3)"),
    one("nn.GroupNorm(2, 4)", "x = self.m@(x)\nc = x[:, :, :1].clone()\nx = x + c"),
)  # fmt: skip

ACTS = (
    *[one(f"nn.{kind}") for kind in (
        "ReLU()", "ReLU(inplace=True)", "ReLU()", "ReLU6()", "SiLU()", "SiLU(inplace=True)",
        "GELU()", "GELU('tanh')", "LeakyReLU(0.3)", "LeakyReLU(0.2, inplace=True)", "Hardswish()",
        "Sigmoid()", "PReLU(4)", "ELU(inplace=True)", "Softplus()", "Mish()", "Hardtanh(0, 6)",
        "RReLU()", "Dropout(0.5)", "Dropout3d(0.5)", "AlphaDropout(0.2)",
    )],
    one("nn.ReLU(); self.m@.register_forward_hook(self.seen)"),
    *some(
        "x = F.relu(x)", "x = torch.relu(x)", "x = x.relu()", "x.relu_()", "F.relu(x, True)",
        "torch.relu_(x)", "x = F.relu(x, inplace=True)", "x = F.relu6(x)", "x = x.clamp(min=0)",
        "x.clamp_(0, 3)", "x = F.silu(x)", "x = x * torch.sigmoid(x)", "x = F.leaky_relu(x, 0.2)",
        "F.leaky_relu(x, -0.2, True)", "x = F.gelu(x, approximate='tanh')", "x = F.hardswish(x)",
        "x = F.relu(input=x)", "x = F.leaky_relu(x, negative_slope=0.4, inplace=False)",
        "x = torch.where(x > 0, x, 0.1 * x)", "x = torch.maximum(x, torch.zeros_like(x))",
        "x = F.threshold(x, 0.1, -1.0)", "x = torch.nn.functional.dropout(x, 0.3)",
        "y = x\nx = F.relu(x)\nx = x + y", "y = F.relu(x)\nx = x - y", "x = F.relu(F.relu(x))",
        "x = F.silu(F.relu(x))", "y = x\nF.relu_(x)\nx = x + y", "x = F.relu(x, inplace=1)",
        "y = x.view_as(x)\nF.relu_(x)\nx = x + y",
        "y = x[:, :2]\nx = F.relu(x, True)\nx[:, :2] += y",
    ),
)  # fmt: skip

READS = some(  # look at x, and leave it
    "self.kept.append(x)", "self.last = x", "log(tuple(x.shape), x.dtype, x.ndim, x.numel())",
    "log(x.requires_grad)", "log(x.is_leaf, x.grad_fn is None)", "log(x.stride())",
    "log(x.is_contiguous(), len(x), x.size(2))", "log(x.is_floating_point(), x.device.type)",
    "log(float(x.sum()))", "log(x.detach().mean())", "log(x.tolist()[0][0][0][0][:1])",
    "log(x.detach().numpy().sum())", "log(bool((x == x).all()))", "log(x.data_ptr() != 0)",
    "log(x.max().item(), x.argmax().item())", "log(isinstance(x, torch.Tensor), x is not None)",
    "log(len(repr(x)) > 3)", "log({x: 1}[x], x in [x])", "log(x.is_inference())",
    "log(copy.deepcopy(x.detach()))", "log(pickle.loads(pickle.dumps(x.detach())))",
    "log(copy.copy(x).sum())", "b = io.BytesIO()\ntorch.save(x, b)\nlog(b.tell() > 0)",
    "log(torch.allclose(x, x + 0), torch.equal(x, x))", "log(x.var_mean() if False else x.std())",
    "log(in_thread(torch.mean, x))", "with torch.no_grad():\n    log(x.mean())",
    "with torch.inference_mode():\n    log(x.mean())", "weakref.ref(x)", "log(x.is_complex())",
    "if x.requires_grad:\n    x.register_hook(lambda g: log(g.sum()))",
    "if x.requires_grad:\n    x.register_hook(lambda g: 0.5 * g)",
    "if x.requires_grad:\n    x.retain_grad()\n    self.retained.append(x)",
    "if x.requires_grad:\n    x.register_post_accumulate_grad_hook(print)",  # refuses
    "if x.requires_grad:\n    log(torch.autograd.grad(x.square().sum(), x)[0].sum())",
    "log(torch.rand(()))", "self.count += 1", "log(self.training)", "log(sorted(set(dir(x)))[:1])",
    "y = x + 1\nlog(y.mean())", "y = x", "y = x.detach()", "self.seen(self, x, x)",
    "log(torch.is_grad_enabled(), torch.is_autocast_enabled('cpu'))",
    "log(torch.sum(x, (2, 3, 4)))",
    "for m in self.modules():\n    m.eval()", "self.requires_grad_(False)", "log(x.names)",
    "y = torch.empty(0)\ntorch.add(x, 1, out=y)\nlog(y.mean())", "log(x.T.shape if False else 0)",
    "torch._assert(x.shape[1] == 4, 'four')", "log(next(iter(x)).sum())", "log(x[0, 0, 0, 0, 0])",
    "log(np.asarray(x.detach()).shape)", "log(x.__class__.__name__ != '')", "log(x.nbytes)",
    "log(x.untyped_storage().nbytes() > 0)", "log(x.storage_offset())", "log(x.element_size())",
    "log(x.cpu().mean(), x.to('cpu').mean())", "log(torch.stack([x, x]).mean(), sum(x).mean())",
)  # fmt: skip

CHANGES = some(  # make another x of it
    "x = x.detach()", "x = x + 0", "x = x.clone()", "x = x * 1.0", "x = -(-x)", "x = 1 + x",
    "x = x.contiguous()", "x = x.contiguous(memory_format=torch.channels_last_3d)",
    "x = x.view(x.shape)", "x = x.reshape(x.shape[0], 4, -1).reshape(x.shape)", "x = x[:]",
    "x = x.flatten(0, 1).unflatten(0, (-1, 4))", "x = x.unsqueeze(0).squeeze(0)", "x = x.flip(2)",
    "x = x.permute(0, 1, 3, 2, 4).permute(0, 1, 3, 2, 4)", "x = x.transpose(3, 4)", "x = x.mT",
    "x = torch.cat(torch.split(x, 2, 1), 1)", "x = torch.cat(x.chunk(2, 1)[::-1], 1)",
    "a, b = x[:, :2], x[:, 2:]\nx = torch.cat([b, a], 1)", "x = torch.cat([x, x], 2)",
    "a, b = x.split(2, 1)\na.add_(1)\nx = torch.cat([a, b], 1)", "x = x.to(torch.float64)",
    "x = torch.stack(x.unbind(2), 2)", "x = torch.stack([f for f in x])",
    "x = x.movedim(2, 1).movedim(1, 2)",
    "x.add_(1)", "x.mul_(0.5)", "x += 1", "x *= 2", "x[:, 0] = 0", "x[..., 0].zero_()",
    "if not torch.is_grad_enabled():\n    x.data.mul_(2)", "y = x\ny.add_(1)", "x.copy_(x.flip(0))",
    "x.fill_(0.5)", "x.detach().add_(1)",
    "with torch.no_grad():\n    x.mul_(0.7)", "with torch.no_grad():\n    x = x * 2",
    "with torch.no_grad():\n    y = x.mean()\nx = x - y", "x = x - x.mean()", "x = x / x.std()",
    "if x.mean() > 0:\n    x = -x", "if x.shape[2] > 3:\n    x = x[:, :, 1:]", "x = abs(x)",
    "if self.training:\n    x = 2 * x", "if torch.rand(()) < 0.5:\n    x = 3 * x", "x = x.sqrt()",
    "if self.training and torch.rand(()) < 0.5:\n    return x", "x = x ** 2", "x = x.matmul(x.mT)",
    "x = F.pad(x, (0, 0, 0, 0, 2, 0))", "x = F.pad(x, (1, 1, 1, 1))",
    "x = F.pad(x, (0, 1, 0, 1, 0, 0))",
    "x = F.pad(x, (0, 0, 0, 0, 1, 1), value=1.0)",
    "x = F.pad(x, (0, 0, 0, 0, 1, 0), mode='replicate')",
    "x = F.pad(x, (1, 1, 1, 1, 0, 0), mode='circular')", "x = F.pad(x, (-1, 0, 0, 0, 0, 0))",
    "x = F.pad(x, [0, 0, 0, 0, 1, 1])", "x = F.pad(x, (0, 0, 0, 0, 1, 1), 'reflect')",
    "x = F.pad(x, (0,) * 6)", "x = nn.ZeroPad3d((0, 0, 0, 0, 1, 1))(x)", "x = x.squeeze()",
    "x = nn.ReplicationPad3d((0, 0, 0, 0, 2, 0))(x)",
    "x = F.interpolate(x, scale_factor=(1, 2, 2))",
    "x = F.max_pool3d(x, 3, 1, 1)", "x = F.avg_pool3d(x, (1, 2, 2), 1)", "x = torch.roll(x, 1, 2)",
    "x = halved(x)", "x = Scale.apply(x)", "x = Doubles.apply(x)",
    "x = torch.lerp(x, x.flip(3), 0.3)", "x = torch.cat([x[:, :, :1], x], 2)",
    "x = torch.cat([x[:, :, :1, ...].repeat(1, 1, 2, 1, 1), x], dim=2)",
    "x = torch.cat((x.narrow(2, 0, 1).expand(-1, -1, 2, -1, -1), x), 2)",
    "y = x[:, :, :1]\nF.relu_(x)\nx = torch.cat([y, x], 2)", "y = x.transpose(3, 4)\ny.mul_(2)",
    "y = x.flatten(3)\nx = F.relu(x)\nx = x + y.view(x.shape)",
    "y = x.permute(0, 2, 1, 3, 4)\nx.add_(1)\nx = y.permute(0, 2, 1, 3, 4)",
    "x = x.transpose(1, 2).contiguous().transpose(1, 2)",
    "x = x + torch.randn_like(x)", "x = x.new_zeros(x.shape) + x", "x = x * torch.ones_like(x)",
    "x = torch.zeros(x.size(0), 4, 1, 1, 1, dtype=x.dtype) + x", "x = x.expand(x.shape)",
    "x = x.repeat(1, 1, 2, 1, 1)", "x = copy.copy(x)", "x = x.requires_grad_()",
    "x = x.masked_fill(x > 1, 0.0)", "x = torch.addcmul(x, x, x)",
    "x = torch.func.vmap(torch.sin)(x)",
    "x = torch.compiler.disable(torch.sin)(x)", "x = x.double().float().double()",
    "x = x.half().double()",
    "x = x.float()", "x = torch.fft.fft(x).real", "x = torch.complex(x, x).conj().imag",
    "x = list(x)",
    "raise KeyError(x.shape)", "x = x[0]", "x = torch.as_strided(x, x.shape, x.stride())",
    "s = self.stem\nx = s(x)",
    "if not torch.is_grad_enabled():\n    self.stem.weight.data.mul_(1.1)", "x = self.relu(x)",
    "x = self.bn(x)",
    "y = x\nx = torch.autograd.graph.save_on_cpu()(torch.sin)(x) if False else torch.sin(x)",
    "x = torch.add(x, 1, out=torch.empty_like(x).detach()) if not torch.is_grad_enabled() else x",
    "x = torch.set_grad_enabled(True) and x or x", "x.requires_grad_(False)",
    "x = x.resolve_conj()",
    "g = torch.autograd.grad(x.sum(), self.stem.weight, create_graph=True, allow_unused=True)[0]\n"
    "x = x if g is None else x + g.mean()",
)  # fmt: skip

# Values of earlier and of now meet: ``a`` and ``k`` are set at the top of every forward.
SAVES = some("a = x", "k = x", "a = x.detach()")
MEETS = some(
    "if a.shape == x.shape:\n    x = x + a", "if a.shape == x.shape:\n    x += a", "x = a + x",
    "if a.shape == x.shape:\n    x = torch.add(x, a, alpha=2)", "x, a = a, x", "a.add_(1)",
    "if k.shape == x.shape:\n    x = F.relu(x + k)", "if k.shape == x.shape:\n    x = x * k",
    "with torch.no_grad():\n    a.mul_(1.5)",
    "if not torch.is_grad_enabled():\n    k.data.mul_(1.5)", "del a\na = x", "k = k.detach()",
    "if a.shape == x.shape:\n    x = torch.cat([a, x], 1)[:, 2:6]", "x = x + k.mean()",
    "k[:, 0] = 1",
    "if a.shape == x.shape:\n    a.copy_(x.detach())", "a.detach().zero_()", "F.relu_(a)",
)  # fmt: skip

BLOCKS = (
    ("with torch.no_grad():", ""),
    ("with torch.inference_mode():", ""),
    ("with torch.enable_grad():", ""),
    ("with torch.autocast('cpu', torch.bfloat16):", ""),
    ("with torch.autocast('cpu', enabled=False):", ""),
    (
        "with torch.enable_grad() if self.training else torch.no_grad():",
        "",
    ),
    ("with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):", ""),
    ("with torch.random.fork_rng():", ""),
    ("for _ in range(2):", ""),
    ("if x.shape[2] > 2:", ""),
    ("if self.training:", ""),
    ("try:", "except (RuntimeError, ValueError) as e:\n    log(isinstance(e, RuntimeError))"),
    ("try:", "finally:\n    log('ends')"),
    ("def f@(x, a=x, k=x):", "x = checkpoint(f@, x, use_reentrant=False)"),
    ("def f@(x, a=x, k=x):", "x = checkpoint(f@, x, use_reentrant=True)"),
    ("def f@(x, a=x, k=x):", "x = in_thread(f@, x)"),
    ("def f@(x, a=x, k=x):", "x = f@(x) + f@(x)"),
)


def convolution(rng: random.Random, kinds: tuple[str, ...]) -> Statement:
    conv = rng.choice(kinds if rng.random() < 0.97 else OTHER)
    if rng.random() < 0.85:
        return one(conv)
    init, call = rng.choice(CALLS)
    return Statement(call, init.format(conv))


def between(rng: random.Random, odds: float) -> list[Statement]:
    found = []
    while rng.random() < odds:
        kinds = rng.choices((READS, CHANGES, SAVES, MEETS), (4, 4, 1, 1))[0]
        found.append(rng.choice(kinds))
        odds /= 2
    return found


def chain(rng: random.Random) -> list[Statement]:
    """Convolution, norm, activation, convolution and an ending, with something in between."""
    odds = rng.choice((0.0, 0.0, 0.2, 0.5))
    first, second = rng.choices(
        ((SPATIAL, TEMPORAL), (TEMPORAL, SPATIAL), (WHOLE, WHOLE), (SPATIAL, WHOLE)), (5, 2, 3, 1)
    )[0]
    parts = [*between(rng, odds), convolution(rng, first), *between(rng, odds)]
    if rng.random() < 0.1:
        return [rng.choice(CALLS_OF_TWO), *between(rng, odds)]
    if rng.random() < 0.6:
        parts += [rng.choice(NORMS[: rng.choice((4, len(NORMS)))]), *between(rng, odds)]
    if rng.random() < 0.7:
        parts += [rng.choice(ACTS[: rng.choice((11, len(ACTS)))]), *between(rng, odds)]
    parts += [convolution(rng, second), *between(rng, odds)]
    if rng.random() < 0.3:
        parts += [rng.choice(NORMS), *between(rng, odds)]
    if rng.random() < 0.4:
        parts.append(rng.choice((rng.choice(MEETS), rng.choice(ACTS))))
    return parts


def statements(rng: random.Random) -> list[Statement]:
    """The body of a forward."""
    body = [s for _ in range(rng.choice((1, 1, 2))) for s in chain(rng)]
    while rng.random() < 0.3:
        head, tail = rng.choice(BLOCKS)
        body.insert(rng.randrange(len(body)), Statement("", "", head, tail, rng.randint(1, 6)))
    return body
