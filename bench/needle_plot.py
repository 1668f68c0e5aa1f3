"""Right answers by length and depth, from the results of ``nautile eval needle``: a picture and the rows of a table.

    python bench/needle_plot.py [bench/results/needle*.json] [--out docs/images/needle.png]

A cell is a fifth of the depth at one length; its number is right answers of trials. Of several results for a variant and a
length the one with most trials counts.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]


def cells(paths):
    """{variant: {length: (cell, file name)}}, lengths in order."""
    best = {}
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        for variant, lengths in result["needle"].items():
            for length, cell in lengths.items():
                known = best.setdefault(variant, {}).get(int(length))
                if cell["total"] and (known is None or known[0]["total"] < cell["total"]):
                    best[variant][int(length)] = (cell, path.name)
    return {variant: dict(sorted(found.items())) for variant, found in best.items() if found}


def draw(found, out):
    """One panel a variant: lengths from left to right, depth from top to bottom."""
    figure = Figure(figsize=(3.2 * len(found) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (variant, lengths) in zip(panels, found.items(), strict=True):
        parts = [cell["by_depth"] for cell, _ in lengths.values()]
        share = [[column[row][0] / column[row][1] if column[row][1] else float("nan") for column in parts] for row in range(5)]
        image = panel.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for x, column in enumerate(parts):
            for y, (right, total) in enumerate(column):
                panel.text(x, y, f"{right}/{total}" if total else "–", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths])
        panel.set_yticks(range(5), [f"{20 * row}-{20 * row + 20} %" for row in range(5)])
        panel.set_title(variant)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=list(panels), label="right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "needle.png")
    options = parser.parse_args()
    found = cells(options.results or sorted((ROOT / "bench" / "results").glob("needle*.json")))
    draw(found, options.out)
    for variant, lengths in found.items():
        for length, (cell, name) in lengths.items():
            depths = " ".join(f"{right}/{total}" for right, total in cell["by_depth"])
            bounds = f"{100 * cell['low']:.0f}-{100 * cell['high']:.0f} %"
            print(f"| {variant} | {length:,} | {cell['passed']}/{cell['total']} | {bounds} | {depths} | {name} |")


if __name__ == "__main__":
    main()
