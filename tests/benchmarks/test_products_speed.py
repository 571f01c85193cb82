"""Products of float32 matrices on a CPU, by MKL and by oneDNN, and attention of few positions by each: the reason for
kernels.fast_products. pytest tests/benchmarks/test_products_speed.py --benchmark-only"""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import _products

LIBRARIES = {"MKL": "ieee", "oneDNN": "bf16"}  # by what products may be rounded to


@pytest.fixture(params=LIBRARIES)
def library(request):
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = LIBRARIES[request.param]
    yield request.param
    settings.fp32_precision = before


@pytest.mark.parametrize("M, K, N", [(784, 128, 512), (784, 512, 128), (16, 128, 512), (1, 128, 512)])
def test_linear(library, M, K, N, benchmark):
    """A layer of a transformer, of 16 images of 49 positions, and of one position in sampling."""
    x = torch.randn(M, K)
    weight = torch.randn(N, K)
    benchmark.extra_info["GFLOP"] = 2 * M * K * N / 1e9
    with torch.no_grad():
        benchmark(F.linear, x, weight)


def pytorch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def products(q, k, v):
    return _products(q, k, v, True, None)


@pytest.mark.parametrize("form", [pytorch, products], ids=lambda form: form.__name__)
@pytest.mark.parametrize("T", [49, 196])
def test_attention_forward_and_backward(library, T, form, benchmark):
    """16 images, 4 heads of 32 numbers, causal, as autoregressive.py has it."""
    x = torch.randn(3, 16, 4, T, 32, requires_grad=True)

    def step():
        form(*x).sum().backward()
        x.grad = None

    benchmark(step)
