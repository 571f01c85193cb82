"""Normalizing flows: an invertible network f makes noise of data, so log p(x) = log N(f(x)) + log |det df/dx|, exactly.

The weakness: every step must be invertible, with a determinant that costs little, so each step does little. The classical
answer is couplings, which leave half of the dimensions as they are and transform the other half by what the first half
says: adding (NICE), scaling too (RealNVP, Glow), or by a monotonic spline. The modern one is autoregressive: every number
is transformed as a causal transformer says that has seen those before it (TarFlow), with all its power in one direction; the
other direction, one position after another, is made fast by caches or by fixed-point (Jacobi) iteration.

Papers: NICE (Dinh 2015), RealNVP (Dinh 2017), Glow (Kingma and Dhariwal 2018), Flow++ (Ho 2019), neural spline flows (Durkan
2019), invertible backward (Gomez 2017), TarFlow (Zhai 2024), fixed-point inversion (Song 2021).
  change of variables ...................... log_likelihood          RealNVP eq. 2
  actnorm, 1x1 convolution, coupling ....... Step                    Glow table 1, eqs. 9 and 10
  squeeze, split, their priors ............. Glow                    RealNVP sec. 3.6
  variational dequantisation ............... Dequantizer             Flow++ eq. 12
  transformer flow, and its inverse ........ TarBlock                TarFlow eqs. 4 to 6
  denoising by the score ................... denoise                 TarFlow eq. 8
  memory that does not grow with depth ..... Recompute               Gomez sec. 3

  python flow.py                                                            # digits
  python flow.py --dataset mnist --minutes 10                               # MNIST on two CPU cores
  python flow.py --dataset mnist --arch glow --coupling spline --compare fashion_mnist --out runs/flow-glow
The second gives 1.09 bits/dim on two Zen 3 cores; Glow has 1.05 published. All results: docs/flow.md
"""

import copy
import math
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.coupling import affine_coupling, spline_coupling
except ImportError:
    def affine_coupling(x, params, mask_or_split, reverse=False, s_max=2.0):
        raw, shift = params.to(x.dtype).chunk(2, 1)
        log_s, kept = s_max * torch.tanh(raw / s_max), x[:, :0]
        if isinstance(mask_or_split, int):
            kept, x = x[:, :mask_or_split], x[:, mask_or_split:]
        else:
            log_s, shift = (a * (mask_or_split == 0) for a in (log_s, shift))
        y = (x - shift) * torch.exp(-log_s) if reverse else x * torch.exp(log_s) + shift
        return torch.cat([kept, y], 1), (-log_s if reverse else log_s).flatten(1).sum(1)

    def spline_coupling(x, params, tail_bound=3.0, reverse=False):  # Durkan 2019, eqs. 4 to 8
        p = params.to(x.dtype).unflatten(1, (x.shape[1], -1)).movedim(2, -1)  # (B, C, H, W, 3K - 1)
        K, m, T = (p.shape[-1] + 1) // 3, 1e-5, tail_bound
        w, h = (2 * T * (m + (1 - m * K) * torch.softmax(a, -1)) for a in (p[..., :K], p[..., K:2 * K]))
        xs, ys = (F.pad(torch.cumsum(a, -1), (1, 0)) - T for a in (w, h))
        d = m + F.softplus(F.pad(p[..., 2 * K:], (1, 1), value=math.log(math.expm1(1 - m))))
        inside, v = x.abs() < T, x.clamp(-T, T)[..., None]
        k = ((ys if reverse else xs)[..., 1:-1] <= v).sum(-1, keepdim=True)
        w, h, x0, y0, d0, d1 = (a.gather(-1, k + i)[..., 0] for a, i in ((w, 0), (h, 0), (xs, 0), (ys, 0), (d, 0), (d, 1)))
        v, s = v[..., 0], h / w
        if reverse:
            eta = ((v - y0) / h).clamp(0, 1)
            u, c, rest = d0 * (1 - eta) - d1 * eta, 2 * s * eta, 2 * s * (1 - eta)
            r = u.abs() + torch.sqrt(u**2 + c * rest)
            theta = torch.where(u < 0, r / (r + rest), c / (c + r))  # the root in two forms, so that nothing cancels
        else:
            theta = ((v - x0) / w).clamp(0, 1)
        t = theta * (1 - theta)
        D, M = s + (d0 + d1 - 2 * s) * t, d1 * theta**2 + 2 * s * t + d0 * (1 - theta) ** 2
        log_det = torch.where(inside, 2 * torch.log(s / D) + torch.log(M), 0).flatten(1).sum(1)
        y = theta * w + x0 if reverse else y0 + h * (s * theta**2 + d0 * t) / D
        return torch.where(inside, y, x), -log_det if reverse else log_det

try:
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
except ImportError:
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")

    def decode_attention(q, k_cache, v_cache, length):
        return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])


@dataclass
class Config:
    # the core, the same in all six scripts
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10 or a folder of images
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (>= 0)
    steps: int | None = None  # optimizer steps, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    batch_size: int = 16  # images a step, over all processes (> 0)
    lr: float = 2e-3  # learning rate of Adam (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    compile: bool = False  # torch.compile the network
    kernels: Literal["auto", "torch", "triton"] = "auto"  # fused kernels or plain PyTorch
    out: str | None = None  # run directory, runs/<script>-<dataset> where not given
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start anew in an --out that holds a run already
    num_samples: int = 80  # images to write to samples.npz (> 0)
    ema: float = 0.15  # share of the run so far over which the weights are averaged that are evaluated and sampled (> 0)
    log_every: int = 50  # steps between lines of metrics.jsonl (> 0)
    save_every: int = 1000  # steps between checkpoints and sample grids (> 0)
    # the model
    arch: Literal["tarflow", "glow"] = "tarflow"  # transformer autoregressive flow, or multi-scale couplings
    coupling: Literal["additive", "affine", "spline"] = "spline"  # what a coupling does (NICE, RealNVP, spline flow)
    scales: int = 0  # glow: how often the image is halved; 0: while both sides are even, once at least, 3 times at most (>= 0)
    depth: int = 0  # steps a scale of glow, blocks of tarflow; 0: 8 and 2 (>= 0)
    width: int = 0  # channels of the networks; 0: 64 for glow, 128 for tarflow (>= 0)
    bins: int = 8  # bins of a spline (> 0)
    patch: int = 0  # tarflow: pixels a side of a position; 0: what divides both sides, at most 2 below 16 pixels, else 4 (>= 0)
    layers: int = 2  # tarflow: transformer layers a block (> 0)
    n_head: int = 4  # tarflow: attention heads (> 0)
    dequantize: Literal["uniform", "variational"] = "uniform"  # noise that makes levels continuous: fixed, or learned
    noise: float = 0.0  # deviation of Gaussian noise added to training images of range [-1,1]; samples are then denoised (>= 0)
    labels: bool = True  # condition on the class; the test likelihood then is that of the exact mean over classes
    recompute: bool = False  # glow: keep no activations, backward computes them again from the output
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    decay: int = 2000  # steps after which the learning rate falls as 1 / sqrt(step) (> 0)
    # evaluation and sampling: free to change on a trained model
    inverse: Literal["cached", "jacobi"] = "cached"  # tarflow: one position at a time, or all until nothing changes
    temperature: float = 1.0  # of the noise that samples are made of, 0 gives the mode (>= 0)
    label: int | None = None  # sample this class only, else all in turn (>= 0)
    compare: str | None = None  # another data set, whose likelihoods are shown beside those of the test split


