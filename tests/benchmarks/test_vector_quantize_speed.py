"""nearest_code at a script's shape, at larger ones, and with more codes; cdist is what one would write without it.

    pytest tests/benchmarks/test_vector_quantize_speed.py --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F
from bench import DEVICE, IMPLS, PASSES, cases, count, peak_bytes, run

import kernels
from kernels.vector_quantize import BUFFER, nearest_code, nearest_code_reference, nearest_code_torch

CASES = {  # name: (vectors, codes, dimensions)
    "vqgan, mnist": (32 * 7 * 7, 256, 16),
    "16384x256x64": (16384, 256, 64),
    "65536x1024x64": (65536, 1024, 64),
    "16384x4096x64": (16384, 4096, 64),
    "8192x16384x64": (8192, 16384, 64),
}


def nearest_code_cdist(z, codebook):
    indices = torch.cdist(z, codebook).argmin(1)
    return F.embedding(indices, codebook), indices


FORMS = {"reference": nearest_code_reference, "plain": nearest_code_torch, "triton": nearest_code, "cdist": nearest_code_cdist}


def case_of(N, K, D, dtype=torch.float32):
    """Vectors about codes, as a trained encoder's are: far enough from all others that every form finds the same."""
    torch.manual_seed(0)
    codebook = torch.randn(K, D, device=DEVICE)
    z = codebook[torch.randint(0, K, (N,), device=DEVICE)] + torch.randn(N, D, device=DEVICE) / 4
    return z.to(dtype), codebook.to(dtype)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("impl", (*IMPLS, "cdist"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32], ids=str)
@cases(CASES, ("vqgan, mnist", "65536x1024x64"))
def test_nearest_code(benchmark, case, dtype, impl, passes):
    if impl == "cdist" and dtype != torch.float32:
        pytest.skip("cdist takes float32 and float64 only")
    N, K, D = CASES[case]
    N = count(benchmark, N, 64)
    z, codebook = case_of(N, K, D, dtype)
    size = z.element_size() * D
    ideal = {"forward": 2 * N * size + 8 * N + K * size, "backward": N * size + 8 * N + K * size}
    run(benchmark, f"nearest_code {case} {dtype}", impl, passes, FORMS, (z, codebook), ideal,
        flops={"forward": 2 * N * K * D, "backward": 0})


def memory(form, N, K, D=64):
    """Bytes beyond the inputs that a form holds at once, outputs included."""
    z, codebook = case_of(N, K, D)
    form(z, codebook)
    return peak_bytes(lambda: form(z, codebook))


@pytest.fixture
def plain_mode(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")


def test_memory_grows_with_the_vectors_alone(plain_mode):
    """Linearly as N grows by 2, 4 and 8: what the outputs have, or one chunk and little more. Beyond a chunk not as K grows."""
    sizes = {N: memory(nearest_code, N, 512) for N in (16384, 32768, 65536, 131072)}
    outputs, chunk = 64 * 4 + 8, 4 * BUFFER["cpu"]
    for N, size in sizes.items():
        assert N * outputs <= size <= max(N * outputs, chunk * 1.2 + N * 32) + 65536, sizes
    assert sizes[131072] <= 2.02 * sizes[65536] <= 4.04 * sizes[32768]
    assert memory(nearest_code, 4096, 8192) <= 1.05 * memory(nearest_code, 4096, 2048)


def test_memory_is_a_tenth_of_that_of_cdist(plain_mode):
    assert 10 * memory(nearest_code, 65536, 1024) < memory(nearest_code_cdist, 65536, 1024)
