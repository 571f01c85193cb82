"""The operations as layers, where users of torch.nn expect them. `kernels.mode` says what runs in them too.

    norm = GroupNormSiLU(32, 256)                             # loads the weights of nn.GroupNorm
    conv = MaskedConv2d(64, 128, 3, mask_type="B")            # loads those of nn.Conv2d
    gated = GatedMaskedConv2d(64, 64, (1, 3), mask_type="A")  # loads those of nn.Conv2d(64, 128, (1, 3))
    y, log_det = AffineCoupling(net, 8)(x)                    # x, minus_log_det = coupling.inverse(y)
    y, log_det = SplineCoupling(net, 8)(x)
    z_q, indices, loss = VectorQuantizer(512, 64)(z)          # decay=0.99: the codebook follows moving averages

The maths, sources and costs of each stand in the file of its operation; the errors are those of that operation.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import accumulator
from .coupling import affine_coupling, spline_coupling
from .group_norm import group_norm_silu
from .masked_conv import gated_masked_conv2d, live_taps, masked_conv2d
from .vector_quantize import nearest_code, straight_through, sum_and_count

__all__ = ["GroupNormSiLU", "MaskedConv2d", "GatedMaskedConv2d", "AffineCoupling", "SplineCoupling", "VectorQuantizer"]


class GroupNormSiLU(nn.GroupNorm):
    """nn.GroupNorm and nn.SiLU in one pass. x (B, num_channels, *) floating -> the same shape, type and layout.

    Parameters and state_dict are nn.GroupNorm's, weight and bias (num_channels,), which are always there. Wu and He 2018.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__(num_groups, num_channels, eps, affine=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class MaskedConv2d(nn.Conv2d):
    """A convolution in which a pixel sees only those before it in raster order. x (B, C, H, W) -> (B, N, H, W).

    mask_type: "A" without the pixel itself, "B" with it, "vertical A" and "vertical B" for rows above alone, without and
    with the own row. kernel_size: a number or two, odd; stride 1, zeros around the image. Parameters, their first values
    and state_dict are nn.Conv2d's: weight (N, C, kh, kw), of which the dead taps are neither read nor trained, and bias.
    Van den Oord et al. 2016 (Pixel RNN).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], mask_type: str = "B",
                 bias: bool = True, device=None, dtype=None):
        super().__init__(in_channels, out_channels, kernel_size, padding="same", bias=bias, device=device, dtype=dtype)
        live_taps(type(self).__name__, self.kernel_size, mask_type)
        self.mask_type = mask_type

    def forward(self, x: Tensor) -> Tensor:
        return masked_conv2d(x, self.weight, self.bias, self.mask_type)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_type={self.mask_type!r}"


class GatedMaskedConv2d(MaskedConv2d):
    """tanh(p) * sigmoid(q) of the halves p and q of a masked convolution's 2N channels. x (B, C, H, W) -> (B, N, H, W).

    out_channels is N. Parameters and state_dict are those of nn.Conv2d(C, 2N, kernel_size): weight (2N, C, kh, kw), bias
    (2N,). Van den Oord et al. 2016 (Conditional PixelCNN), eq. 2 and 4.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], mask_type: str = "B",
                 bias: bool = True, device=None, dtype=None):
        super().__init__(in_channels, 2 * out_channels, kernel_size, mask_type, bias, device, dtype)
        self.out_channels = out_channels

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """cond is added to p and q: (B, 2N) or (B, 2N, 1, 1) for all pixels alike, or (B, 2N, H, W)."""
        return gated_masked_conv2d(x, self.weight, self.bias, cond, self.mask_type)


class AffineCoupling(nn.Module):
    """y = x * exp(log_s) + shift of one half, where conditioner(the other half) gives log_s and shift. Invertible.

    With split, x[:, :split] is kept: conditioner takes (B, split, *) to (B, 2 (C - split), *), first raw log-scales, then
    shifts. With a mask, which broadcasts to x.shape[1:], x is kept where the mask is not 0: conditioner takes x * (mask != 0),
    (B, C, *), to (B, 2C, *). s_max > 0 bounds |log_s|. A conditioner whose last layer is zero makes the identity, a good start.
    forward and inverse give (y, log |det dy/dx|), the latter (B,), and hand what else they are given to the conditioner.
    Dinh et al. 2017.
    """

    def __init__(self, conditioner: nn.Module, mask_or_split: int | Tensor, s_max: float = 2.0):
        super().__init__()
        self.conditioner = conditioner
        self.split = mask_or_split if isinstance(mask_or_split, int) else None
        self.s_max = s_max
        self.register_buffer("mask", None if isinstance(mask_or_split, int) else mask_or_split != 0)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log_det) of x (B, C, *)."""
        return self._couple(x, context, reverse=False)

    def inverse(self, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(x, log_det of the inverse) of y (B, C, *), where forward(x) is y."""
        return self._couple(y, context, reverse=True)

    def _couple(self, x: Tensor, context: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, Tensor]:
        kept = x[:, :self.split] if self.mask is None else x * self.mask  # the same in x and y
        mask_or_split = self.split if self.mask is None else self.mask
        return affine_coupling(x, self.conditioner(kept, *context), mask_or_split, reverse, self.s_max)

    def extra_repr(self) -> str:
        kept = f"split={self.split}" if self.mask is None else f"mask={tuple(self.mask.shape)}"
        return f"{kept}, s_max={self.s_max}"