# ---- the model: f takes x (B,C,H,W) in [-1,1] and labels y (B,) to noise, a list of tensors, and log |det|, (B,)


def each(cfg):
    """Parameters of a transformed number."""
    return {"additive": 1, "affine": 2, "spline": 3 * cfg.bins - 1}[cfg.coupling]


def couple(kind, x, params, kept, reverse, s_max=2.0, bound=3.0):
    """All but the first `kept` channels of x (B,C,*) transformed by params (B,(C - kept)*each,*) -> y, log |det| (B,)."""
    if kind == "affine":
        return affine_coupling(x, params, kept, reverse, s_max)
    kept, x = x[:, :kept], x[:, kept:]
    if kind == "spline":
        x, log_det = spline_coupling(x, params, bound, reverse)
    else:
        x, log_det = x - params if reverse else x + params, 0
    return torch.cat([kept, x], 1), log_det


class TransformerBlock(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head, self.norm1, self.norm2 = n_head, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, attend):
        """x (B,T,C); attend(q, k, v) takes and gives (B,n_head,T,head_dim)."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        x = x + self.proj(attend(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """What transforms each number of a position: made of the position's features and, as in MADE, of the numbers before it
    in the position. h (B,T,width), x (B,T,D) -> (B,T,D,each)."""

    def __init__(self, width, D, each, hidden=32):
        super().__init__()
        self.from_h, self.from_x = nn.Linear(width, D * hidden), nn.Linear(D, D * hidden, bias=False)
        self.to_out, self.out = nn.Parameter(torch.zeros(D, hidden, each)), zero(nn.Linear(width, D * each))
        before = torch.arange(D).repeat_interleave(hidden)[:, None] > torch.arange(D)
        self.register_buffer("before", before.float(), persistent=False)

    def forward(self, h, x):
        D = x.shape[2]
        hidden = F.relu(self.from_h(h) + F.linear(x, self.from_x.weight * self.before)).unflatten(2, (D, -1))
        return self.out(h).unflatten(2, (D, -1)) + torch.einsum("btdi,dio->btdo", hidden, self.to_out)

    def next(self, h, x):
        """The same for the number that comes after x (B,T,d) alone, (B,T,1,each)."""
        d, (_, hidden, each) = x.shape[2], self.to_out.shape
        i, o = slice(d * hidden, (d + 1) * hidden), slice(d * each, (d + 1) * each)
        from_h = F.linear(h, self.from_h.weight[i], self.from_h.bias[i])
        hidden = F.relu(from_h + F.linear(x, self.from_x.weight[i, :d]))
        return (F.linear(h, self.out.weight[o], self.out.bias[o]) + hidden @ self.to_out[d])[:, :, None]


class TarBlock(nn.Module):
    """z_i = f(x_i; p_i), f a spline or, as in TarFlow, x_i exp(s_i) + m_i, where p_i is of the numbers before i: of earlier
    positions through a causal transformer, of those in i's own position through the head. x (B,T,D) -> the same."""

    def __init__(self, T, D, classes, cfg):
        super().__init__()
        w = cfg.width
        self.embed, self.start = nn.Linear(D, w), nn.Embedding(max(classes, 1), w)
        self.place = nn.Parameter(0.1 * torch.randn(T, w))
        self.layers = nn.ModuleList(TransformerBlock(w, cfg.n_head) for _ in range(cfg.layers))
        self.kind, self.norm, self.head = cfg.coupling, nn.LayerNorm(w), Head(w, D, each(cfg))

    def couple(self, x, params, reverse=False):
        """x (B,T,d), all numbers of each position or one of them, params (B,T,d,each)."""
        params = params.permute((0, 2, 3, 1) if self.kind == "spline" else (0, 3, 2, 1))  # (B,d,each,T) or (B,each,d,T)
        y, log_det = couple(self.kind, x.transpose(1, 2), params.flatten(1, 2), 0, reverse, s_max=4.0, bound=1.0)
        return y.transpose(1, 2), log_det

    def features(self, x, y):
        h = torch.cat([self.start(y)[:, None], self.embed(x[:, :-1])], 1) + self.place
        for layer in self.layers:
            h = layer(h, lambda q, k, v: attention(q, k, v, "causal"))
        return self.norm(h)

    def forward(self, x, y):
        return self.couple(x, self.head(self.features(x, y), x))

    def solve(self, z, h):
        """x from z, number by number, where h (B,T,width) are the features of x's positions."""
        x = z[:, :, :0]
        for number in z.split(1, 2):
            x = torch.cat([x, self.couple(number, self.head.next(h, x), reverse=True)[0]], 2)
        return x

    def inverse(self, z, y, how):
        """x from z, passes used. Fixed point: what lies behind a change is solved again, so n are right after n passes."""
        B, T, _ = z.shape
        if how == "jacobi":
            x, todo = z.clone(), torch.ones(B, T, dtype=torch.bool, device=z.device)
            for passes in count(1):
                left = todo.any(1)  # images
                h = self.features(x[left], y[left])[todo[left]]
                now, changed = self.solve(z[todo][:, None], h[:, None])[:, 0], torch.zeros_like(todo)
                changed[todo] = (now - x[todo]).abs().amax(1) >= 1e-5
                x[todo], todo = now, changed.cumsum(1) > changed
                if not todo.any():
                    return x, passes
        n_head, x, token = self.layers[0].n_head, torch.zeros_like(z), self.start(y)
        cache = [z.new_zeros(2, B, n_head, T, token.shape[1] // n_head) for _ in self.layers]
        for t in range(T):
            h = (token + self.place[t])[:, None]
            for layer, (keys, values) in zip(self.layers, cache, strict=True):
                def attend(q, k, v, keys=keys, values=values, t=t):
                    keys[:, :, t], values[:, :, t] = k[:, :, 0], v[:, :, 0]
                    return decode_attention(q, keys, values, t + 1)
                h = layer(h, attend)
            x[:, t:t + 1] = self.solve(z[:, t:t + 1], self.norm(h))
            token = self.embed(x[:, t])
        return x, T


class TarFlow(nn.Module):
    """Blocks over the numbers of the patches in raster order, and back to front in every second one."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.patch, self.size, D = cfg.patch, (H, W), channels * cfg.patch**2
        self.spline, T = cfg.coupling == "spline", H * W // cfg.patch**2
        self.scale = 1 / (1 + 8 * cfg.noise) if self.spline else 1.0  # splines transform [-1,1] alone
        self.blocks, self.noise_shapes = nn.ModuleList(TarBlock(T, D, classes, cfg) for _ in range(cfg.depth)), [(T, D)]

    def forward(self, x, y):
        z, total = self.scale * F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2), x[0].numel() * math.log(self.scale)
        for block in self.blocks:
            z, log_det = block(z, y)
            z, total = z.flip(1, 2), total + log_det
        if self.spline:
            z, log_det = to_normal(z)
            total = total + log_det
        return [z], total

    def inverse(self, eps, y, how):
        (x,), passes = eps, 0
        x = from_normal(x) if self.spline else x
        for block in reversed(self.blocks):
            x, used = block.inverse(x.flip(1, 2), y, how)
            passes += used
        H, W = self.size
        x = (x / self.scale).transpose(1, 2).unflatten(2, (H // self.patch, W // self.patch))
        return F.pixel_shuffle(x, self.patch), passes


class Flow(nn.Module):
    """f, and the noise that is added to 8-bit levels before it."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.f = (Glow if cfg.arch == "glow" else TarFlow)(channels, H, W, classes, cfg)
        self.dequantizer = Dequantizer(channels) if cfg.dequantize == "variational" else None


# ---- the maths


def log_normal(eps):
    """log N(eps; 0, 1) of a list of tensors, summed over all but the batch."""
    return sum(-0.5 * (e**2 + math.log(2 * math.pi)).flatten(1).sum(1) for e in eps)


def log_density(model, v, y):
    """log p(v), exactly, by change of variables. v (B,C,H,W) in [-1,1] -> (B,)."""
    eps, log_det = model.f(v, y)
    return log_normal(eps) + log_det


def dequantize(model, x, generator=None):
    """v = 2 (x + u) / 256 - 1 in [-1,1] for levels x (B,C,H,W) in {0..255}, and log q(u | x), (B,), of the noise u in [0,1)."""
    if model.dequantizer is None:
        u, log_q = torch.rand(x.shape, generator=generator).to(x.device), 0
    else:
        u, log_q = model.dequantizer(x / 127.5 - 1)
    return (x + u) / 128 - 1, log_q


def log_likelihood(model, v, log_q, y):
    """A bound on log P(x) for 8-bit x, tight where q is the true posterior: log p(x + u) - log q(u | x). (B,)"""
    return log_density(model, v, y) - v[0].numel() * math.log(128) - log_q


@torch.no_grad()
def sample(model, eps, y, cfg):
    """Noise (a list of tensors), standard normal, to images (B,C,H,W), about [-1,1]; passes of the network used."""
    return model.f.inverse([cfg.temperature * e for e in eps], y, cfg.inverse)


def denoise(model, v, y, sigma):
    """E[clean | v] of data to which noise was added, by the score of the density: v + sigma^2 d log p / dv (Tweedie)."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        (score,) = torch.autograd.grad(log_density(model, v, y).sum(), v)
    return v.detach() + sigma**2 * score


# ---- what tarflow with splines ends in: uniform numbers become normal ones


EDGE = 5.0  # deviations; from there on the curve is a straight line, so that it is one of all numbers to all


def to_normal(u):
    """Numbers (B,T,D) uniform in [-1,1] to standard normal ones, and log |det|."""
    edge = math.erf(EDGE / math.sqrt(2))
    inside = u.clamp(-edge, edge)
    z = math.sqrt(2) * torch.erfinv(inside)
    log_slope = 0.5 * math.log(math.pi / 2) + z**2 / 2
    return z + (u - inside) * torch.exp(log_slope), log_slope.flatten(1).sum(1)


def from_normal(z):
    inside = z.clamp(-EDGE, EDGE)
    return torch.erf(inside / math.sqrt(2)) + (z - inside) * math.sqrt(2 / math.pi) * math.exp(-EDGE**2 / 2)


# ---- noise that is learned


class Dequantizer(nn.Module):
    """Draws u ~ q(u | x) in (0,1): noise, four affine couplings over the black and the white squares in turn, a sigmoid."""

    def __init__(self, channels, width=32):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
            zero(nn.Conv2d(width, 2 * channels, 3, padding=1))) for _ in range(4))

    def forward(self, x):
        """x (B,C,H,W) in [-1,1] -> u of its shape, and log q(u | x), (B,)."""
        h = torch.randn_like(x)
        log_q = log_normal([h])
        black = (torch.arange(x.shape[2], device=x.device)[:, None] + torch.arange(x.shape[3], device=x.device)) % 2
        for i, net in enumerate(self.nets):
            mask = black if i % 2 else 1 - black  # where it is 1, h stays
            h, log_det = affine_coupling(h, net(torch.cat([x, h * mask], 1)), mask)
            log_q = log_q - log_det
        return torch.sigmoid(h), log_q - (F.logsigmoid(h) + F.logsigmoid(-h)).sum((1, 2, 3))


# ---- the classical flow: couplings at several scales


def zero(module):
    """Start a coupling, a split or a block as the identity, or with a spline near it."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Step(nn.Module):
    """A step of Glow: actnorm and invertible 1x1 convolution, as one convolution, then a coupling. (B,C,H,W) -> the same."""

    def __init__(self, channels, classes, cfg):
        super().__init__()
        C, w, kept = channels, cfg.width, channels // 2
        self.kept, self.kind = kept, cfg.coupling
        self.shift, self.log_scale = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))  # actnorm
        P, L, U = torch.linalg.lu(torch.linalg.qr(torch.randn(C, C))[0])  # W = P L (U + diag(s)), Glow eq. 10
        self.register_buffer("P", P)
        self.register_buffer("sign", U.diag().sign())
        self.L, self.U, self.log_s = nn.Parameter(L.tril(-1)), nn.Parameter(U.triu(1)), nn.Parameter(U.diag().abs().log())
        self.conv1, self.conv2 = nn.Conv2d(kept, w, 3, padding=1), nn.Conv2d(w, w, 1)
        self.conv3 = zero(nn.Conv2d(w, (C - kept) * each(cfg), 3, padding=1))
        self.label = nn.Embedding(max(classes, 1), w)

    def matrix(self):
        """W diag(exp(log_scale)), (C,C)."""
        L = self.L.tril(-1) + torch.eye(len(self.L), device=self.L.device, dtype=self.L.dtype)
        W = self.P @ L @ (self.U.triu(1) + torch.diag(self.sign * torch.exp(self.log_s)))
        return W * torch.exp(self.log_scale)

    def couple(self, x, y, reverse):
        h = self.conv1(x[:, :self.kept]).add_(self.label(y)[:, :, None, None]).relu_()
        return couple(self.kind, x, self.conv3(self.conv2(h).relu_()), self.kept, reverse)

    def forward(self, x, y):
        with torch.autocast(x.device.type, enabled=False):  # --amp is for the networks, not for what passes through
            W = self.matrix()
            x = F.conv2d(x, W[:, :, None, None], W @ self.shift)
        x, log_det = self.couple(x, y, False)
        return x, log_det + x[0, 0].numel() * (self.log_s.sum() + self.log_scale.sum())

    def inverse(self, z, y):
        z, W = self.couple(z, y, True)[0], self.matrix()
        return F.conv2d(z, torch.linalg.inv(W)[:, :, None, None], -self.shift)


