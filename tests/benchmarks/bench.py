"""One way to time every kernel: reference, fastest plain PyTorch, that compiled, and Triton, on the same inputs."""

import time
from functools import lru_cache

import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("reference", "plain", "compiled", "triton")
PASSES = ("forward", "forward+backward")


@lru_cache(maxsize=1)
def bandwidth():
    """Bytes a second that the device's memory moves when a tensor is copied: the peak that percentages refer to."""
    x = torch.empty(1 << 26, device=DEVICE)
    x.clone()
    synchronize()
    start = time.perf_counter()
    for _ in range(4):
        y = x.clone()
    synchronize()
    return 8 * y.numel() * y.element_size() / (time.perf_counter() - start)


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes(f):
    """The most bytes that f() holds at once beyond what was there before, as the allocator of the device counts them."""
    if DEVICE == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run(benchmark, group, impl, passes, forms, inputs, ideal, tolerance=1e-3):
    """Time one implementation of a group, after checking it against the reference in the same run.

    forms: {"reference": f, "plain": f, "triton": f}, each (*inputs) -> tensor or tuple whose floating tensors are
    differentiated. ideal: least bytes of the pass, forward or forward and backward.
    """
    if impl == "triton" and DEVICE != "cuda":
        pytest.skip("needs a GPU: the interpreter is never timed")
    if impl == "compiled" and benchmark.disabled:
        pytest.skip("compiled only where it is timed")
    benchmark.group = f"{group}, {passes}"
    f = torch.compile(forms["plain"]) if impl == "compiled" else forms[impl]
    inputs = [x.detach().requires_grad_(passes != "forward") if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for x in inputs]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(f=f):
        out = f(*inputs)
        out = [y for y in (out if isinstance(out, tuple) else (out,)) if y.is_floating_point()] or [out]
        if passes != "forward":
            out = torch.autograd.grad([y.sum() for y in out if y.requires_grad], wanted, allow_unused=True)
        synchronize()
        return out

    mode, kernels.mode = kernels.mode, "triton" if impl == "triton" else "torch"
    try:
        start = time.perf_counter()
        got = call()
        first = time.perf_counter() - start
        for a, b in zip(got, call(forms["reference"]), strict=True):
            if a is not None:
                atol = tolerance * b.double().abs().max().item()
                torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=atol)
        del got, a, b
        extra = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "torch": torch.__version__,
                 "triton": getattr(kernels.triton, "__version__", None), "first_call_s": round(first, 4), "ideal_bytes": ideal}
        if not benchmark.disabled:
            extra["peak_mib"] = round(peak_bytes(call) / 2**20, 2)
        if DEVICE == "cuda" and not benchmark.disabled:
            from triton.testing import do_bench  # events around each call, the L2 cache flushed before it

            extra |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), do_bench(call, quantiles=(0.2, 0.5, 0.8)), strict=True))
        benchmark(call)
        if not benchmark.disabled:
            median = benchmark.stats.stats.median
            extra |= {"gb_s": round(ideal / median / 1e9, 2), "percent_of_peak": round(100 * ideal / median / bandwidth(), 1)}
        benchmark.extra_info.update(extra)
    finally:
        kernels.mode = mode
