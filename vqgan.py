"""VQGAN: an autoencoder that turns an image into a small grid of codes, and a transformer that models the codes one by one.

The weakness it answers: an autoregressive model of pixels takes a step a pixel, so large images are out of reach. Here stage
1 learns a discrete code, downsample x downsample pixels each, with a decoder trained like a GAN's generator so that it draws
sharp detail that the code need not hold; stage 2 is autoregressive over that code, 4 to 256 times fewer positions. A window
that slides over the grid samples images larger than any it was trained on. One command trains both, one after the other.

Papers: VQ-VAE (van den Oord 2017), VQGAN (Esser 2021), EMA codebook (VQ-VAE app. A.1), FSQ (Mentzer 2024), SimVQ (Zhu 2024).
  nearest code, straight through ........... VQ                      VQ-VAE eqs. 1 and 2
  codebook by moving averages .............. VQ.update               VQ-VAE app. A.1 eqs. 6 to 8
  quantisation without a codebook .......... FSQ                     FSQ sec. 3.1
  one linear layer over a frozen codebook .. SimVQ                   SimVQ eq. 6
  loss of the autoencoder .................. loss_autoencoder        VQGAN eqs. 4 and 6
  adaptive weight .......................... adaptive_weight         VQGAN eq. 7
  patch discriminator ...................... loss_discriminator      VQGAN eq. 5, with the hinge
  chain rule over codes, sliding window .... nll, sample             VQGAN eqs. 9 and 10, fig. 3

  python vqgan.py                                                           # digits
  python vqgan.py --dataset mnist --stage1 1200 --minutes 10                # MNIST on two CPU cores
  python vqgan.py --dataset photos --width 32 --batch-size 8 --stage1 1000 --steps 2500 --sample-size 256 384 --num-samples 2
The second gives a Frechet distance of 0.35 on two Zen 3 cores, its reconstructions 0.07; the third samples photographs
larger than the 128 x 128 it is trained on. All results: docs/vqgan.md
"""

import copy
import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.vector_quantize import nearest_code, straight_through, sum_by_code
except ImportError:
    def nearest_code(z, codebook):
        flat, e = z.detach().flatten(0, -2), codebook.detach()
        indices = torch.cat([(e.square().sum(1) - 2 * part @ e.T).argmin(1) for part in flat.split(4096)]).view(z.shape[:-1])
        return F.embedding(indices, codebook), indices, torch.bincount(indices.flatten(), minlength=len(e))

    def straight_through(z, z_q):
        return z_q.detach() + (z - z.detach())

    def sum_by_code(x, indices, n_codes):
        return x.new_zeros(n_codes, x.shape[-1]).index_add_(0, indices.flatten(), x.flatten(0, -2))

try:
    from kernels.group_norm import group_norm_silu
except ImportError:
    def group_norm_silu(x, groups, weight, bias, eps=1e-5):
        return F.silu(torch.group_norm(x, groups, weight, bias, eps))

try:
    from kernels.attention import attention
    from kernels.decode_attention import decode_attention
except ImportError:
    def attention(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")

    def decode_attention(q, k_cache, v_cache, length):
        return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])


