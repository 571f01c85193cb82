"""Keep of a run what sampling needs: a small checkpoint to pass on.

  python tools/strip.py RUN FOLDER                  # for instance runs/diffusion-mnist pretrained/diffusion-mnist

RUN is the folder of a trained run of any of the six scripts. FOLDER/checkpoint.pt gets the networks that the script's
load() reads (the averaged weights), the config and the facts of the data; not the optimizer, nor the weights that were
being trained. It is read as any other: `load(FOLDER)`, `--mode sample --out FOLDER`, `--init FOLDER`. It cannot be resumed.
Prints the size and the SHA-256 of the file.
"""

import argparse
import hashlib
import importlib
import io
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts, from whatever directory this is run

from sync import SCRIPTS

ABOUT = ("format", "script", "config", "facts", "step", "seconds")


def script_of(folder):
    """The module of the script that the run in a folder is of. Exits with 1 and one line where there is none."""
    path = Path(folder, "checkpoint.pt")
    try:
        name = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["script"]
    except Exception as e:  # whatever a missing or damaged file raises
        sys.exit(f"error: {path}: no checkpoint of a run: {type(e).__name__}")
    if f"{name}.py" not in SCRIPTS:
        sys.exit(f"error: {path}: of no script here: {name}")
    return importlib.import_module(name)


def strip(run, folder):
    """Write FOLDER/checkpoint.pt -> its bytes."""
    script = script_of(run)
    with mock.patch.object(script, "restore", wraps=script.restore) as restore:
        script.load(run)
    kept = [name for call in restore.call_args_list for name in call.args[0]]
    _, saved = script.read_run(run)
    state = {name: saved[name] for name in ABOUT} | {name: saved[name] for name in kept}
    state["log_size"] = 0
    torch.save(state, buffer := io.BytesIO())
    script.write(Path(folder, "checkpoint.pt"), lambda f: f.write(buffer.getbuffer()), f"averaged weights of {run}")
    return buffer.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("folder", help="folder of the checkpoint to write")
    args = parser.parse_args(argv)
    data = strip(args.run, args.folder)
    print(f"{len(data) / 1e6:.2f} MB, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
