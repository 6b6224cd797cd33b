"""record.json of one configuration: what it must be, so that whoever reads it can rely on it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from conf.columns import columns, described
from conf.files import FileFault, read_json
from conf.keys import HUGE, MISSING, OF_A_MACHINE, Config, keys, not_of
from conf.resolve import check_value
from conf.words import Invalid

STATUSES = ("ok", "invalid", "oom", "timeout", "error")
NEEDED = ("run_id", "status", "reason", "started_at", "strategy", "seq_len")
NEEDED_OF_A_STEP = ("peak_bytes", "comm_bytes")


def read(file: Path) -> tuple[dict[str, Any], Config | None]:
    """A record, and its configuration; what was refused before it could be resolved holds none.

    What an older version did not say of a configuration was as by default. Raises FileFault with what is wrong.
    """
    record = read_json(file)
    try:
        config = config_in(record)
    except Invalid as fault:
        raise FileFault(f"{file}: no record (config: {fault})") from None
    if config is not None:
        said = {name: value for name, value in record.items() if value is not None}
        record = {**record, **described(config), **said}
    if (wrong := next(faults(record, file.parent.name), None)) is not None:
        raise FileFault(f"{file}: no record ({wrong})")
    return record, config


def config_in(record: Mapping) -> Config | None:
    """Raises Invalid for a configuration that could not be: it would mislead whoever computes with it."""
    if record.get("config") is None:
        return None
    config = Config.of(record["config"])
    for path, key in keys().items():
        value = key.of(config)
        if value is not None and value != MISSING:
            check_value(path, key.declared.metadata, value)
    return config


def faults(record: Mapping, folder: str) -> Iterator[str]:
    """What is wrong with a record that lies in this folder, a sentence each."""
    needed_if_ok = ("config", *(NEEDED_OF_A_STEP if record.get("workload") not in OF_A_MACHINE else ()))
    for name in (*NEEDED, *(needed_if_ok if record.get("status") == "ok" else ())):
        if record.get(name) is None:
            yield f"it has no {name}"
    for column in columns():
        value = record.get(column.name)
        if value is not None and (fault := not_of(column.holds, value) or not_finite(value)):
            yield f"{column.name}={short(value)} {fault}"
    if record["status"] not in STATUSES:
        yield f"status={short(record['status'])} is not one of {', '.join(STATUSES)}"
    if record["run_id"] != folder:
        yield f"run_id={short(record['run_id'])} is that of another folder"


def not_finite(value: Any) -> str | None:
    """JSON has no such numbers, Python's has; nor can one be shown that no float can be."""
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    finite = (abs(number) < HUGE for number in numbers if isinstance(number, (int, float)))
    return None if all(finite) else "is not finite"