@dataclass
class Config:
    # the core, the same in all six scripts
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, photos (crops of two photographs) or a folder of images
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    image_size: int = 0  # resize images to this many pixels a side, 0: as they are; of photos, the crop, 0: 128 (>= 0)
    steps: int | None = None  # optimizer steps of both stages, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    batch_size: int = 32  # images a step, over all processes (> 0)
    lr: float = 1e-3  # learning rate of Adam, of the autoencoder and the discriminator (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    compile: bool = False  # torch.compile the network
    kernels: Literal["auto", "torch", "triton"] = "auto"  # fused kernels or plain PyTorch
    out: str | None = None  # run directory, runs/<script>-<dataset> where not given
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start anew in an --out that holds a run already
    num_samples: int = 80  # images to write to samples.npz (> 0)
    ema: float = 0.15  # share of a stage so far over which the weights are averaged that are evaluated and sampled (> 0)
    log_every: int = 50  # steps between lines of metrics.jsonl (> 0)
    save_every: int = 1000  # steps between checkpoints and sample grids (> 0)
    # stage 1, the autoencoder
    stage1: int = 1600  # the first steps train the autoencoder, those after them the transformer over its codes (> 0)
    quantizer: Literal["vq", "fsq", "simvq"] = "vq"  # codebook of moving averages, fixed levels, frozen codebook
    codes: int = 256  # size of the codebook of vq and simvq (> 0)
    code_dim: int = 0  # numbers a code stands for; 0: 16 of vq, 8 of simvq (>= 0)
    levels: tuple[int, ...] = (8, 6, 5)  # fsq: levels of each number, at least 3; their product is the number of codes (> 0)
    beta: float = 0.25  # weight of the commitment to the code (>= 0)
    downsample: int = 0  # pixels a side of a code: 2, 4, 8 or 16; 0: 2 below 16 pixels, 4 up to 64, else 8 (>= 0)
    width: int = 48  # channels of encoder and decoder at half resolution, twice as many at a quarter, then four times (> 0)
    blocks: int = 1  # residual blocks a resolution (> 0)
    disc_start: int = 500  # step from which on the discriminator is trained, and takes part in the loss (>= 0)
    disc_weight: float = 0.1  # weight of the adversarial loss, beside the adaptive one; 0: none, a plain VQ-VAE (>= 0)
    perceptual: Literal["features", "lpips", "none"] = "features"  # distance in the discriminator's features, or LPIPS
    perceptual_weight: float = 0.2  # weight of that distance (>= 0)
    # stage 2, the transformer
    prior_width: int = 128  # channels (> 0)
    prior_blocks: int = 4  # transformer blocks (> 0)
    prior_lr: float = 3e-3  # learning rate of Adam (> 0)
    n_head: int = 4  # attention heads (> 0)
    dropout: float = 0.1  # dropout in the blocks (0 to 1)
    labels: bool = True  # condition the transformer on the class
    warmup: int = 100  # steps of linear warm-up of the learning rate, in either stage (>= 0)
    decay: int = 2000  # steps of a stage after which the learning rate falls as 1 / sqrt(step) (> 0)
    # sampling: free to change on a trained model
    sampler: Literal["cached", "naive"] = "cached"  # two ways to one and the same sample
    temperature: float = 1.0  # of the samples, less is nearer to the mode (> 0)
    top_k: int = 0  # draw among this many codes alone, 0: all (>= 0)
    top_p: float = 1.0  # draw among the likeliest codes that have this much probability together (0 to 1)
    sample_size: tuple[int, ...] = (0, 0)  # height and width of samples, 0: as trained; over larger ones a window slides (>= 0)
    label: int | None = None  # sample this class only, else all in turn (>= 0)
    complete: Literal["no", "top", "left"] = "no"  # this half of test images is given, and completed


# ---- stage 1: encoder x (B,C,H,W) in [-1,1] -> z (B,D,h,w), quantizer z -> z_q, decoder z_q -> x_hat (the networks: below)
# A quantizer: z (B,h,w,D) -> z_q of its shape, with z's gradient; indices (B,h,w) int64 in {0..K-1}; its loss, a number


class VQ(nn.Module):
    """Codes are moving averages of the vectors that took them; one that few take becomes a vector of the batch."""

    def __init__(self, cfg, decay=0.99, dead=0.1):
        super().__init__()
        self.beta, self.decay, self.dead = cfg.beta, decay, dead
        self.codebook = nn.Parameter(torch.randn(cfg.codes, cfg.code_dim), requires_grad=False)
        self.register_buffer("size", torch.zeros(cfg.codes))  # vectors of a batch that take each code, averaged
        self.register_buffer("sums", torch.zeros(cfg.codes, cfg.code_dim))  # the sums of these vectors, averaged

    def forward(self, z):
        z_q, indices, _ = nearest_code(z, self.codebook)
        if self.training:
            self.update(over_ranks(z.detach()).flatten(0, -2), over_ranks(indices).flatten())
        return straight_through(z, z_q), indices, self.beta * F.mse_loss(z, z_q.detach())

    @torch.no_grad()
    def update(self, z, indices):
        """z (N,D), indices (N,). A revived code starts with the mean size, so that it outlives the updates to come."""
        K, mean = len(self.codebook), len(z) / len(self.codebook)
        self.size.lerp_(torch.bincount(indices, minlength=K).to(z), 1 - self.decay)
        self.sums.lerp_(sum_by_code(z, indices, K), 1 - self.decay)
        chosen, dead = torch.randint(len(z), (K,), device=z.device), self.size < self.dead * mean
        if dist.is_initialized():
            dist.broadcast(chosen, 0)
        self.sums.copy_(torch.where(dead[:, None], mean * z[chosen], self.sums))
        self.size.masked_fill_(dead, mean)
        self.codebook.copy_(self.sums / self.size[:, None])

    def lookup(self, indices):
        return F.embedding(indices, self.codebook)