def through(x, y, steps):
    total = x.new_zeros(len(x))
    for step in steps:
        x, log_det = step(x, y)
        total = total + log_det
    return x, total


class Recompute(torch.autograd.Function):
    """Steps of which only the output is kept: backward inverts them one by one, and repeats each with gradients."""

    @staticmethod
    def forward(ctx, x, y, steps, *parameters):
        x, total = through(x, y, steps)
        ctx.steps = steps
        ctx.save_for_backward(x, y)
        return x, total

    @staticmethod
    def backward(ctx, dx, d_total):
        (x, y), grads = ctx.saved_tensors, []
        for step in reversed(ctx.steps):
            with torch.no_grad():
                x = step.inverse(x, y)
            with torch.enable_grad():
                before = x.detach().requires_grad_()
                after, log_det = step(before, y)
                log_det = log_det.expand(len(x))
            outs = torch.autograd.grad((after, log_det), (before, *step.parameters()), (dx, d_total))
            dx, grads = outs[0], [*outs[1:], *grads]
        return dx, None, None, *grads


class Gaussian(nn.Module):
    """What leaves the flow, (B,C,H,W), made standard noise by a mean and scale from what stays, or that are learned."""

    def __init__(self, channels, seen, classes):
        super().__init__()
        self.conv = zero(nn.Conv2d(seen, 2 * channels, 3, padding=1)) if seen else None
        self.label = zero(nn.Embedding(max(classes, 1), 2 * channels))

    def forward(self, z, seen, y, reverse=False):
        params = self.label(y)[:, :, None, None].expand(-1, -1, *z.shape[2:])
        return affine_coupling(z, params if seen is None else params + self.conv(seen), 0, reverse, s_max=6.0)

    def inverse(self, eps, seen, y):
        return self(eps, seen, y, True)[0]


