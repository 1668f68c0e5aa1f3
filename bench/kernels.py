"""Kernels of V4-Flash's shape on one GPU beside their floors and peers: the same as ``nautile bench kernels``.

python bench/kernels.py --out bench/results/kernels_h100.json --commit HASH
"""

import sys

from nautile.cli import app

if __name__ == "__main__":
    app(["bench", "kernels", *sys.argv[1:]])
