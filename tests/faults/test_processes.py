"""A run of several processes of which one is killed: the others end, each with one line, and the run can be resumed."""

import os
import signal

import pytest

import tiny
from tiny import SCRIPTS, assert_same_state, error_line, flags, load_checkpoint, make_data, metrics


def few_images(module):
    module.load_data = lambda *args: make_data(module)


def run_as_rank(name, argv, rank):
    tiny.run_script(name, argv, few_images)


def killed_in_step_5(name, argv, victim, rank):
    """The victim dies in the middle of step 5, when the checkpoint of step 4 is there."""
    def arrange(module):
        few_images(module)
        batch = module.Run.batch

        def die(self, data):
            if self.step == 5 and self.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(self, data)
        module.Run.batch = die
    tiny.run_script(name, argv, arrange)


CASES = [("gan", 2, 0), ("vqgan", 4, 2)]  # in the ordinary run; the block that meets the fault is the same in all six
if os.environ.get("M2_ALL_VARIANTS"):
    CASES += [*((name, 2, 1) for name in SCRIPTS), ("gan", 4, 0)]


@pytest.mark.parametrize("name, world, victim", CASES)
def test_one_killed_ends_the_others(name, world, victim, tmp_path):
    out = tmp_path / "run"
    argv = flags(name, out, "--steps", 6)
    children = tiny.start_ranks(tmp_path / "killed", world, killed_in_step_5, name, argv, victim)
    for rank, child in enumerate(children):
        assert child.join(120) == (-signal.SIGKILL if rank == victim else 1), child.stderr
        if rank != victim:
            assert f"another process cannot be reached; --resume continues {out}" in error_line(child.stderr)
    assert load_checkpoint(out)["step"] == 4
    straight = tmp_path / "straight"
    ends = {"resumed": [*argv, "--resume"], "undisturbed": flags(name, straight, "--steps", 6)}
    for what, args in ends.items():
        for child in tiny.start_ranks(tmp_path / what, world, run_as_rank, name, args):
            assert child.join() == 0, child.stderr
    assert_same_state(load_checkpoint(straight), load_checkpoint(out))
    assert metrics(straight) == metrics(out)
