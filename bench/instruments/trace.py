"""profile=true: one more step of every rank as a trace for Perfetto, communication in lanes of its own."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from bench.instruments.step import Workload, run_step
from conf.measurement import Span

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
    write_trace(with_lanes(json.loads(file.read_text())), file)


def write_trace(content: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def with_lanes(content: dict) -> dict:
    """The trace with every collective, from start to completion, in a lane of its kind, not in its caller's thread."""
    events = content["traceEvents"]
    sent = [event for event in events if event.get("ph") == "X" and event["name"].startswith(BACKENDS)]
    for event in sent:
        event["tid"] = f"communication: {event['name']}"
    for process, lane in sorted({(event["pid"], event["tid"]) for event in sent}):
        events.append(named(process, lane, lane))
    return content


def in_lanes(spans: list[Span]) -> dict:
    """A predicted step in the same form: a lane for each stream and axis, and one for what is waited for."""
    lanes = list(dict.fromkeys(lane_of(span) for span in spans))
    events = [
        {
            "ph": "X",
            "name": span.name,
            "cat": "predicted",
            "pid": PREDICTED,
            "tid": lanes.index(lane_of(span)),
            "ts": span.begun,
            "dur": span.done - span.begun,
        }
        for span in spans
    ]
    return {"traceEvents": [*events, *(named(PREDICTED, tid, lane) for tid, lane in enumerate(lanes))]}


def lane_of(span: Span) -> str:
    return "exposed" if span.waited else span.lane


def named(process: Any, tid: Any, lane: str) -> dict:
    return {"ph": "M", "name": "thread_name", "pid": process, "tid": tid, "args": {"name": lane}}


PREDICTED = "predicted"
