"""Autoregressive models: p(x) = prod_i p(x_i | x_1 ... x_i-1), the likelihood exact, each factor a small softmax or mixture.

The weakness: a sample takes one pass of the network a pixel, and there are many pixels. The remedies shown here: caches, so
that a pixel costs a pixel's work and not an image's; and fixed-point (Jacobi) sampling, which guesses all pixels at once and
repeats until nothing changes. Both draw exactly the sample that the slow way draws from the same noise. Besides, a position
may be a patch of patch x patch pixels, which a small head models one after the other: the likelihood stays exact.

Papers: MADE (Germain 2015), PixelCNN (van den Oord 2016a), gated PixelCNN (van den Oord 2016b), PixelCNN++ (Salimans 2017),
decoder-only transformers on pixels (Child 2019), caches (Ramachandran 2017), fixed-point sampling (Song 2021).
  chain rule, its exact value .............. log_likelihood         PixelCNN eq. 1
  vertical and horizontal stack, gate ...... GatedPixelCNN          gated PixelCNN eq. 2, fig. 2
  masked convolution and its blind spot .... MaskedPixelCNN         PixelCNN fig. 2, gated PixelCNN fig. 1
  masks of a multilayer perceptron ......... MADE                   MADE eq. 8 and 9
  pixels of a patch, channels of a pixel ... Head                   PixelCNN eq. 2
  mixture of logistics ..................... logistic_mixture       PixelCNN++ eqs. 1 and 2
  naive, cached, fixed-point sampling ...... sample                 Song 2021 alg. 1

  python autoregressive.py                                              # digits
  python autoregressive.py --dataset mnist --minutes 10                 # MNIST, dynamically binarised, on two CPU cores
  python autoregressive.py --dataset mnist --mode sample --sampler jacobi --complete top
The second gives 80.0 nats on two Zen 5 cores; pytorch-generative's gated PixelCNN has 81.5. All: docs/autoregressive.md
"""