class SplineCoupling(nn.Module):
    """A monotonic rational-quadratic spline of one half, where conditioner(the other half) gives its knots. Invertible.

    x[:, :split] is kept: conditioner takes (B, split, *) to (B, (C - split) (3K - 1), *), for each channel K raw widths, K
    raw heights and K - 1 raw derivatives of K bins over [-tail_bound, tail_bound], in the units of x; outside is the identity.
    forward and inverse give (y, log |det dy/dx|), the latter (B,), and hand what else they are given to the conditioner.
    Durkan et al. 2019.
    """

    def __init__(self, conditioner: nn.Module, split: int, tail_bound: float = 3.0):
        super().__init__()
        self.conditioner = conditioner
        self.split = split
        self.tail_bound = tail_bound

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log_det) of x (B, C, *)."""
        return self._couple(x, context, reverse=False)

    def inverse(self, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """(x, log_det of the inverse) of y (B, C, *), where forward(x) is y."""
        return self._couple(y, context, reverse=True)

    def _couple(self, x: Tensor, context: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, Tensor]:
        kept = x[:, :self.split]  # the same in x and y
        y, log_det = spline_coupling(x[:, self.split:], self.conditioner(kept, *context), self.tail_bound, reverse)
        return torch.cat([kept, y], 1), log_det

    def extra_repr(self) -> str:
        return f"split={self.split}, tail_bound={self.tail_bound}"


class VectorQuantizer(nn.Module):
    """The nearest of K codes for every vector. z (..., D) floating -> (z_q, indices, loss). For images (B, D, H, W) give
    z.movedim(1, -1).

    z_q (..., D), in the type of z: the codes, with the gradient of z (straight through). indices (...) int64 in [0, K).
    loss, to be added to the model's, in float32 (float64 for float64), means over elements: beta |z - sg(z_q)|^2, which keeps
    z near its code, and without decay |sg(z) - z_q|^2, which trains the codebook.

    codebook (K, D) is a parameter; with decay, 0 to 1, it is a buffer instead, and follows moving averages of the vectors
    that took each code, in training mode, over all processes of torch.distributed. A state_dict of one form has the codebook
    of the other. Codes that nothing takes are left as they are. Van den Oord et al. 2017, eq. 1 to 3; with decay eq. 6 to 8.
    """

    def __init__(self, n_codes: int, dim: int, beta: float = 0.25, decay: float | None = None, device=None, dtype=None):
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay {decay} must be at least 0 and below 1, or None")
        super().__init__()
        self.beta = beta
        self.decay = decay
        codebook = torch.randn(n_codes, dim, device=device, dtype=dtype)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(n_codes, device=device, dtype=dtype))  # N_k
            self.register_buffer("sums", codebook.clone())  # m_k

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_q, indices = nearest_code(z, self.codebook)
        z_wide = z.to(accumulator(z))
        z_q_wide = z_q.to(accumulator(z))
        loss = self.beta * F.mse_loss(z_wide, z_q_wide.detach())
        if self.decay is None:
            loss = loss + F.mse_loss(z_q_wide, z_wide.detach())
        elif self.training:
            self._update(z.detach(), indices)
        return straight_through(z, z_q), indices, loss

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of indices (...) in [0, K): (..., D)."""
        return F.embedding(indices, self.codebook)

    @torch.no_grad()
    def _update(self, z: Tensor, indices: Tensor) -> None:
        n_codes = len(self.codebook)
        sums, counts = sum_and_count(z, indices, n_codes)  # (K, D), (K,)
        sums = sums.to(self.sums)
        counts = counts.to(self.counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        self.counts.lerp_(counts, 1 - self.decay)  # eq. 6
        self.sums.lerp_(sums, 1 - self.decay)  # eq. 7
        taken = self.counts > 1e-6  # lately: what is left of the others' sums says nothing
        self.codebook.copy_(torch.where(taken[:, None], self.sums / self.counts[:, None], self.codebook))  # eq. 8

    def extra_repr(self) -> str:
        n_codes, dim = self.codebook.shape
        return f"{n_codes}, {dim}, beta={self.beta}, decay={self.decay}"
