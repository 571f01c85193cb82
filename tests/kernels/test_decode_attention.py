"""decode_attention, one share of the cache and several."""

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, assert_near, nbytes, traffic

import kernels
from kernels import decode_attention as module
from kernels.attention import attention
from kernels.decode_attention import decode_attention, decode_attention_reference, decode_attention_torch


def cache(T=300, head_dim=16, n_head=2, dtype=torch.float32):
    q, k, v = (torch.randn(2, n_head, t, head_dim, device=DEVICE).to(dtype) for t in (1, T, T))
    return q, k, v


@pytest.mark.parametrize("chunk", [256, 64])
@pytest.mark.parametrize("length", [1, 49, 256, 300])
def test_decode(length, chunk, monkeypatch):
    monkeypatch.setattr(module, "DECODE_CHUNK", chunk)
    q, k, v = cache(head_dim=64, n_head=1)
    k[:, :, length:], v[:, :, length:] = float("nan"), float("nan")  # not yet written
    want = decode_attention_reference(q.double(), k.double(), v.double(), length)
    assert_near(decode_attention(q, k, v, length), want, 2e-5)
    assert_near(decode_attention_torch(q, k, v, length), want, 2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-11)])
def test_decode_types(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(module, "DECODE_CHUNK", 32)
    q, k, v = cache(100, 80, 1, dtype)
    want = decode_attention_reference(q.double(), k.double(), v.double(), 100)
    y = decode_attention(q, k, v, 100)
    assert y.dtype == dtype
    assert_near(y, want, tolerance)


def test_decode_of_an_empty_cache():
    q, k, v = cache(5)
    for f in (decode_attention, decode_attention_torch):
        y = f(q, k * float("nan"), v * float("nan"), 0)
        assert y.shape == q.shape and (y == 0).all()


def test_decode_of_strided_caches_and_huge_scores():
    """A cache that lies (B, T, n_head, head_dim), a q from a permuted layer, scores of some thousands."""
    q, k, v = cache(60)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2) * 3000
    assert_near(decode_attention(q, k, v, 60), decode_attention_reference(q.double(), k.double(), v.double(), 60), 1e-3)
    k = torch.randn(2, 2, 16, 60, device=DEVICE).transpose(2, 3)
    assert_near(decode_attention(q, k, v, 9), decode_attention_reference(q.double(), k.double(), v.double(), 9), 1e-3)


def test_decode_is_the_last_row_of_causal():
    q, k, v = torch.randn(3, 1, 2, 20, 16, device=DEVICE)
    assert_near(decode_attention(q[:, :, -1:], k, v, 20), attention(q, k, v, "causal")[:, :, -1:], 1e-5)


def test_the_reference_is_pytorchs():
    q, k, v = (x.double() for x in cache(9))
    torch.testing.assert_close(decode_attention_reference(q, k, v, 7),
                               F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7]))


def test_decode_says_that_it_has_no_gradients(monkeypatch):
    q, k, v = cache(5)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        decode_attention(q, k, v, 5)
    with torch.no_grad():
        assert not decode_attention(q, k, v, 5).requires_grad
    monkeypatch.setattr(kernels, "mode", "auto")
    for length in (0, 5):
        (gradient,) = torch.autograd.grad(decode_attention(q, k, v, length).sum(), q)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [-1, 6])
def test_decode_of_what_does_not_fit(length):
    q, k, v = cache(5)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q, k, v, length)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(k, k, v, 3)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:1], k, v, 3)


def test_decode_as_a_custom_operator(monkeypatch):
    monkeypatch.setattr(module, "DECODE_CHUNK", 256)
    q, k, v = cache(600, 32, 1)
    torch.library.opcheck(module._decode, (q, k, v, 600))
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: decode_attention(q * 2, k, v, 600).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), decode_attention(q * 2, k, v, 600).sin())
    assert torch.equal(module._decode(q, k, v, 600), module._decode(q, k, v, 600))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("length", [200, 1024])
def test_decode_bytes(length):
    q, k, v = cache(1024, 64, 1)
    with traffic() as moved:
        module._decode(q, k, v, length)
    least = nbytes(k[:, :, :length], v[:, :, :length], q, q)
    assert least <= moved.total <= 1.05 * least
