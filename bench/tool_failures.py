"""What went wrong in the tasks that a measurement counts as failed: each is run again, and its conversation is kept.

    python bench/tool_failures.py bench/results/eval_tools_200.json [--out bench/results/tool_failures.json]

Decoding is greedy, so a task fails again as it did; "again" says whether it did. Tools run in this process.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from nautile.agent.loop import Agent
from nautile.agent.tools import TOOLS
from nautile.agent.workbench import InProcess
from nautile.cli.agent import open_client
from nautile.engine import EngineConfig
from nautile.evals.tools import EvalConfig, commit, device_name
from nautile.train.tasks import KINDS

ROOT = Path(__file__).resolve().parents[1]


def steps(ran):
    """(what it thought, what it did, what came back) of each turn."""
    results = {(record.step, record.index): record.output for record in ran.results}
    for number, reply in enumerate(ran.replies):
        calls = [f"{call.name} {call.arguments}" for call in reply.calls]
        outputs = [results.get((number, index), "")[:400] for index in range(len(calls))]
        yield {"reasoning": reply.reasoning, "calls": calls, "results": outputs, "content": reply.content}


def again(client, failure, held_out_wording):
    """One task once more."""
    task = KINDS[failure["kind"]].from_seed(failure["seed"], held_out_wording=held_out_wording)
    with tempfile.TemporaryDirectory() as scratch:
        root, state = Path(scratch, "work"), Path(scratch, "state")
        root.mkdir()
        task.write(root)
        ran = Agent(client, TOOLS, InProcess(root), budget=EvalConfig().budget, state=state).run(task.prompt)
        passed = ran.status == "answered" and task.grade(root, ran.answer)
    return {
        **{key: failure[key] for key in ("kind", "seed", "prompt", "expected")},
        "answer": ran.answer,
        "again": not passed,
        "steps": list(steps(ran)),
        "expert": [f"{step.tool} {json.dumps(dict(step.arguments), ensure_ascii=False)}" for step in task.steps],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tool_failures.json")
    options = parser.parse_args()
    measured = json.loads(options.result.read_text(encoding="utf-8"))
    began, version = time.monotonic(), commit()
    client = open_client(config=EngineConfig(precision=measured["dtype"], rows=measured["dtype"]))
    found = [again(client, failure, measured["held_out_wording"]) for failure in measured["failures"]]
    result = {
        "of": options.result.name,
        "failed_again": sum(one["again"] for one in found),
        "failures": found,
        "device": device_name(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": version,
        "seconds": round(time.monotonic() - began, 1),
    }
    options.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{result['failed_again']} of {len(found)} failed again; {options.out}")


if __name__ == "__main__":
    main()
