"""Writes fixtures/session_v1*: a session of the tiny test network in file format 1, exported and as a directory. The files
are kept as they are; a new format gets files of its own.

python tests/state/make_fixture.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from nautile.state import SessionStore, fingerprint
from state.pools import feed, model, new_pool, row


def main() -> None:
    torch.set_num_threads(1)
    out = Path(__file__).parent / "fixtures"
    out.mkdir(exist_ok=True)
    pool = new_pool()
    pool.fingerprint = fingerprint(model().config, model().state_dict())
    sequence = pool.open(row(0))
    logits = feed(pool, sequence, row(0)[:300])[-1]
    with tempfile.TemporaryDirectory() as directory:
        store = SessionStore(Path(directory))
        store.save("fixture", pool, sequence, logits, note="format version 1")
        store.export("fixture", out / "session_v1.nautile")
        shutil.copytree(directory, out / "sessions_v1", ignore=shutil.ignore_patterns(".lock"))
    following = feed(pool, sequence, row(1)[:20])[-1]
    expected = {
        "model": pool.fingerprint,
        "logits": logits.tolist(),
        "next_ids": list(row(1)[:20]),
        "next_logits": following.tolist(),
    }
    (out / "session_v1.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