class Autoencoder(nn.Module):
    """Any H and W: the image is padded with its last row and column to whole codes, and cropped back."""

    def __init__(self, channels, cfg):
        super().__init__()
        widths = [cfg.width * min(2**i, 4) for i in range(int(math.log2(cfg.downsample)))]
        self.downsample, D = cfg.downsample, len(cfg.levels) if cfg.quantizer == "fsq" else cfg.code_dim
        self.codes = math.prod(cfg.levels) if cfg.quantizer == "fsq" else cfg.codes
        self.encoder = Encoder(channels, D, widths, cfg.blocks)
        self.quantizer = {"vq": VQ, "fsq": FSQ, "simvq": SimVQ}[cfg.quantizer](cfg)
        self.decoder, self.last = Decoder(D, widths, cfg.blocks), nn.Conv2d(widths[0], 4 * channels, 3, padding=1)

    def encode(self, x):
        """x (B,C,H,W) in [-1,1] -> z (B,h,w,D), at least in float32, whatever the precision of the rest."""
        x = F.pad(x, (0, -x.shape[3] % self.downsample, 0, -x.shape[2] % self.downsample), mode="replicate")
        z = self.encoder(x).permute(0, 2, 3, 1)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def forward(self, x):
        z = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            z_q, indices, loss = self.quantizer(z)
        return self.decode(z_q)[..., :x.shape[2], :x.shape[3]], indices, loss

    def decode(self, z_q):
        """z_q (B,h,w,D), quantizer.lookup(indices) for one, -> (B,C,h*downsample,w*downsample)."""
        return F.pixel_shuffle(self.last(self.decoder(z_q.permute(0, 3, 1, 2))), 2)


# ---- the maths of stage 1


def feature_distance(a, b):
    """Mean distance of features (lists of (B,C,h,w)), each position's scaled to norm 1: LPIPS eq. 1 without learned weights."""
    return sum((F.normalize(p) - F.normalize(q)).square().sum(1).mean() for p, q in zip(a, b, strict=True)) / len(a)


def adaptive_weight(reconstruction, adversarial, last):
    """How much steeper the one loss is than the other at the decoder's last weight: VQGAN eq. 7. A number, no gradient."""
    a, b = (over_ranks(torch.autograd.grad(loss, last, retain_graph=True)[0][None]).mean(0).norm()
            for loss in (reconstruction, adversarial))
    return (a / (b + 1e-6)).clamp(0, 1e4).detach()


def loss_autoencoder(model, D, x, step, cfg, lpips=None):
    """What encoder, code and decoder minimise, its terms, and x_hat. x (B,C,H,W) in [-1,1]. The caller freezes D."""
    x_hat, _, code = model(x)
    reconstruction = F.l1_loss(x_hat, x)
    terms = {"l1": reconstruction, "code": code}
    started = step >= cfg.disc_start and cfg.disc_weight > 0
    if started:
        fake, f_hat = D(x_hat)
    if lpips is not None:
        terms["perceptual"] = lpips(x_hat, x)
    elif started and cfg.perceptual == "features":
        with torch.no_grad():
            _, f = D(x)
        terms["perceptual"] = feature_distance(f_hat, f)
    if "perceptual" in terms:
        reconstruction = reconstruction + cfg.perceptual_weight * terms["perceptual"]
    total = reconstruction + code
    if started:
        terms["adversarial"] = -fake.mean()
        terms["adaptive"] = adaptive_weight(reconstruction, terms["adversarial"], model.last.weight)
        total = total + cfg.disc_weight * terms["adaptive"] * terms["adversarial"]
    return total, terms, x_hat


def loss_discriminator(D, x, x_hat):
    """Hinge. The autoencoder is left alone."""
    return F.relu(1 - D(x)[0]).mean() + F.relu(1 + D(x_hat.detach())[0]).mean()


def usage(indices, codes):
    """Share of the codes that occur, and their perplexity exp(entropy), at most `codes`."""
    p = torch.bincount(indices.flatten(), minlength=codes) / indices.numel()
    return (p > 0).float().mean().item(), torch.exp(torch.special.entr(p).sum()).item()


