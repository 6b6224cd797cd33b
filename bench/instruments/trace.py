"""profile=true: one more step of every rank as a trace for Perfetto, communication in lanes of its own."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from bench.instruments.step import Workload, run_step

BACKENDS = ("gloo:", "nccl:")  # how the names of their events begin


def trace(training: Workload, batches: Iterable[Any], file: Path) -> None:
    """Run a step and write its trace."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if training.strategy.mesh.device == "cuda" else [])
    with profile(activities=activities) as profiler, ExitStack() as span:

        def reach(part: str) -> None:
            span.close()
            span.enter_context(record_function(part))

        run_step(training, batches, reach)
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))
    file.write_text(json.dumps(with_lanes(json.loads(file.read_text()))))


def with_lanes(content: dict) -> dict:
    """The trace with every collective, from start to completion, in a lane of its kind, not in its caller's thread."""
    events = content["traceEvents"]
    sent = [event for event in events if event.get("ph") == "X" and event["name"].startswith(BACKENDS)]
    for event in sent:
        event["tid"] = f"communication: {event['name']}"
    for process, lane in sorted({(event["pid"], event["tid"]) for event in sent}):
        events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": lane, "args": {"name": lane}})
    return content