import copy
import math
from dataclasses import dataclass
from itertools import count, product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.masked_conv import gated_masked_conv2d, masked_conv2d
except ImportError:
    def masked_conv2d(x, weight, bias, mask_type):
        rows, columns = weight.shape[2:]  # the live rows alone: those above, and of the middle one what is on the left
        live = weight[:, :, :rows // 2 + 1].clone()
        live[:, :, -1, columns // 2 + (mask_type == "B"):] = 0
        return F.conv2d(F.pad(x, (columns // 2, columns // 2, rows // 2, 0)), live, bias)

    def gated_masked_conv2d(x, weight, bias, cond, mask_type):
        a, b = (masked_conv2d(x, weight, bias, mask_type) + cond).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

try:
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
except ImportError:
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")

    def decode_attention(q, k_cache, v_cache, length):
        return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])

try:
    from kernels.logistic_mixture import logistic_mixture
except ImportError:
    def logistic_mixture(x, params):
        logits, means, log_scales = params.unflatten(1, (3, -1)).unbind(1)  # (B, M, H, W)
        x, inv = x / 127.5 - 1, torch.exp(-log_scales.clamp(min=-7))
        upper = torch.where(x > 0.999, math.inf, (x - means + 1 / 255) * inv)  # the last bins are open
        lower = torch.where(x < -0.999, -math.inf, (x - means - 1 / 255) * inv)
        log_p = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        return torch.logsumexp(log_p + torch.log_softmax(logits, 1), 1)


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
    arch: Literal["transformer", "pixelcnn", "made"] = "transformer"  # what sees the pixels before
    output: Literal["auto", "bernoulli", "softmax", "mixture"] = "auto"  # of binarised pixels (auto: of mnist) or of 8 bits
    binarize: Literal["dynamic", "static"] = "dynamic"  # draw the binary training images anew each step, or once
    mask_only: bool = False  # pixelcnn: the original of 2016, masked convolutions alone, with its blind spot
    patch: int = 0  # pixels a side that make one position; 0: 2 below 16 pixels, else 4 (>= 0)
    width: int = 0  # channels; 0: 128 for transformer, 64 for pixelcnn, 16 for made (>= 0)
    blocks: int = 4  # transformer blocks, gated blocks or hidden layers (> 0)
    n_head: int = 4  # transformer: attention heads (> 0)
    kernel: int = 3  # pixelcnn: side of the convolutions, odd and at least 3 (> 0)
    hidden: int = 1000  # made: units of a hidden layer (> 0)
    mixtures: int = 5  # logistics in the mixture of --output mixture (> 0)
    labels: bool = True  # condition on the class; the test likelihood then is the exact mean over classes
    dropout: float | None = None  # dropout in the blocks; none given: 0.3 for digits, which are few, else 0 (0 to 1)
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    decay: int = 2000  # steps after which the learning rate falls as 1 / sqrt(step) (> 0)
    # sampling: free to change on a trained model
    sampler: Literal["cached", "naive", "jacobi"] = "cached"  # three ways to one and the same sample
    temperature: float = 1.0  # of the samples, less is nearer to the mode (> 0)
    label: int | None = None  # sample this class only, else all in turn (>= 0)
    complete: Literal["no", "left", "right", "top", "bottom"] = "no"  # this half of test images is given, and completed


# ---- the model: a trunk gives each position features of the positions before it, a head the distribution of its pixels
# A trunk takes x (B,C,H,W) in [-1,1] and labels y (B,) -> (B,features,H,W)


class GatedBlock(nn.Module):
    """v sees the rows above, h the pixels before: two stacks, so that nothing before a pixel stays unseen."""

    def __init__(self, width, k, classes, dropout):
        super().__init__()
        self.v_conv = nn.Conv2d(width, 2 * width, (k // 2 + 1, k))
        self.v_to_h = nn.Conv2d(2 * width, 2 * width, 1)
        self.h_conv = nn.Conv2d(width, 2 * width, (1, k))
        self.h_out = nn.Conv2d(width, width, 1)
        self.label = nn.Embedding(max(classes, 1), 4 * width)
        self.dropout = nn.Dropout(dropout)

    def vertical(self, v, y, pad):
        """The vertical stack, and what it and the label give to the horizontal one (B,2*width,H,W)."""
        label_v, label_h = self.label(y)[:, :, None, None].chunk(2, 1)
        u = self.v_conv(F.pad(v, pad))  # (B, 2*width, H, W)
        a, b = (u + label_v).chunk(2, 1)
        return v[:, :, -u.shape[2]:] + torch.tanh(a) * torch.sigmoid(b), self.v_to_h(u) + label_h

    def forward(self, v, h, y, r):
        v, cond = self.vertical(v, y, (r, r, r, 0))
        g = self.dropout(gated_masked_conv2d(h, self.h_conv.weight, self.h_conv.bias, cond, "B"))
        return v, h + self.h_out(g), g


class GatedPixelCNN(nn.Module):
    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        k, self.r, self.features = cfg.kernel, cfg.kernel // 2, cfg.width
        self.v_in = nn.Conv2d(channels, cfg.width, (k // 2, k))  # the rows above alone
        self.h_in = nn.Conv2d(channels, cfg.width, (1, k))  # the pixels on the left alone
        self.blocks = nn.ModuleList(GatedBlock(cfg.width, k, classes, cfg.dropout) for _ in range(cfg.blocks))
        self.skip = nn.Conv2d(cfg.blocks * cfg.width, cfg.width, 1)

    def forward(self, x, y):
        r, skips = self.r, []
        v = self.v_in(F.pad(x, (r, r, r, 0))[:, :, :-1])  # (B, width, H, W)
        h = masked_conv2d(x, self.h_in.weight, self.h_in.bias, "A")
        for block in self.blocks:
            v, h, g = block(v, h, y, r)
            skips.append(g)
        return F.relu(h + self.skip(torch.cat(skips, 1)))


class TransformerBlock(nn.Module):
    def __init__(self, width, n_head, dropout):
        super().__init__()
        self.n_head, self.norm1, self.norm2 = n_head, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, attend):
        """x (B,T,C); attend(q, k, v) takes and gives (B,n_head,T,head_dim)."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        x = x + self.dropout(self.proj(attend(q, k, v).transpose(1, 2).reshape(B, T, C)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Decoder-only over positions in raster order: token t is the position before t, with the embedding of where t lies."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        if cfg.width % cfg.n_head:
            raise ValueError(f"--n-head {cfg.n_head} does not divide --width {cfg.width}")
        self.features = cfg.width
        self.embed, self.start = nn.Linear(channels, cfg.width), nn.Embedding(max(classes, 1), cfg.width)
        self.at_row, self.at_column = (nn.Parameter(0.1 * torch.randn(n, cfg.width)) for n in (H, W))
        self.blocks = nn.ModuleList(TransformerBlock(cfg.width, cfg.n_head, cfg.dropout) for _ in range(cfg.blocks))
        self.norm = nn.LayerNorm(cfg.width)

    def where(self):
        return (self.at_row[:, None] + self.at_column).flatten(0, 1)  # (H*W, width)

    def forward(self, x, y):
        B, _, H, W = x.shape
        before = self.embed(x.flatten(2).transpose(1, 2)[:, :-1])
        tokens = torch.cat([self.start(y)[:, None], before], 1) + self.where()  # (B, H*W, width)
        for block in self.blocks:
            tokens = block(tokens, lambda q, k, v: attention(q, k, v, "causal"))
        return self.norm(tokens).unflatten(1, (H, W)).permute(0, 3, 1, 2)


class Head(nn.Module):
    """The parameters of each pixel of a position from its features and, as in MADE, from the position's pixels before it.

    h (B,F,H,W), e (B,C*dims,H,W) embedded pixels -> (B,C,K,H,W). The C pixels of a position are those of its patch and
    their channels. Single logits have a direct path from h too, as in MADE; for 256 it would be most of the head's work.
    """

    def __init__(self, features, channels, outputs, dims, hidden):
        super().__init__()
        self.shape = channels, outputs
        self.out = nn.Conv2d(features, channels * outputs, 1) if channels == 1 or outputs == 1 else None
        if channels > 1:
            self.from_h = nn.Conv2d(features, channels * hidden, 1)
            self.from_x = nn.Conv2d(channels * dims, channels * hidden, 1, bias=False)
            self.to_out = nn.Conv2d(channels * hidden, channels * outputs, 1, groups=channels)
            c = torch.arange(channels)
            before = c.repeat_interleave(hidden)[:, None] > c.repeat_interleave(dims)
            self.register_buffer("mask", before.float()[:, :, None, None], persistent=False)

    def forward(self, h, e):
        out = self.out(h) if self.out else 0
        if self.shape[0] > 1:
            out = out + self.to_out(F.relu(self.from_h(h) + F.conv2d(e, self.from_x.weight * self.mask)))
        return out.unflatten(1, self.shape)


class Autoregressive(nn.Module):
    """x (B,C,H,W) int64 levels at every position, y (B,) int64 -> parameters (B,C,K,H,W) of each pixel given those before."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        trunks = {"pixelcnn": MaskedPixelCNN if cfg.mask_only else GatedPixelCNN, "transformer": Transformer, "made": MADE}
        self.levels, outputs = {"bernoulli": (2, 1), "softmax": (256, 256), "mixture": (256, 3 * cfg.mixtures)}[cfg.output]
        dims, hidden = (8, 32) if self.levels == 2 else (16, 64)
        self.scaled = self.levels == 2 or cfg.arch == "made"  # what the trunk sees of a pixel: its level, or that embedded
        self.embedding = None if self.scaled and channels == 1 else nn.Embedding(self.levels, dims)
        self.trunk = trunks[cfg.arch](channels if self.scaled else channels * dims, H, W, classes, cfg)
        self.head = Head(self.trunk.features, channels, outputs, dims, hidden)

    def embed(self, x):
        """Levels (B,C,...) -> (B,C*dims,...)."""
        return self.embedding(x.movedim(1, -1)).flatten(-2).movedim(-1, 1)

    def see(self, x):
        """Levels (B,C,...) as the trunk sees them: (B,C,...) in [-1,1], or embedded."""
        return 2 * x.to(next(self.parameters())) / (self.levels - 1) - 1 if self.scaled else self.embed(x)

    def forward(self, x, y):
        seen = self.see(x).contiguous(memory_format=torch.channels_last)
        e = self.embed(x) if self.embedding else None
        return self.head(self.trunk(seen, y), e).to(seen.dtype)  # at least float32, whatever --amp


# ---- the maths


def patchify(x, patch):
    """Patches to positions: (B,C,H,W) -> (B, C*patch^2, H/patch, W/patch), zeros on the right and at the bottom added."""
    return F.pixel_unshuffle(F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch)), patch)


def unpatchify(x, patch, H, W):
    """The inverse of patchify, cropped to H x W."""
    return F.pixel_shuffle(x, patch)[:, :, :H, :W]


def log_prob(params, x, output):
    """log p of each pixel. params (B,C,K,H,W), x (B,C,H,W) levels -> (B,C,H,W)."""
    if output == "bernoulli":
        return F.logsigmoid((2 * x - 1) * params[:, :, 0])
    if output == "softmax":
        logits, x = params.permute(0, 3, 4, 1, 2), x.permute(0, 2, 3, 1)  # as they lie in memory, the levels last
        return -F.cross_entropy(logits.flatten(0, 3), x.flatten(), reduction="none").view_as(x).permute(0, 3, 1, 2)
    return logistic_mixture(x.flatten(0, 1)[:, None].float(), params.flatten(0, 1)).unflatten(0, x.shape[:2])


def draw(params, u, output, temperature=1.0):
    """A pixel from its parameters and one uniform number, by the inverse of the distribution function.

    params (...,K), u (...) in [0,1) -> levels (...), int64. The same u gives the same level, however params were computed.
    """
    if output == "bernoulli":
        return (u < torch.sigmoid(params[..., 0] / temperature)).long()
    M = params.shape[-1] // 3 if output == "mixture" else None
    cdf = torch.cumsum(torch.softmax(params[..., :M] / temperature, -1), -1)
    k = (u[..., None] >= cdf[..., :-1]).sum(-1, keepdim=True)  # (..., 1)
    if output == "softmax":
        return k[..., 0]
    low = torch.where(k > 0, cdf.gather(-1, (k - 1).clamp(min=0)), 0)
    u = ((u[..., None] - low) / (cdf.gather(-1, k) - low)).clamp(1e-6, 1 - 1e-6)[..., 0]  # what is left of u is uniform
    mean, log_scale = (params[..., i * M:(i + 1) * M].gather(-1, k)[..., 0] for i in (1, 2))
    value = mean + temperature * torch.exp(log_scale.clamp(min=-7)) * (torch.log(u) - torch.log1p(-u))
    return ((value + 1) * 127.5).round().clamp(0, 255).long()


def log_likelihood(model, x, y, cfg):
    """Exact log p(x | y) in nats. x (B,C,H,W) levels, int64 -> (B,)."""
    patches, inside = patchify(x, cfg.patch), patchify(torch.ones_like(x[:1]), cfg.patch)
    return (log_prob(model(patches, y), patches, cfg.output) * inside).sum((1, 2, 3))


@torch.no_grad()
def sample(model, y, noise, cfg, given=None):
    """Pixels from uniform noise (B,C,H,W) in [0,1), given those of `given` (B,C,H,W) that are not -1 -> levels, passes used.

    Every --sampler gives the same sample from the same noise. "naive" is the definition: a pass of the network a pixel.
    "cached" computes one position at a time. "jacobi" redraws all pixels from the last guess until none changes, which
    they do from the first on, one more a pass at least: that is a fixed point, and the only one is the sample.
    """
    H, W = noise.shape[2:]
    given = torch.full_like(noise, -1, dtype=torch.long) if given is None else given
    noise, given = patchify(noise, cfg.patch), patchify(given, cfg.patch)  # what pads the image counts as given, 0
    x, (C, rows, columns) = given.clamp(min=0), noise.shape[1:]

    def redraw(params, u, g):  # params (...,K), u and g (...)
        return torch.where(g >= 0, g, draw(params, u, cfg.output, cfg.temperature))

    if cfg.sampler == "jacobi":
        for passes in count(1):
            last, x = x, redraw(model(x, y).movedim(2, -1), noise, given)
            if torch.equal(last, x):
                return unpatchify(x, cfg.patch, H, W), passes
    cached = cfg.sampler == "cached"
    if cached:
        seen = model.see(x)
        cache = CACHES[type(model.trunk)](model.trunk, seen, y)
    for i, j in product(range(rows), range(columns)):
        here, u, g = (a[:, :, i, j] for a in (x, noise, given))  # (B, C), parts of the whole
        if cached:
            head = HeadCache(model, cache.step(seen, i, j))
        for c in range(C):
            params = head.step(here, c) if cached else model(x, y)[:, c, :, i, j]  # (B, K)
            here[:, c] = redraw(params, u[:, c], g[:, c])
        if cached:
            seen[:, :, i, j] = model.see(here)
    return unpatchify(x, cfg.patch, H, W), rows * columns * (1 if cached else C)


# ---- two simpler trunks, to compare with


class MaskedPixelCNN(nn.Module):
    """Masked convolutions stacked, as first published: what lies above on the right of the kernels' cone is never seen."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.features, self.first = cfg.width, nn.Conv2d(channels, cfg.width, cfg.kernel + 2)
        self.convs = nn.ModuleList(nn.Conv2d(cfg.width, cfg.width, cfg.kernel) for _ in range(cfg.blocks))
        self.label, self.dropout = nn.Embedding(max(classes, 1), cfg.width), nn.Dropout(cfg.dropout)

    def forward(self, x, y):
        h = masked_conv2d(x, self.first.weight, self.first.bias, "A") + self.label(y)[:, :, None, None]
        for conv in self.convs:
            h = h + masked_conv2d(self.dropout(F.relu(h)), conv.weight, conv.bias, "B")
        return F.relu(h)


class MADE(nn.Module):
    """A masked multilayer perceptron: a unit of degree m sees positions up to m (of degree -1 the label alone), the output
    of position t units of degree below t."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        T, n = H * W, cfg.hidden
        self.features, self.label = cfg.width, nn.Embedding(max(classes, 1), n)
        position, degree = torch.arange(T), torch.arange(n) * T // n - 1  # of inputs and outputs, of hidden units
        self.layers = nn.ModuleList(nn.Linear(n if i else T * channels, n) for i in range(cfg.blocks))
        self.out, self.dropout = nn.Linear(n, T * self.features), nn.Dropout(cfg.dropout)
        masks = {"mask_in": degree[:, None] >= position.repeat_interleave(channels),
                 "mask_hidden": degree[:, None] >= degree,
                 "mask_out": position.repeat_interleave(self.features)[:, None] > degree}
        for name, mask in masks.items():
            self.register_buffer(name, mask.float(), persistent=False)
        self.ends = torch.searchsorted(degree, position).tolist()  # number of units that the output of t sees

    def weights(self):
        masks = [self.mask_in, *[self.mask_hidden] * (len(self.layers) - 1)]
        return [layer.weight * mask for layer, mask in zip(self.layers, masks, strict=True)], self.out.weight * self.mask_out

    def forward(self, x, y):
        B, _, H, W = x.shape
        h, (weights, out) = x.flatten(2).transpose(1, 2).flatten(1), self.weights()  # (B, T*C), position by position
        for i, (layer, weight) in enumerate(zip(self.layers, weights, strict=True)):
            h = F.linear(h, weight, layer.bias)
            h = self.dropout(F.relu(h + self.label(y) if i == 0 else h))
        return F.linear(h, out, self.out.bias).view(B, H, W, -1).permute(0, 3, 1, 2)


# ---- the remedy: caches, so that a position costs a position's work
# Cache(trunk, x, y), then step(x, i, j) for one position after the other, with x known at those before: what the trunk's
# forward gives there, (B,features).


class GatedCache:
    """Of each block's v the rows so far, of its h the row under way. A row of the vertical stack sees the rows above alone,
    so it is computed at once when the row begins."""

    def __init__(self, trunk, x, y):
        B, _, H, W = x.shape
        self.trunk, self.y, self.r, width = trunk, y, trunk.r, trunk.features
        self.rows = [x.new_zeros(B, width, H + self.r, W) for _ in trunk.blocks]
        self.row = [x.new_zeros(B, W + self.r, width) for _ in trunk.blocks]
        self.first = trunk.h_in.bias, trunk.h_in.weight[:, :, 0, :self.r].flatten(1).T  # live taps
        self.convs = [b.h_conv.weight[:, :, 0, :self.r + 1].permute(2, 1, 0).flatten(0, 1) for b in trunk.blocks]

    def begin_row(self, x, i):
        r, self.conds = self.r, []
        v = self.trunk.v_in(F.pad(x[:, :, max(i - r, 0):i], (r, r, max(r - i, 0), 0)))  # (B, width, 1, W)
        for block, rows, row in zip(self.trunk.blocks, self.rows, self.row, strict=True):
            rows[:, :, i + r] = v[:, :, 0]
            v, cond = block.vertical(rows[:, :, i:i + r + 1], self.y, (r, r, 0, 0))
            self.conds.append(cond[:, :, 0].permute(2, 0, 1) + block.h_conv.bias)  # (W, B, 2*width)
            row.zero_()

    def step(self, x, i, j):
        if j == 0:
            self.begin_row(x, i)
        r, gs = self.r, []
        left = F.pad(x[:, :, i, max(j - r, 0):j], (max(r - j, 0), 0))  # (B, C, r)
        h = torch.addmm(self.first[0], left.flatten(1), self.first[1])  # (B, width)
        for block, row, cond, conv in zip(self.trunk.blocks, self.row, self.conds, self.convs, strict=True):
            row[:, j + r] = h
            a, b = torch.addmm(cond[j], row[:, j:j + r + 1].flatten(1), conv).chunk(2, 1)  # (B, width)
            g = torch.tanh(a) * torch.sigmoid(b)
            h = h + F.linear(g, block.h_out.weight[:, :, 0, 0], block.h_out.bias)
            gs.append(g)
        return F.relu(h + F.linear(torch.cat(gs, 1), self.trunk.skip.weight[:, :, 0, 0], self.trunk.skip.bias))


class MaskedCache:
    """Of every convolution the live rows of its kernel, and its input so far, zero-padded."""

    def __init__(self, trunk, x, y):
        B, _, H, W = x.shape
        self.start, self.convs = trunk.label(y), []
        for conv, mask_type in [(trunk.first, "A"), *((conv, "B") for conv in trunk.convs)]:
            k = conv.kernel_size[0]
            live = conv.weight[:, :, :k // 2 + 1].clone()
            live[:, :, -1, k // 2 + (mask_type == "B"):] = 0
            self.convs.append((x.new_zeros(B, conv.in_channels, H + k // 2, W + k - 1), live.flatten(1).T, conv.bias, k))

    def step(self, x, i, j):
        seen, live, bias, k = self.convs[0]
        if j > 0 or i > 0:  # the position before, which is known by now
            before = (i, j - 1) if j > 0 else (i - 1, x.shape[3] - 1)
            seen[:, :, before[0] + k // 2, before[1] + k // 2] = x[:, :, before[0], before[1]]
        h = self.start + torch.addmm(bias, seen[:, :, i:i + k // 2 + 1, j:j + k].flatten(1), live)
        for seen, live, bias, k in self.convs[1:]:
            seen[:, :, i + k // 2, j + k // 2] = F.relu(h)
            h = h + torch.addmm(bias, seen[:, :, i:i + k // 2 + 1, j:j + k].flatten(1), live)
        return F.relu(h)


class KeyValueCache:
    """Of each block the keys and values so far."""

    def __init__(self, trunk, x, y):
        (B, _, H, W), n_head = x.shape, trunk.blocks[0].n_head
        self.trunk, self.first, self.where = trunk, trunk.start(y), trunk.where()
        self.kept = [x.new_zeros(2, B, n_head, H * W, trunk.features // n_head) for _ in trunk.blocks]

    def step(self, x, i, j):
        t = i * x.shape[3] + j
        token = self.trunk.embed(x.flatten(2)[:, :, t - 1]) if t else self.first
        token = (token + self.where[t])[:, None]  # (B, 1, width)
        for block, (keys, values) in zip(self.trunk.blocks, self.kept, strict=True):
            def attend(q, k, v, keys=keys, values=values):
                keys[:, :, t], values[:, :, t] = k[:, :, 0], v[:, :, 0]
                return decode_attention(q, keys, values, t + 1)
            token = block(token, attend)
        return self.trunk.norm(token)[:, 0]


class UnitCache:
    """Of each hidden layer of MADE the units so far: a position adds those of its degree."""

    def __init__(self, trunk, x, y):
        self.trunk, (self.weights, self.out) = trunk, trunk.weights()
        self.units = [x.new_zeros(len(x), len(weight)) for weight in self.weights]
        self.biases = [trunk.layers[0].bias + trunk.label(y), *(layer.bias.expand(len(x), -1) for layer in trunk.layers[1:])]

    def step(self, x, i, j):
        t, ends, h = i * x.shape[3] + j, self.trunk.ends, x.flatten(2).transpose(1, 2).flatten(1)
        new = slice(ends[t - 1] if t else 0, ends[t])  # the units of degree t - 1
        for weight, bias, units in zip(self.weights, self.biases, self.units, strict=True):
            units[:, new] = F.relu(torch.addmm(bias[:, new], h, weight[new].T))
            h = units
        out = slice(t * self.trunk.features, (t + 1) * self.trunk.features)
        return F.linear(self.units[-1], self.out[out], self.trunk.out.bias[out])


class HeadCache:
    """Of one position, whose features are h (B,features): what these and its pixels so far give to the pixels after them."""

    def __init__(self, model, h):
        head, (C, K), self.embed = model.head, model.head.shape, model.embed
        self.out = h.new_zeros(len(h), C, K)
        if head.out:
            self.out += F.linear(h, head.out.weight[:, :, 0, 0], head.out.bias).unflatten(1, (C, K))
        if C > 1:
            self.out += head.to_out.bias.view(C, K)
            self.hidden = F.linear(h, head.from_h.weight[:, :, 0, 0], head.from_h.bias).unflatten(1, (C, -1))
            self.from_x = head.from_x.weight[:, :, 0, 0].T.unflatten(0, (C, -1))  # (C, dims, C*hidden)
            self.to_out = head.to_out.weight[:, :, 0, 0].unflatten(0, (C, K)).mT  # (C, hidden, K)

    def step(self, x, c):
        """The parameters (B,K) of pixel c from x (B,C), whose pixels before c are known; for c = 0, 1, ... in turn."""
        if self.out.shape[1] == 1:
            return self.out[:, 0]
        if c > 0:  # no mask: what it gives to the units of pixels that are drawn is not read again
            self.hidden += (self.embed(x[:, c - 1:c]) @ self.from_x[c - 1]).view_as(self.hidden)
        return torch.addmm(self.out[:, c], F.relu(self.hidden[:, c]), self.to_out[c])


CACHES = {GatedPixelCNN: GatedCache, MaskedPixelCNN: MaskedCache, Transformer: KeyValueCache, MADE: UnitCache}


# ---- the loops

# What may differ from the checkpoint when it is resumed, evaluated or sampled from; the rest is the run's own.
FREE = """mode data_dir steps minutes device amp compile kernels out resume overwrite num_samples log_every save_every
    sampler temperature label complete""".split()

LARGE = 784  # values of an image from which on fewer images are taken at once: each value may have 256 logits


def choose(cfg, H, W):
    """cfg, with what the data and the architecture decide where nothing was said."""
    if cfg.patch > max(H, W):
        raise ValueError(f"--patch {cfg.patch}: is larger than the images, {H} x {W}")
    if cfg.output == "auto":
        cfg.output = "bernoulli" if cfg.dataset == "mnist" else "softmax"
    cfg.patch = cfg.patch or (2 if min(H, W) < 16 else 4)
    if cfg.dropout is None:
        cfg.dropout = 0.3 if cfg.dataset == "digits" else 0.0
    cfg.width = cfg.width or {"transformer": 128, "pixelcnn": 64, "made": 16}[cfg.arch]
    return cfg


def to_levels(x, cfg, generator=None):
    """x uint8 in {0..255} -> the levels that are modelled, int64: a draw of {0,1} with probability x / 255, or x itself."""
    if cfg.output != "bernoulli":
        return x.long()
    return (torch.rand(x.shape, generator=generator).to(x.device) * 255 < x).long()


def to_uint8(levels, cfg):
    return (levels * (255 if cfg.output == "bernoulli" else 1)).byte().cpu()


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights with the power profile of Karras et al. 2024, eq. 127, whose width grows with the run."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(model, ema, data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step."""
    if cfg.output == "bernoulli" and cfg.binarize == "static":
        data = data._replace(train=to_levels(data.train, cfg, torch.Generator().manual_seed(1)).byte() * 255)
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, (0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    run.begin(parts)
    net = torch.compile(model) if cfg.compile else model
    model.train()
    for step in run.steps():
        x, y = run.batch(data)
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        with run.autocast():
            nats = -log_likelihood(net, to_levels(x, cfg), y, cfg).mean()
        norm = run.update(nats / x[0].numel(), model, optimizer)
        update_ema(ema, model, step, cfg.ema)
        run.log(loss=nats / x[0].numel(), nats=nats, grad_norm=norm, lr=lr)
        if run.step % cfg.save_every == 0:
            run.save(parts)
            run.show(generate(ema, 80, data.train.shape[1:], data.classes, cfg, run)[0])
    run.save(parts)
    run.check()


@torch.no_grad()
def evaluate(ema, data, cfg, run):
    """-log p(x) over the whole test split, which is binarised once; exact: with labels, p(x) = sum_y p(y) p(x | y)."""
    test = to_levels(data.test, cfg, torch.Generator().manual_seed(0))
    total, given = 0.0, 0.0
    for x, y in zip(*(a.split(at_once(test.shape[1:], LARGE)) for a in (test, data.test_labels)), strict=True):
        logs = []
        for label in range(max(data.classes, 1)):
            run.check()
            logs.append(log_likelihood(ema, x.to(run.device), torch.full_like(y, label).to(run.device), cfg).cpu().double())
        total -= (torch.logsumexp(torch.stack(logs), 0) - math.log(len(logs))).sum().item()
        given -= torch.stack(logs).gather(0, y[None]).sum().item()
    n, dims = len(data.test), data.test[0].numel()
    metrics = {"test_nats": total / n, "test_bpd": total / n / dims / math.log(2)}
    return metrics | ({"test_nats_given_label": given / n} if data.classes else {})


def generate(ema, n, shape, classes, cfg, run):
    """n images (n,C,H,W) uint8, labels (n,) and the passes used, from the averaged weights and the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.arange(n) % max(classes, 1) if cfg.label is None else torch.full((n,), cfg.label)
    images, passes = [], 0
    for y in labels.split(at_once(shape, LARGE)):
        run.check()
        noise = torch.rand(len(y), *shape, generator=generator).to(run.device)
        levels, used = sample(ema, y.to(run.device), noise, cfg)
        images.append(to_uint8(levels, cfg))
        passes = max(passes, used)
    return torch.cat(images), labels, passes


def show_completions(ema, data, cfg, run, each=4):
    """complete.png: in a row a test image, the half of it that is given (the rest grey), and completions."""
    generator = torch.Generator().manual_seed(cfg.seed)
    x = to_levels(data.test[:16], cfg, torch.Generator().manual_seed(0)).to(run.device)  # binarised as in evaluation
    y = data.test_labels[:16].to(run.device)
    H, W = x.shape[2:]
    known = {"top": np.s_[..., :H // 2, :], "bottom": np.s_[..., H - H // 2:, :], "left": np.s_[..., :W // 2],
             "right": np.s_[..., W - W // 2:]}[cfg.complete]
    given, half = torch.full_like(x, -1), torch.full_like(data.test[:16], 128)
    given[known] = x[known]
    half[known] = to_uint8(x, cfg)[known]
    y, given = y.repeat_interleave(each), given.repeat_interleave(each, 0)
    drawn, _ = sample(ema, y, torch.rand(given.shape, generator=generator).to(run.device), cfg, given)
    rows = torch.cat([to_uint8(x, cfg)[:, None], half[:, None], to_uint8(drawn, cfg).unflatten(0, (-1, each))], 1)
    save_grid(rows.flatten(0, 1), run.out / "complete.png", 2 * (each + 2))


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
    if cfg.mode != "sample" or cfg.complete != "no":
        data = load_data(cfg.dataset, cfg.data_dir, cfg.image_size)
        if not cfg.labels:
            data = data._replace(train_labels=0 * data.train_labels, test_labels=0 * data.test_labels, classes=0)
        run.describe(data)
    (C, H, W), classes = run.facts["shape"], run.facts["classes"]
    if cfg.mask_only and cfg.arch != "pixelcnn":
        fail("--mask-only: is of --arch pixelcnn")
    if cfg.kernel < 3 or cfg.kernel % 2 == 0:
        fail(f"--kernel {cfg.kernel}: must be odd and at least 3")
    if cfg.label is not None and cfg.label >= classes:
        fail(f"--label {cfg.label}: the model knows {classes} classes")
    torch.manual_seed(cfg.seed)
    try:
        choose(cfg, H, W)
        model = Autoregressive(C * cfg.patch**2, -(-H // cfg.patch), -(-W // cfg.patch), classes, cfg)
    except ValueError as e:
        fail(str(e))
    model = model.to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if cfg.mode == "train":
        train(model, ema, data, cfg, run)
        run.curves()
    else:
        run.restore({"ema": ema})
    if run.rank > 0:
        return
    if cfg.mode != "sample":
        metrics = evaluate(ema, data, cfg, run)
        run.write_metrics(final=True, **metrics)
        kind = f"{cfg.binarize}ally binarised, the test split once with seed 0" if cfg.output == "bernoulli" else "8 bits"
        print(f"test nll {metrics['test_nats']:.3f} nats, {metrics['test_bpd']:.4f} bits/dim (exact, all {len(data.test)} test "
              f"images, {kind}{', the mean of p(x | y) over the classes' * ('test_nats_given_label' in metrics)})")
    if cfg.mode != "eval":
        start = time.monotonic()
        images, labels, passes = generate(ema, cfg.num_samples, (C, H, W), classes, cfg, run)
        seconds = time.monotonic() - start
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": labels.numpy()} if classes else {})
        write(run.out / "samples.npz", lambda f: np.savez_compressed(f, **arrays))
        save_grid(images[:80], run.out / "samples.png", 10)
        unit = "steps" if cfg.sampler == "cached" else "passes"
        print(f"{len(images)} samples in {seconds:.2f} s ({cfg.sampler}: {passes} {unit} for {C * H * W} pixels), "
              f"in {run.out / 'samples.npz'}, the first in {run.out / 'samples.png'}")
    if cfg.complete != "no":
        show_completions(ema, data, cfg, run)
    run.check()


if __name__ == "__main__":
    launch(main)