# ---- stage 2: a transformer over the codes in raster order


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


class Prior(nn.Module):
    """Decoder-only: codes (B,h,w), no larger than the grid (rows,columns) it is built for, and y (B,) -> logits (B,h*w,K)."""

    def __init__(self, codes, rows, columns, classes, cfg):
        super().__init__()
        w, self.grid = cfg.prior_width, (rows, columns)
        if w % cfg.n_head:
            raise ValueError(f"--n-head {cfg.n_head} does not divide --prior-width {w}")
        self.embed, self.start = nn.Embedding(codes, w), nn.Embedding(max(classes, 1), w)
        self.at_row, self.at_column = (nn.Parameter(torch.empty(n, w)) for n in (rows, columns))
        for table in (self.embed.weight, self.start.weight, self.at_row, self.at_column):
            nn.init.normal_(table, std=0.3)  # what stands there and where are heard alike from the start
        self.blocks = nn.ModuleList(TransformerBlock(w, cfg.n_head, cfg.dropout) for _ in range(cfg.prior_blocks))
        self.norm, self.out = nn.LayerNorm(w), nn.Linear(w, codes)

    def where(self, h, w):
        return (self.at_row[:h, None] + self.at_column[:w]).flatten(0, 1)  # (h*w, width)

    def forward(self, codes, y):
        before = self.embed(codes.flatten(1)[:, :-1])
        tokens = torch.cat([self.start(y)[:, None], before], 1) + self.where(*codes.shape[1:])
        for block in self.blocks:
            tokens = block(tokens, lambda q, k, v: attention(q, k, v, "causal"))
        return self.out(self.norm(tokens))

    def cache(self, B, h, w):
        """Room for the keys and values of each block."""
        head_dim = self.out.in_features // self.blocks[0].n_head
        return [self.at_row.new_zeros(2, B, self.blocks[0].n_head, h * w, head_dim) for _ in self.blocks]

    def step(self, codes, y, t, cache):
        """Logits (B,K) of position t, given the cache of the positions before it: those of forward, at the price of one."""
        token = self.embed(codes.flatten(1)[:, t - 1]) if t else self.start(y)
        token = (token + self.where(*codes.shape[1:])[t])[:, None]
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            def attend(q, k, v, keys=keys, values=values):
                keys[:, :, t], values[:, :, t] = k[:, :, 0], v[:, :, 0]
                return decode_attention(q, keys, values, t + 1)
            token = block(token, attend)
        return self.out(self.norm(token))[:, 0]


def nll(prior, codes, y):
    """-log p(codes | y) in nats, by the chain rule. codes (B,h,w), y (B,) -> (B,)."""
    return F.cross_entropy(prior(codes, y).transpose(1, 2), codes.flatten(1), reduction="none").sum(1)


def probabilities(logits, cfg):
    """softmax(logits / temperature), held to the --top-k likeliest codes and to the likeliest that sum to --top-p. (B,K)"""
    p, order = torch.softmax(logits / cfg.temperature, 1).sort(dim=1, descending=True, stable=True)
    kept = (p.cumsum(1) - p < cfg.top_p) | (cfg.top_p == 1)  # what stands before a code does not reach top_p yet
    if cfg.top_k:
        kept[:, cfg.top_k:] = False
    kept[:, 0] = True  # always
    p = torch.zeros_like(p).scatter(1, order, p * kept)
    return p / p.sum(1, keepdim=True)