class Glow(nn.Module):
    """At each scale squeeze, steps, split: half of the channels leave as noise. A last odd row or column leaves before the
    squeeze, under a Gaussian of its own, so that the density is that of the image, of whatever size."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.recompute, self.scales, C = cfg.recompute, nn.ModuleList(), channels
        self.noise_shapes = []
        for i in range(cfg.scales):
            scale = nn.ModuleDict({"row": Gaussian(C, 0, classes), "column": Gaussian(C, 0, classes)})
            self.noise_shapes += [(C, H % 2, W), (C, H - H % 2, W % 2)]
            C, H, W = 4 * C, H // 2, W // 2
            scale["steps"] = nn.ModuleList(Step(C, classes, cfg) for _ in range(cfg.depth))
            if i < cfg.scales - 1:
                scale["split"] = Gaussian(C // 2, C // 2, classes)
                self.noise_shapes.append((C // 2, H, W))
                C //= 2
            self.scales.append(scale)
        self.last = Gaussian(C, 0, classes)
        self.noise_shapes.append((C, H, W))

    def forward(self, x, y):
        eps, total = [], 0
        for scale in self.scales:
            H, W = (n - n % 2 for n in x.shape[2:])
            for name, edge in (("row", x[:, :, H:]), ("column", x[:, :, :H, W:])):
                e, log_det = scale[name](edge, None, y)
                eps, total = [*eps, e], total + log_det
            x = F.pixel_unshuffle(x[:, :, :H, :W], 2)
            steps = scale["steps"]
            recompute = self.recompute and torch.is_grad_enabled() and steps[0].L.requires_grad
            x, log_det = Recompute.apply(x, y, steps, *steps.parameters()) if recompute else through(x, y, steps)
            total = total + log_det
            if "split" in scale:
                x, z = x.chunk(2, 1)
                e, log_det = scale["split"](z, x, y)
                eps, total = [*eps, e], total + log_det
        e, log_det = self.last(x, None, y)
        return [*eps, e], total + log_det

    def inverse(self, eps, y, how):
        eps = list(eps)
        x = self.last.inverse(eps.pop(), None, y)
        for scale in reversed(self.scales):
            if "split" in scale:
                x = torch.cat([x, scale["split"].inverse(eps.pop(), x, y)], 1)
            for step in reversed(scale["steps"]):
                x = step.inverse(x, y)
            column, row = (scale[name].inverse(eps.pop(), None, y) for name in ("column", "row"))
            x = torch.cat([torch.cat([F.pixel_shuffle(x, 2), column], 3), row], 2)
        return x, 1


@torch.no_grad()
def initialise(model, v, y):
    """Actnorm from data (Glow sec. 3.1): each channel after it has mean 0 and variance 1 on v, once, before training."""
    def hook(step, args):
        x = args[0]
        step.log_scale.copy_(-torch.log(x.std((0, 2, 3), correction=0).clamp(min=1e-3)))
        step.shift.copy_(-x.mean((0, 2, 3)))

    hooks = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, Step)]
    model.f(v, y)
    for h in hooks:
        h.remove()


# ---- the loops

# What may differ from the checkpoint when it is resumed, evaluated or sampled from; the rest is the run's own.
FREE = """mode data_dir steps minutes device amp compile kernels out resume overwrite num_samples log_every save_every
    recompute inverse temperature label compare""".split()


def choose(cfg, H, W):
    """cfg, with what the size of the images and the architecture decide where nothing was said."""
    glow, most = cfg.arch == "glow", 2 if min(H, W) < 16 else 4
    cfg.width, cfg.depth = cfg.width or (64 if glow else 128), cfg.depth or (8 if glow else 2)
    cfg.patch = cfg.patch or max(p for p in range(1, most + 1) if H % p == W % p == 0)
    cfg.scales = cfg.scales or max(math.gcd(H, W, 8).bit_length() - 1, int(min(H, W) > 1))
    if not glow and (H % cfg.patch or W % cfg.patch):
        raise ValueError(f"--patch {cfg.patch}: does not divide {H} x {W} pixels")
    if glow and min(H, W) < 2**cfg.scales:
        raise ValueError(f"--scales {cfg.scales}: {H} x {W} pixels cannot be halved so often")
    if cfg.recompute and cfg.amp != "off":
        raise ValueError(f"--recompute: not with --amp {cfg.amp}, in which a step's inverse does not give back its input")
    if not glow and cfg.width % cfg.n_head:
        raise ValueError(f"--n-head {cfg.n_head}: does not divide --width {cfg.width}")
    return cfg


def to_uint8(v):
    return ((v + 1) * 128).floor().clamp(0, 255).byte().cpu()


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights with the power profile of Karras et al. 2024, eq. 127, whose width grows with the run."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(model, ema, data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, (0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    run.begin(parts)
    objective = torch.compile(log_likelihood) if cfg.compile else log_likelihood
    model.train()
    dims = data.train[0].numel()
    for step in run.steps():
        x, y = run.batch(data)
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        with run.autocast():
            v, log_q = dequantize(model, x)
            loss = -objective(model, v + cfg.noise * torch.randn_like(v), log_q, y).mean() / dims
        norm = run.update(loss, model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        run.log(loss=loss, bpd=loss / math.log(2), grad_norm=norm, lr=lr)
        if run.step % cfg.save_every == 0:
            run.save(parts)
            run.show(generate(ema, 80, data.classes, cfg, run)[0])
    run.save(parts)
    run.check()


@torch.no_grad()
def bits_per_dim(model, images, classes, cfg, run):
    """A bound on -log2 P(x) / dims of each image, one draw of the noise; with labels P(x) = sum_y P(y) P(x | y)."""
    generator, bits = torch.Generator().manual_seed(cfg.seed), []
    torch.manual_seed(cfg.seed)
    for x in images.split(at_once(images.shape[1:])):
        v, log_q = dequantize(model, x.to(run.device), generator)
        v, logs = v + cfg.noise * torch.randn_like(v), []
        for label in range(max(classes, 1)):
            run.check()
            y = torch.full((len(x),), label, device=run.device)
            logs.append(log_likelihood(model, v, log_q, y).cpu().double())
        bits.append((math.log(len(logs)) - torch.logsumexp(torch.stack(logs), 0)) / x[0].numel() / math.log(2))
    return torch.cat(bits)


def evaluate(ema, data, other, cfg, run):
    """Bits per dimension of the whole test split; of other images too, and likelihoods.png, where --compare names a set.

    Those of each image go to likelihoods.npz, as test and compare.
    """
    bits = {cfg.dataset: bits_per_dim(ema, data.test, data.classes, cfg, run)}
    metrics = {"test_bpd": bits[cfg.dataset].mean().item()}
    if other is not None:
        bits[cfg.compare] = bits_per_dim(ema, other, data.classes, cfg, run)
        metrics["compare_bpd"] = bits[cfg.compare].mean().item()
        show_likelihoods(bits, run.out / "likelihoods.png")
    arrays = {name: v.numpy() for name, v in zip(("test", "compare"), bits.values(), strict=False)}
    write(run.out / "likelihoods.npz", lambda f: np.savez_compressed(f, **arrays))
    return metrics


def show_likelihoods(bits, path):
    """A histogram of the bits/dim of the images of each data set."""
    from matplotlib.figure import Figure

    figure = Figure((6, 3), layout="tight")
    axis = figure.add_subplot(xlabel="bits/dim", ylabel="share of test images")
    edges = np.histogram_bin_edges(torch.cat(list(bits.values())), 80)
    for name, values in bits.items():
        axis.hist(values, edges, weights=np.full(len(values), 1 / len(values)), alpha=0.6, label=name)
    axis.legend()
    write(path, lambda f: figure.savefig(f, format="png"))


@torch.no_grad()
def generate(ema, n, classes, cfg, run):
    """n images (n,C,H,W) uint8, labels (n,) and the passes used, from the averaged weights and the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.arange(n) % max(classes, 1) if cfg.label is None else torch.full((n,), cfg.label)
    images, passes = [], 0
    for y in labels.split(at_once(run.facts["shape"])):
        run.check()
        eps = [torch.randn(len(y), *s, generator=generator).to(run.device) for s in ema.f.noise_shapes]
        v, used = sample(ema, eps, y.to(run.device), cfg)
        images.append(to_uint8(denoise(ema, v, y.to(run.device), cfg.noise) if cfg.noise else v))
        passes = max(passes, used)
    return torch.cat(images), labels, passes


