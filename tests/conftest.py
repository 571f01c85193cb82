import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
if not torch.cuda.is_available():  # before triton is imported: kernels run on CPU tensors, in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Benchmarks run once and untimed unless asked for with --benchmark-only."""
    if not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = True


@pytest.fixture(scope="session")
def data_dir():
    """Folder that holds mnist/ and fashion_mnist/; tests that need it are skipped where there is none."""
    for place in (os.environ.get("M2_DATA_DIR"), ROOT / "data", ROOT.parent / "shared" / "data"):
        if place and (Path(place) / "mnist").is_dir():
            return str(place)
    pytest.skip("no copy of MNIST (set M2_DATA_DIR)")