@torch.no_grad()
def sample(prior, y, noise, cfg, given=None):
    """Codes (B,h,w) from uniform noise (B,h,w) in [0,1), given those of `given` (B,h,w) that are not -1; any h and w.

    Both --sampler give the same codes from the same noise. A grid larger than the prior's is seen through a window of the
    prior's size around the position under way, as far as the edges allow (VQGAN fig. 3), with a pass for each position.
    """
    x = torch.full_like(noise, -1, dtype=torch.long) if given is None else given.clone()
    (B, rows, columns), free = x.shape, x < 0
    h, w = min(rows, prior.grid[0]), min(columns, prior.grid[1])
    cached = cfg.sampler == "cached" and (h, w) == (rows, columns)
    cache, x = prior.cache(B, h, w) if cached else None, x.clamp(min=0)
    for i, j in product(range(rows), range(columns)):
        top, left = min(max(i - h // 2, 0), rows - h), min(max(j - w // 2, 0), columns - w)
        t = (i - top) * w + j - left
        window = x[:, top:top + h, left:left + w]
        logits = prior.step(window, y, t, cache) if cached else prior(window, y)[:, t]
        cdf = probabilities(logits, cfg).cumsum(1)
        drawn = (noise[:, i, j, None] * cdf[:, -1:] >= cdf[:, :-1]).sum(1)
        x[:, i, j] = torch.where(free[:, i, j], drawn, x[:, i, j])
    return x


# ---- two other quantizers


class SimVQ(nn.Module):
    """Codes are one learned linear map of frozen random vectors, so that all of them move whichever are used."""

    def __init__(self, cfg):
        super().__init__()
        self.beta, self.linear = cfg.beta, nn.Linear(cfg.code_dim, cfg.code_dim, bias=False)
        self.register_buffer("frozen", torch.randn(cfg.codes, cfg.code_dim) * cfg.code_dim**-0.5)
        nn.init.eye_(self.linear.weight)

    def forward(self, z):
        z_q, indices, _ = nearest_code(z, self.linear(self.frozen))
        loss = F.mse_loss(z.detach(), z_q) + self.beta * F.mse_loss(z, z_q.detach())
        return straight_through(z, z_q), indices, loss

    def lookup(self, indices):
        return self.linear(F.embedding(indices, self.frozen))


class FSQ(nn.Module):
    """Each number is bounded and rounded to one of a few levels; the code is what they are together."""

    def __init__(self, cfg):
        super().__init__()
        levels = torch.tensor(cfg.levels, dtype=torch.float32)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", torch.cumprod(F.pad(levels[:-1], (1, 0), value=1), 0).long(), persistent=False)

    def bound(self, z):
        """Into the open range that rounds to {0 .. levels - 1}."""
        shift = torch.atanh((self.levels + 1) % 2 / (self.levels - 1))  # so that z = 0 is a level, not between two
        return (torch.tanh(z - shift) + 1) * (self.levels - 1) / 2

    def forward(self, z):
        bounded = self.bound(z)
        digits = bounded.detach().round()
        z_q = self.scale(straight_through(bounded, digits))
        return z_q, (digits.long() * self.basis).sum(-1), z.new_zeros(())

    def scale(self, digits):
        return 2 * digits / (self.levels - 1) - 1  # [-1,1]

    def lookup(self, indices):
        return self.scale(indices[..., None] // self.basis % self.levels)


# ---- the networks of stage 1


class GroupNormSiLU(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(math.gcd(channels, max(channels // 8, 1)), channels)

    def forward(self, x):
        return group_norm_silu(x, self.num_groups, self.weight, self.bias)


def zero(layer):
    """Start a residual branch at nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.conv1 = GroupNormSiLU(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = GroupNormSiLU(width), zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class SelfAttention(nn.Module):
    """Of every position over all, one head."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), zero(nn.Linear(width, width))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = self.qkv(self.norm(tokens))[:, None].chunk(3, 3)
        return x + self.proj(attention(q, k, v)[:, 0]).transpose(1, 2).view_as(x)


def residual(width, blocks):
    return nn.Sequential(*(ResBlock(width) for _ in range(blocks)))


class Encoder(nn.Sequential):
    """Half the resolution by folding 2 x 2 pixels into channels, then by a convolution of stride 2 each time."""

    def __init__(self, channels, D, widths, blocks):
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, widths[0], 3, padding=1)]
        for w, lower in zip(widths, [*widths[1:], None], strict=True):
            layers += [residual(w, blocks), *([nn.Conv2d(w, lower, 3, 2, 1)] if lower else [SelfAttention(w), ResBlock(w)])]
        super().__init__(*layers, GroupNormSiLU(widths[-1]), nn.Conv2d(widths[-1], D, 1))


class Decoder(nn.Sequential):
    """All but the last convolution, whose weight the adaptive weight asks for: z_q (B,D,h,w) -> (B,width,H/2,W/2)."""

    def __init__(self, D, widths, blocks):
        layers = [nn.Conv2d(D, widths[-1], 3, padding=1), ResBlock(widths[-1]), SelfAttention(widths[-1])]
        for w, upper in zip(widths[::-1], [*widths[-2::-1], None], strict=True):
            layers += [residual(w, blocks)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(w, upper, 3, padding=1)] if upper else [GroupNormSiLU(w)]
        super().__init__(*layers)


class Discriminator(nn.Module):
    """x (B,C,H,W) -> a score for every patch of about 23 x 23 pixels, and the features below them."""

    def __init__(self, channels, width=32):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1),
                                    nn.Conv2d(2 * width, 4 * width, 3, padding=1)])
        self.out = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, x):
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return self.out(x), features


# ---- the loops

# What may differ from the checkpoint when it is resumed, evaluated or sampled from; the rest is the run's own.
FREE = """mode data_dir steps minutes device amp compile kernels out resume overwrite num_samples log_every save_every
    sampler temperature top_k top_p sample_size label complete""".split()


def choose(cfg, H, W):
    """cfg, with what the size of the images decides where nothing was said."""
    side = min(H, W)
    cfg.downsample = cfg.downsample or (2 if side < 16 else 4 if side <= 64 else 8)
    cfg.code_dim = cfg.code_dim or (8 if cfg.quantizer == "simvq" else 16)
    if cfg.downsample not in (2, 4, 8, 16):
        raise ValueError(f"--downsample {cfg.downsample}: must be 2, 4, 8 or 16")
    if min(cfg.levels) < 3:
        raise ValueError(f"--levels {' '.join(map(str, cfg.levels))}: must be at least 3")
    if len(cfg.sample_size) != 2:
        raise ValueError("--sample-size: takes a height and a width")
    return cfg


def over_ranks(x):
    """The rows of x (N,...) of all processes, in the order of the one process that would have the whole batch."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def photos(size, count=512, seed=0):
    """Random crops of the two photographs of scikit-learn (427 x 640): of the left three quarters to train on, or what is
    left of a crop's width; of the rest to test on. Class 0 is the temple, class 1 the flower."""
    from sklearn.datasets import load_sample_images

    rng, parts = np.random.default_rng(seed), []
    if size > 320:
        fail(f"--image-size {size}: must be at most 320 for photos, so that crops to train and to test on do not overlap")
    for n, test in ((count, False), (count // 8, True)):
        crops = []
        for image in load_sample_images().images:
            H, W, _ = image.shape
            edge = W - max(size, W // 4)
            first, last = (edge, W - size) if test else (0, edge - size)
            at = zip(rng.integers(H - size + 1, size=n), rng.integers(first, last + 1, size=n), strict=True)
            crops += [torch.from_numpy(image[i:i + size, j:j + size].copy()).permute(2, 0, 1) for i, j in at]
        parts += [torch.stack(crops), torch.arange(2).repeat_interleave(n)]
    return Data(*parts, 2)


def load_lpips(device, side):
    """LPIPS with VGG features: (x_hat, x) of 1 or 3 channels in [-1,1] -> their mean distance, a number."""
    if side < 16:
        fail(f"--perceptual lpips: halves images four times, so they need at least 16 pixels a side, not {side}")
    try:
        import lpips
        net = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as e:  # it is not there, needs a torchvision that is not, or finds no weights and no network
        fail(f"--perceptual lpips: needs the package lpips and its weights ({e}); --perceptual features needs neither")
    return lambda *images: net(*(x.expand(-1, 3, -1, -1) for x in images)).mean()


def to_uint8(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights with the power profile of Karras et al. 2024, eq. 127, whose width grows with the run."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def encode(model, images, run):
    """The codes (N,h,w) of images (N,C,H,W) uint8."""
    codes = []
    for x in images.split(at_once(images.shape[1:])):
        run.check()
        codes.append(model.quantizer(model.encode(x.to(run.device) / 127.5 - 1))[1].cpu())
    return torch.cat(codes)


def train(nets, data, cfg, run):
    """No schedule knows when the run will end, so it may be stopped, or continued for longer, at any step of either stage."""
    model, D, prior, ema, ema_prior = nets.values()
    trained = [[p for p in net.parameters() if p.requires_grad] for net in (model, D, prior)]
    optimizers = [torch.optim.Adam(p, betas=betas, fused=True) for p, betas in zip(  # each step sets the rate
        trained, ((0.5, 0.9), (0.5, 0.9), (0.9, 0.99)), strict=True)]
    parts = nets | {f"optimizer_{name}": o for name, o in zip(("model", "D", "prior"), optimizers, strict=True)}
    lpips = load_lpips(run.device, min(data.train.shape[2:])) if cfg.perceptual == "lpips" else None
    run.begin(parts)
    for net in (model.encoder, model.decoder, prior) if cfg.compile else ():
        net.compile()
    codes, as_trained = None, dataclasses.replace(cfg, sample_size=(0, 0))  # larger grids wait for the end
    for step in run.steps():
        first = step < cfg.stage1
        since = step if first else step - cfg.stage1  # steps of this stage before
        lr = (cfg.lr if first else cfg.prior_lr) * min(1, (since + 1) / (cfg.warmup + 1), (cfg.decay / (since + 1)) ** 0.5)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        if step in (cfg.disc_start, cfg.stage1):  # other metrics from here on
            run.sums.clear()
        if first:
            x = run.batch(data)[0] / 127.5 - 1
            D.requires_grad_(False)
            with run.autocast():
                loss, terms, x_hat = loss_autoencoder(model, D, x, step, cfg, lpips)
            norm = run.update(loss, model, optimizers[0])
            D.requires_grad_(True)
            if "adversarial" in terms:
                with run.autocast():
                    terms["loss_d"] = loss_discriminator(D, x, x_hat)
                run.update(terms["loss_d"], D, optimizers[1])
            update_ema(ema, model, since, cfg.ema)
        else:
            if codes is None:
                try:
                    codes = data._replace(train=encode(ema, data.train, run))
                except SystemExit:  # stopped, and this step is not done
                    run.step -= 1
                    run.save(parts)
                    raise
            batch, y = run.batch(codes)
            with run.autocast():
                loss = nll(prior, batch, y).mean() / batch[0].numel()
            terms = {"bits_per_code": loss / math.log(2)}
            norm = run.update(loss, prior, optimizers[2], "--prior-lr")
            update_ema(ema_prior, prior, since, cfg.ema)
        run.log(loss=loss, **terms, grad_norm=norm, lr=lr)
        if run.step % cfg.save_every == 0:
            run.save(parts)
            run.show(reconstruct(ema, data.test[:40], run) if first else
                     generate(ema, ema_prior, 80, data.train.shape[2:], data.classes, as_trained, run)[0])
    run.save(parts)
    run.check()


@torch.no_grad()
def reconstruct(ema, images, run):
    """Each image, uint8, and what the decoder makes of its codes, one behind the other."""
    x_hat = []
    for x in images.split(at_once(images.shape[1:])):
        run.check()
        x_hat.append(to_uint8(ema(x.to(run.device) / 127.5 - 1)[0]))
    return torch.stack([images, torch.cat(x_hat)], 1).flatten(0, 1)


@torch.no_grad()
def evaluate(ema, prior, data, cfg, run):
    """Of the whole test split: errors of its reconstruction, which is written out, and bits a code; use of the codes."""
    pairs = reconstruct(ema, data.test, run)
    x, x_hat = pairs[::2], pairs[1::2]
    write(run.out / "reconstructions.npz", lambda f: np.savez_compressed(
        f, images=x_hat.permute(0, 2, 3, 1).numpy(), labels=data.test_labels.numpy()))
    save_grid(pairs[:80], run.out / "reconstructions.png", 10)
    error = (x.float() - x_hat.float()) / 255
    metrics = {"test_l1": error.abs().mean().item(), "test_mse": error.square().mean().item()}
    metrics["test_psnr"] = -10 * math.log10(max(metrics["test_mse"], 1e-10))
    metrics["usage"], metrics["perplexity"] = usage(encode(ema, data.train, run), ema.codes)
    codes, nats = encode(ema, data.test, run), 0.0
    for part, y in zip(*(a.split(at_once(x.shape[1:])) for a in (codes, data.test_labels)), strict=True):
        run.check()
        nats += nll(prior, part.to(run.device), y.to(run.device)).cpu().double().sum().item()
    return metrics | {"test_bits_per_code": nats / codes.numel() / math.log(2), "codes_per_image": codes[0].numel()}


def generate(ema, prior, n, size, classes, cfg, run):
    """n images (n,C,H,W) uint8 and labels (n,), from the averaged weights and the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.arange(n) % max(classes, 1) if cfg.label is None else torch.full((n,), cfg.label)
    H, W = (wanted or trained for wanted, trained in zip(cfg.sample_size, size, strict=True))
    images = []
    for y in labels.split(at_once((3, H, W))):
        run.check()
        noise = torch.rand(len(y), *(-(-n // cfg.downsample) for n in (H, W)), generator=generator).to(run.device)
        codes = sample(prior, y.to(run.device), noise, cfg)
        with torch.no_grad():
            images.append(to_uint8(ema.decode(ema.quantizer.lookup(codes))[..., :H, :W]))
    return torch.cat(images), labels


@torch.no_grad()
def show_completions(ema, prior, data, cfg, run, each=4):
    """complete.png: in a row a test image, the part that is given (the rest grey), and completions. The encoder sees the
    given part alone, which is a half rounded down to whole codes."""
    x, y = data.test[:16], data.test_labels[:16].to(run.device).repeat_interleave(each)
    f, size = cfg.downsample, x.shape[2:]
    h, w = (n // 2 // f if cfg.complete == side else -(-n // f) for n, side in zip(size, ("top", "left"), strict=True))
    known = np.s_[..., :h * f, :w * f]
    noise = torch.rand(len(y), *(-(-n // f) for n in size), generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
    given = torch.full_like(noise, -1, dtype=torch.long)
    if h and w:
        given[:, :h, :w] = encode(ema, x[known], run).to(run.device).repeat_interleave(each, 0)
    drawn = ema.decode(ema.quantizer.lookup(sample(prior, y, noise, cfg, given)))[..., :size[0], :size[1]]
    half = torch.full_like(x, 128)
    half[known] = x[known]
    rows = torch.cat([x[:, None], half[:, None], to_uint8(drawn).unflatten(0, (-1, each))], 1)
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
        crops = cfg.dataset == "photos" and not Path("photos").is_dir()
        data = photos(cfg.image_size or 128) if crops else load_data(cfg.dataset, cfg.data_dir, cfg.image_size)
        if not cfg.labels:
            data = data._replace(train_labels=0 * data.train_labels, test_labels=0 * data.test_labels, classes=0)
        run.describe(data)
    (C, H, W), classes = run.facts["shape"], run.facts["classes"]
    if cfg.label is not None and cfg.label >= classes:
        fail(f"--label {cfg.label}: the model knows {classes} classes")
    torch.manual_seed(cfg.seed)
    try:
        choose(cfg, H, W)
        model, D = Autoencoder(C, cfg), Discriminator(C)
        prior = Prior(model.codes, -(-H // cfg.downsample), -(-W // cfg.downsample), classes, cfg)
    except ValueError as e:
        fail(str(e))
    nets = {"model": model.to(memory_format=torch.channels_last), "discriminator": D, "prior": prior}
    nets |= {name: copy.deepcopy(net).eval().requires_grad_(False) for name, net in (("ema", model), ("ema_prior", prior))}
    nets = {name: net.to(run.device) for name, net in nets.items()}
    ema, prior = nets["ema"], nets["ema_prior"]
    if cfg.mode == "train":
        train(nets, data, cfg, run)
        run.curves()
    else:
        run.restore({"ema": ema, "ema_prior": prior})
    if run.rank > 0:
        return
    if run.step <= cfg.stage1:
        print(f"note: step {run.step}: stage 1 takes {cfg.stage1} steps, so the transformer is untrained", file=sys.stderr)
    if cfg.mode != "sample":
        m = evaluate(ema, prior, data, cfg, run)
        run.write_metrics(final=True, **m)
        print(f"{len(data.test)} test images reconstructed: L1 {m['test_l1']:.4f}, PSNR {m['test_psnr']:.1f} dB; of {ema.codes}"
              f" codes {100 * m['usage']:.1f} % in use, perplexity {m['perplexity']:.1f}; {m['test_bits_per_code']:.3f} bits a "
              f"code, {m['codes_per_image']} codes an image (of the code, not of the pixels)")
    if cfg.mode != "eval":
        start = time.monotonic()
        images, labels = generate(ema, prior, cfg.num_samples, (H, W), classes, cfg, run)
        seconds = time.monotonic() - start
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": labels.numpy()} if classes else {})
        write(run.out / "samples.npz", lambda f: np.savez_compressed(f, **arrays))
        save_grid(images[:80], run.out / "samples.png", min(len(images), 10))
        print(f"{len(images)} samples in {seconds:.2f} s, in {run.out / 'samples.npz'}, the first in {run.out / 'samples.png'}")
    if cfg.complete != "no":
        show_completions(ema, prior, data, cfg, run)
    run.check()


if __name__ == "__main__":
    launch(main)