@torch.no_grad()
def show_interpolations(ema, data, cfg, run):
    """interpolations.png: a row a pair of test images, on a line between their noise under the first one's label."""
    y = data.test_labels[:10].to(run.device)
    v, _ = dequantize(ema, data.test[:10].to(run.device), torch.Generator().manual_seed(cfg.seed))
    (a, _), (b, _) = ema.f(v, y), ema.f(v.roll(1, 0), y)
    lines = ([torch.lerp(*ends, w) for ends in zip(a, b, strict=True)] for w in np.linspace(0, 1, 10).tolist())
    rows = torch.stack([ema.f.inverse(line, y, cfg.inverse)[0] for line in lines], 1)
    save_grid(to_uint8(rows.flatten(0, 1)), run.out / "interpolations.png", 10)


# ======== plumbing, byte-identical in all six scripts (python tools/sync.py): nothing about the model is in it ========

import argparse
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import inspect
import io
import json
import os
import re
import signal
import sys
import tarfile
import time
import urllib.request
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn, get_args, get_origin

import torch.distributed as dist
from PIL import ImageOps
from tqdm import tqdm

MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
SHA256 = {  # of the decompressed files, of the archive itself for cifar10
    "mnist": {"train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
              "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
              "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
    "fashion_mnist": {"train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                      "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                      "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                      "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"},
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
}
TIMEOUT = 20  # seconds a mirror may stay silent


class Data(NamedTuple):
    """Images (N,C,H,W) uint8 and labels (N,) int64, which are all 0 where there are no classes."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: int  # 0 where there are no labels


def at_once(shape, values=3072):
    """Images (C,H,W) to evaluate or sample at once, whatever --batch-size is: 250, fewer where they have more values."""
    return max(min(250, 250 * values // math.prod(shape)), 1)


def fail(message, code=2) -> NoReturn:
    print("error:", *message.split(), file=sys.stderr)  # one line, whatever an exception's text holds
    raise SystemExit(code)


def fetch(name, file, data_dir):
    """The content of one file of a data set, checked by SHA-256: from --data-dir, Debian's folder or the first good mirror."""
    folder, packed, tried = Path(data_dir) / name, file if file.endswith(".tar.gz") else f"{file}.gz", []
    folders = [folder] + [Path("/usr/share/datasets/fashion-mnist")] * (name == "fashion_mnist")
    places = [place / f for place in folders for f in dict.fromkeys((packed, file)) if (place / f).exists()]
    for source in [*places, *(mirror + packed for mirror in MIRRORS[name])]:
        try:
            if source in places:
                raw = source.read_bytes()
            else:
                with (urllib.request.urlopen(source, timeout=TIMEOUT) as response,
                      tqdm.wrapattr(response, "read", response.length, desc=packed, disable=None) as stream):
                    raw = b"".join(iter(lambda: stream.read(1 << 16), b""))
            content = gzip.decompress(raw) if str(source).endswith(f"{file}.gz") else raw
            if hashlib.sha256(content).hexdigest() != SHA256[name][file]:
                raise ValueError("wrong SHA-256")
            if source not in places:
                write(folder / packed, lambda f, raw=raw: f.write(raw))
            return content
        except Exception as e:  # whatever a mirror sends, or a disk holds: the next may be good
            tried.append(f"{source} ({e or type(e).__name__})")
    fail(f"no good copy of {folder / packed}: tried {', '.join(tried)}; put it there, or use --dataset digits (no network)", 1)


def load_folder(root, size):
    """A folder of images, else its subfolders as classes; every tenth image by name is held out as the test split.

    Grey only where all are grey, else RGB; transparency is laid over white. Each image is scaled to cover size x size, or
    the commonest size where size is 0, and cropped at the centre. What cannot be read is named and skipped.
    """
    known, images, broken = Image.registered_extensions(), {}, []
    for path in sorted(p for p in (*root.glob("*"), *root.glob("*/*")) if p.suffix.lower() in known and p.is_file()):
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits a pixel
                    image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
                if "A" in image.getbands() or "transparency" in image.info:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                image = image.convert("L" if image.mode in ("1", "L") else "RGB")
                images[path] = ImageOps.fit(image, (size, size)) if size else image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            broken.append(f"{path} ({e})")
    if broken:
        print(f"skipped {len(broken)} broken images: {'; '.join(broken)}", file=sys.stderr)
    if len(images) < 2:
        fail(f"--dataset {root}: {len(images)} readable images in it or in its subfolders, at least 2 are needed")
    folders = sorted({path.parent for path in images})
    if root in folders[:-1]:
        fail(f"--dataset {root}: holds images as well as subfolders of images; move either away")
    target = collections.Counter(image.size for image in images.values()).most_common(1)[0][0]
    mode = "L" if all(image.mode == "L" for image in images.values()) else "RGB"
    x = np.stack([np.atleast_3d(np.asarray(ImageOps.fit(image.convert(mode), target))) for image in images.values()])
    x, held = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.arange(len(x)) % 10 == 1
    y = torch.tensor([folders.index(path.parent) for path in images])
    mixed = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # so that the first n are of all classes
    x, y, held = x[mixed], y[mixed], held[mixed]
    return Data(x[~held], y[~held], x[held], y[held], 0 if root in folders else len(folders))


def load_data(name, data_dir, image_size=0) -> Data:
    """digits, mnist, fashion_mnist, cifar10 or a folder of images, whole in memory."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits, order = load_digits(), np.random.RandomState(0).permutation(1797)
        x, y = np.round(digits.images[order, None] * 255 / 16).astype(np.uint8), digits.target[order]
        parts = x[297:], y[297:], x[:297], y[:297]
    elif name in ("mnist", "fashion_mnist"):
        raw = [np.frombuffer(fetch(name, file, data_dir), np.uint8) for file in SHA256[name]]
        parts = [r[8:] if i % 2 else r[16:].reshape(-1, 1, 28, 28) for i, r in enumerate(raw)]
    elif name == "cifar10":
        archive = tarfile.open(fileobj=io.BytesIO(fetch(name, "cifar-10-binary.tar.gz", data_dir)))
        files = sorted(f for f in archive.getnames() if f.endswith(".bin"))  # data_batch_1 to 5, test_batch
        rows = np.frombuffer(b"".join(archive.extractfile(f).read() for f in files), np.uint8).reshape(-1, 3073)
        x, y = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
        parts = x[:50_000], y[:50_000], x[50_000:], y[50_000:]
    elif Path(name).is_dir():
        return load_folder(Path(name), image_size)
    else:
        fail(f"--dataset {name}: neither digits, mnist, fashion_mnist nor cifar10, nor a folder")
    x, y, x_test, y_test = (torch.tensor(p) for p in parts)
    if image_size and x.shape[-2:] != (image_size, image_size):
        x, x_test = (F.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True) for part in (x, x_test))
    return Data(x, y.long(), x_test, y_test.long(), 10)


def parse_args(config_class, argv=None):
    """The command line built from the dataclass: a flag a field, its comment as help -> the config, the names given.

    A bound in the comment, (> 0), (>= 0) or (0 to 1), is checked. Whatever is wrong is one line and exit code 2.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    for field in dataclasses.fields(config_class):
        kind, origin = (*get_args(field.type), field.type)[0], get_origin(field.type)
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"choices": get_args(field.type)} if origin is Literal else
                   {"type": kind, "metavar": kind.__name__, "nargs": "+" if origin is tuple else None})
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        if bound := re.search(r"\((>=?)? ?([\d.]+)(?: to ([\d.]+))?\)", comments[name]):
            sign, low, high = bound[1], float(bound[2]), float(bound[3] or sys.float_info.max)
            for v in value if isinstance(value, tuple) else (value,):
                if not low <= v <= high or sign == ">" and v == low:
                    parser.error(f"argument --{name.replace('_', '-')}: {v}: must be {bound[0][1:-1]}")
    return config_class(**given), set(given)


