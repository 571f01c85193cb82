import os
import sys
from pathlib import Path

import pytest

# before torch is imported: one of several processes has one core, and so has what it starts
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():  # before triton is imported: kernels run on CPU tensors, in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


if not Path("/proc/self").is_dir():  # macOS, Windows: these read /proc, limit what a process may use, or send signals
    collect_ignore_glob = ["faults/*", "test_chaos.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Benchmarks run once and untimed unless asked for with --benchmark-only."""
    if not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = True


def pytest_xdist_auto_num_workers(config):
    """A process a core; none beside this one where something is timed, or where all would share one GPU."""
    if config.getoption("benchmark_only", False) or torch.cuda.is_available():
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture(autouse=True)
def no_disk_to_wait_for(monkeypatch):
    """Files are written as ever, but not forced to the disk: no test cuts the power, and each run would wait a dozen times."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def data_dir():
    """Folder that holds mnist/ and fashion_mnist/; tests that need it are skipped where there is none."""
    for place in (os.environ.get("M2_DATA_DIR"), ROOT / "data", ROOT.parent / "shared" / "data"):
        if place and (Path(place) / "mnist").is_dir():
            return str(place)
    pytest.skip("no copy of MNIST (python diffusion.py --dataset mnist downloads it to data/, or set M2_DATA_DIR)")
