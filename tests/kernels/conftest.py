"""Kernels are tested as Triton kernels: on the GPU where there is one, in the interpreter everywhere."""

import pytest
import torch

import kernels


@pytest.fixture(scope="session", autouse=True)
def patch_once():
    """The interpreter patches triton.language anew at every call of a function in a kernel; once a launch is enough."""
    if not kernels.INTERPRETING:
        yield
        return
    from triton.runtime import interpreter

    done, original = set(), interpreter._patch_lang

    def patch_lang(fn):
        found = {id(m) for m in fn.__globals__.values() if m is interpreter.tl or m is interpreter.tl.core}
        if found <= done:  # within a launch; what a function in a kernel would return is not used
            return None
        done.update(found)
        scope = original(fn)
        restore = scope.restore
        scope.restore = lambda: (done.clear(), restore())
        return scope

    interpreter._patch_lang = patch_lang
    yield
    interpreter._patch_lang = original


@pytest.fixture(autouse=True)
def as_triton(monkeypatch):
    """The mode is "triton"; what is allocated but not written reads as NaN, so that a missed store shows."""
    if kernels.triton is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(kernels, "mode", "triton")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # plain forms are compared to float32's digits
    yield
    torch.use_deterministic_algorithms(False)
