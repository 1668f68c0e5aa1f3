"""Kernels of V4-Flash's shape on one GPU beside their floors and peers: as ``nautile bench kernels``, without what the command
line of the package needs.

    python bench/kernels.py --out bench/results/kernels_h100.json --commit HASH
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from nautile.kernels.measure import CASES, VARIANTS, CardLostError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--variants", action="store_true", help="ways to compute the same, and the fastest of each shape")
    parser.add_argument("--resume", action="store_true", help="go on behind the cases in --out, and the one a run ended in")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on an NVIDIA GPU (compute capability 8.0 or newer), with PyTorch's CUDA build")
    cases = [case for case in (VARIANTS if options.variants else CASES) if options.only in case.name]
    about = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": options.commit}
    try:
        run(cases, about, options.out, resume=options.resume, told=lambda line: print(line, flush=True))
    except CardLostError as error:
        print(error, flush=True)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()
