"""Keep the plumbing block byte-identical in every script.

    python tools/sync.py --check             # exit 1 and name the scripts whose block differs
    python tools/sync.py --from vae.py       # copy the block of vae.py into the others
"""

import argparse
import sys
from pathlib import Path

SCRIPTS = ("vae.py", "flow.py", "gan.py", "autoregressive.py", "diffusion.py", "vqgan.py")
BEGIN, END = "# ======== plumbing", "# ======== end of the plumbing"  # the beginnings of the two marker lines


def split(path):
    """(before, block, after) of a script, the marker lines belonging to the block."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    begins, ends = ([i for i, line in enumerate(lines) if line.startswith(mark)] for mark in (BEGIN, END))
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        sys.exit(f"error: {path} must hold one line that begins with '{BEGIN}' and, below it, one with '{END}'")
    return "".join(lines[: begins[0]]), "".join(lines[begins[0] : ends[0] + 1]), "".join(lines[ends[0] + 1 :])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare only")
    action.add_argument("--from", dest="source", metavar="SCRIPT", choices=SCRIPTS, help="the script to copy from")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="folder of the scripts")
    args = parser.parse_args(argv)
    paths = [args.root / name for name in SCRIPTS if (args.root / name).exists()]
    if not paths:
        sys.exit(f"error: {args.root} holds none of {', '.join(SCRIPTS)}")
    if args.source and args.root / args.source not in paths:
        sys.exit(f"error: {args.root / args.source} does not exist")
    parts = {path: split(path) for path in paths}
    if args.check:
        blocks = {path: block for path, (_, block, _) in parts.items()}
        reference = next(iter(blocks), None)
        drifted = [path.name for path, block in blocks.items() if block != blocks[reference]]
        if drifted:
            sys.exit(f"error: the plumbing of {', '.join(drifted)} differs from that of {reference.name}; "
                     f"python tools/sync.py --from SCRIPT copies one over the others")
        print(f"the plumbing is the same in {', '.join(path.name for path in paths)}")
    else:
        block = parts[args.root / args.source][1]
        for path, (before, old, after) in parts.items():
            if old != block:
                path.write_text(before + block + after, encoding="utf-8", newline="\n")
                print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