def set_up(cfg):
    """The device, this process's rank and the number of processes (torchrun's); kernels.mode from --kernels."""
    rank, local, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    kind = there[0] if cfg.device == "auto" else cfg.device
    if kind not in there:
        fail(f"--device {kind}: not available here, there is {', '.join(there)}")
    if cfg.batch_size % world:
        fail(f"--batch-size {cfg.batch_size}: cannot be split over {world} processes")
    mode = os.environ.get("M2_KERNELS", "auto") if cfg.kernels == "auto" else cfg.kernels
    try:
        import kernels
        runs, why = kernels.available(kind)  # PyPI's unrelated package of this name has none
        kernels.mode = mode
    except (ImportError, AttributeError):
        runs, why = False, "the folder kernels/ is not beside this script"
    if mode not in ("auto", "torch", "triton") or mode == "triton" and not runs:
        fail(f"--kernels {mode}: {why if mode == 'triton' else 'M2_KERNELS must be auto, torch or triton'}")
    if world > 1 and not dist.is_initialized():
        torch.cuda.set_device(local) if kind == "cuda" else None
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(f"cuda:{local}" if kind == "cuda" else kind), rank, world


def write(path, save):
    """save(file) under a temporary name, flushed to disk, then renamed: at any moment path is whole, old or new."""
    part = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror or e}", 1)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_grid(images, path, columns):
    """Images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged."""
    rows = F.pad(images.cpu(), (1, 1, 1, 1, 0, 0, 0, -len(images) % columns)).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)  # (rows*(H+2), columns*(W+2)[, C])
    image = ImageOps.scale(Image.fromarray(grid.numpy()), max(1, 56 // max(images.shape[2:])), Image.NEAREST)
    write(path, lambda f: image.save(f, "png"))


@lru_cache(maxsize=4)
def shuffle(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class Run:
    """One run: its directory, checkpoint, log, progress bar, budget and stop signals. Only rank 0 writes.

    Everything random in a step follows from (seed, step, rank), so that the step stands for all states of generators.
    """

    def __init__(self, cfg, given, free):
        self.cfg, self.script, self.signal, self.saved = cfg, Path(__file__).stem, 0, {}
        cfg.out = cfg.out or f"runs/{self.script}-{Path(cfg.dataset).name}"
        self.out, self.path, self.metrics = Path(cfg.out), Path(cfg.out) / "checkpoint.pt", Path(cfg.out) / "metrics.jsonl"
        if cfg.resume or cfg.mode != "train":
            self.load()
            given = given | {"mode", "out", "resume", "overwrite"}
            given |= {"steps", "minutes"} if {"steps", "minutes"} & given else set()
            for name, value in self.saved["config"].items():
                if name not in given:
                    setattr(cfg, name, value)
                elif name not in free and getattr(cfg, name) != value:
                    fail(f"--{name.replace('_', '-')} {getattr(cfg, name)}: the run in {self.path} has {value}")
        elif self.out.is_dir() and any(self.out.iterdir()) and not cfg.overwrite:
            fail(f"--out {self.out}: is not empty; --resume continues a run, --overwrite replaces it")
        self.step, self.seconds, self.facts = (self.saved.get(name, 0) for name in ("step", "seconds", "facts"))
        self.device, self.rank, self.world = set_up(cfg)
        self.scaler, self.sums = torch.amp.GradScaler(self.device.type, enabled=cfg.amp == "fp16"), collections.Counter()
        dtype = torch.float16 if cfg.amp == "fp16" else torch.bfloat16
        self.autocast = partial(torch.autocast, self.device.type, dtype, enabled=cfg.amp != "off")

    def load(self):
        try:
            saved = self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            fail(f"--out {self.out}: there is no checkpoint.pt in it")
        except Exception as e:  # whatever a damaged or hostile file raises: nothing in it is run
            fail(f"{self.path}: not a whole checkpoint ({(str(e) or type(e).__name__).splitlines()[0][:80]})")
        if not isinstance(saved, dict) or saved.get("format") != 1 or not {"script", "config", "step", "facts"} <= saved.keys():
            fail(f"{self.path}: not a checkpoint of a run in format 1 (weights alone, or another version)")
        if saved["script"] != self.script:
            fail(f"{self.path}: is a checkpoint of {saved['script']}.py, not of {self.script}.py")
        if fields := saved["config"].keys() ^ {f.name for f in dataclasses.fields(self.cfg)}:
            fail(f"{self.path}: of another version, whose config differs in {', '.join(sorted(fields))}")

    def describe(self, data):
        """Note what the data is; a checkpoint of other data is refused."""
        self.facts = {"shape": list(data.train.shape[1:]), "classes": data.classes, "train_images": len(data.train)}
        if self.saved and self.saved["facts"] != self.facts:
            fail(f"--dataset {self.cfg.dataset}: is {self.facts}, the run in {self.path} had {self.saved['facts']}")

    def restore(self, parts):
        """Load each named part from the checkpoint, if there is one, and from now on catch stop signals."""
        for name, part in parts.items() if self.saved else ():
            if name not in self.saved:
                fail(f"{self.path}: holds no {name}")
            part.load_state_dict(self.saved[name])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def begin(self, parts):
        """Restore, lay out the directory and save once: what cannot be written is found before any training."""
        self.restore(parts | {"scaler": self.scaler})
        if self.rank == 0:
            lines = [m for m in self.read_metrics() if m["step"] <= self.step and "final" not in m] if self.saved else []
            for old in () if self.saved else self.out.glob("samples/step_*.png"):
                old.unlink()
            write(self.metrics, lambda f: f.write("".join(json.dumps(m) + "\n" for m in lines).encode()))
            write(self.out / "config.json", lambda f: f.write(json.dumps(dataclasses.asdict(self.cfg), indent=1).encode()))
        self.save(parts)

    def save(self, parts):
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in (parts | {"scaler": self.scaler}).items()}
            state |= {"format": 1, "script": self.script, "config": dataclasses.asdict(self.cfg), "facts": self.facts,
                      "step": self.step, "seconds": self.seconds}
            torch.save(state, buffer := io.BytesIO())
            write(self.path, lambda f: f.write(buffer.getbuffer()))

    def on_signal(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def check(self):
        """Exit if a stop signal has come; called between the batches of evaluation and sampling."""
        if self.signal:
            fail(f"stopped by {signal.Signals(self.signal).name}; --resume continues {self.out}", 128 + self.signal)

    def steps(self):
        """Yield step after step until --steps, --minutes or a stop signal; self.step counts the one under way as done."""
        start, minutes, steps = time.monotonic() - self.seconds, self.cfg.minutes or math.inf, self.cfg.steps or math.inf
        form = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
        with tqdm(total=100, disable=self.rank > 0 or None, desc=self.script, bar_format=form) as self.bar:
            while True:
                self.seconds = time.monotonic() - start
                if self.world > 1:  # all processes stop at the same step
                    state = torch.tensor([self.seconds, self.signal], device=self.device)
                    dist.all_reduce(state, dist.ReduceOp.MAX)
                    self.seconds, self.signal = state[0].item(), int(state[1])
                progress = max(self.step / steps, self.seconds / (60 * minutes))
                self.bar.update(100 * min(progress, 1) - self.bar.n)
                if self.signal or progress >= 1:
                    return
                torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, self.step, self.rank]).generate_state(1)[0]))
                self.step += 1
                yield self.step - 1

    def batch(self, data):
        """This process's share of the step's images and labels: the next of an endless row of shuffles of the data."""
        n, B = len(data.train), self.cfg.batch_size
        at = torch.arange(self.rank, B, self.world) + (self.step - 1) * B
        index = torch.cat([shuffle(n, self.cfg.seed, e)[at[at // n == e] % n] for e in (at // n).unique().tolist()])
        return data.train[index].to(self.device), data.train_labels[index].to(self.device)

    def update(self, loss, model, optimizer, rate="--lr", max_norm=1.0):
        """Backward, mean over processes, clip, optimizer step. A loss or gradient that is not finite ends the run."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if self.world > 1:  # one flat all-reduce
            flat = torch.cat([grad.flatten() for grad in grads.values()])
            dist.all_reduce(flat)
            for grad, mean in zip(grads.values(), flat.split([g.numel() for g in grads.values()]), strict=True):
                grad.copy_(mean.view_as(grad) / self.world)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(grads.values())
        if not loss.isfinite() or not norm.isfinite() and self.scaler.get_scale() <= 1:  # fp16 first tries smaller scales
            bad = next((name for name, grad in grads.items() if not grad.isfinite().all()), "none")
            fail(f"step {self.step}: loss {loss.item()}, first bad gradient that of {bad}; {self.path} is the last good "
                 f"checkpoint, a smaller {rate} may help", 1)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def log(self, **metrics):
        """Average metrics, the loss among them, into a line of metrics.jsonl every --log-every steps."""
        self.sums.update({name: torch.as_tensor(value).detach() for name, value in metrics.items()} | {"count": 1})
        if self.step % self.cfg.log_every == 0:
            means = {name: float(total) / self.sums["count"] for name, total in self.sums.items() if name != "count"}
            self.sums.clear()
            self.write_metrics(**means)
            self.bar.set_postfix_str(f"step {self.step} loss {means['loss']:.4f} {self.step / self.seconds:.1f} steps/s")

    def read_metrics(self):
        """The lines of metrics.jsonl but those that a crash or a full disk cut short."""
        lines = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else ():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def write_metrics(self, **metrics):
        if self.rank == 0:
            try:
                with open(self.metrics, "a") as f:
                    f.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 3)} | metrics) + "\n")
            except OSError as e:
                fail(f"cannot write {self.metrics}: {e.strerror or e}", 1)

    def show(self, images):
        """The newest grid: samples.png, and samples/ under its step."""
        for name in (f"samples/step_{self.step:06d}.png", "samples.png") if self.rank == 0 else ():
            save_grid(images, self.out / name, 10)

    def curves(self):
        """Every metric against the step, as curves.png."""
        if self.rank == 0:
            from matplotlib.figure import Figure

            lines = self.read_metrics()
            names = [name for name in dict.fromkeys(n for line in lines for n in line) if name not in ("step", "seconds")]
            figure = Figure((4 * max(len(names), 1), 3), layout="tight")
            for i, name in enumerate(names):
                axis = figure.add_subplot(1, len(names), i + 1, title=name, xlabel="step")
                axis.plot([line["step"] for line in lines if name in line], [line[name] for line in lines if name in line])
            write(self.out / "curves.png", lambda f: figure.savefig(f, format="png"))


def launch(main):
    """main(), with what the machine refuses (files, memory, kernels) said in one line."""
    try:
        main()
    except OSError as e:
        fail(f"{e.filename or Path(__file__).stem}: {e.strerror or e}", 1)
    except (MemoryError, RuntimeError) as e:
        if "kernels.mode is 'triton'" in str(e):
            fail(f"--kernels triton: {e}")
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        fail(f"out of memory, a smaller --batch-size or --width helps ({(str(e) or 'no more').splitlines()[0]})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ======== end of the plumbing ========================================================================================


def main(argv=None):
    cfg, given = parse_args(Config, argv)
    if cfg.steps is None and cfg.minutes is None:
        cfg.steps = 2000
    run = Run(cfg, given, FREE)
    if cfg.mode != "sample":
        data = load_data(cfg.dataset, cfg.data_dir, cfg.image_size)
        if not cfg.labels:
            data = data._replace(train_labels=0 * data.train_labels, test_labels=0 * data.test_labels, classes=0)
        run.describe(data)
        other = load_data(cfg.compare, cfg.data_dir, cfg.image_size).test if cfg.compare else None
        if other is not None and other.shape[1:] != data.test.shape[1:]:
            fail(f"--compare {cfg.compare}: images of {list(other.shape[1:])}, not {list(data.test.shape[1:])}")
    (C, H, W), classes = run.facts["shape"], run.facts["classes"]
    if cfg.label is not None and cfg.label >= classes:
        fail(f"--label {cfg.label}: the model knows {classes} classes")
    torch.manual_seed(cfg.seed)
    try:
        model = Flow(C, H, W, classes, choose(cfg, H, W))
    except ValueError as e:
        fail(str(e))
    model = model.to(run.device, memory_format=torch.channels_last)
    if cfg.mode == "train" and not run.saved:
        x, y = (part[:256].to(run.device) for part in (data.train, data.train_labels))
        initialise(model, dequantize(model, x)[0], y)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if cfg.mode == "train":
        train(model, ema, data, cfg, run)
        run.curves()
    else:
        run.restore({"ema": ema})
    if run.rank > 0:
        return
    if cfg.mode != "sample":
        metrics = evaluate(ema, data, other, cfg, run)
        run.write_metrics(final=True, **metrics)
        bound = f"upper bound, {cfg.dequantize} dequantisation, one draw an image"
        bound += f", noise of {cfg.noise} added" * (cfg.noise > 0)
        print(f"test bits/dim {metrics['test_bpd']:.4f} ({bound}; all {len(data.test)} test images"
              f"{', the mean of p(x | y) over the classes' * (classes > 0)})")
        show_interpolations(ema, data, cfg, run)
    if cfg.mode != "eval":
        start = time.monotonic()
        images, labels, passes = generate(ema, cfg.num_samples, classes, cfg, run)
        seconds = time.monotonic() - start
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": labels.numpy()} if classes else {})
        write(run.out / "samples.npz", lambda f: np.savez_compressed(f, **arrays))
        save_grid(images[:80], run.out / "samples.png", 10)
        print(f"{len(images)} samples in {seconds:.2f} s ({passes} passes), in {run.out / 'samples.npz'}, the first in "
              f"{run.out / 'samples.png'}")
    run.check()


if __name__ == "__main__":
    launch(main)
