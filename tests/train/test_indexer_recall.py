"""bench/indexer_recall.py, small: what may not move does not, results replace their like, the rest of the file stays."""

import importlib.util
import json
import sys
from pathlib import Path

import torch

BENCH = Path(__file__).parents[2] / "bench" / "indexer_recall.py"


def test_results_of_variants_go_into_one_file(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("indexer_recall", BENCH)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "indexer_recall", bench)
    spec.loader.exec_module(bench)
    out = tmp_path / "results.json"
    like = {"variant": "shipped", "layer": 4, "length": 768, "steps": 0}
    out.write_text(json.dumps({"earlier": "stays", "variants": [{**like, "old": 1}, {**like, "layer": 2}]}))
    names = ("shipped", "kl-fast", "matched-long")
    threads = str(torch.get_num_threads())
    bench.main(["--tiny", "--threads", threads, "--variants", *names, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["earlier"] == "stays"
    other, *found = result["variants"]
    assert other == {**like, "layer": 2}
    shipped, alone, both = found
    assert tuple(one["variant"] for one in found) == names and "old" not in shipped
    assert shipped["before"] == shipped["after"] == alone["before"] == both["before"]
    assert alone["after"]["recall"] != alone["before"]["recall"] and alone["after"]["moved"] == 0
    assert both["after"]["best"] != alone["after"]["best"] == shipped["after"]["best"]  # only its attention is another
    assert all(one["after"]["held"] <= one["after"]["best"] for one in found)
