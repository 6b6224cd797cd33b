"""Every column of a row, once: its name, its unit, what it means, where it comes from and where it is shown.

record.json, results.csv, the terminal's table and the report's are made from this list. The keys of a configuration are
columns too (conf/keys.py); here is what is measured, and who measured it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

from conf import tiers
from conf.clock import COLLECTIVES
from conf.keys import MISSING, OF_A_MACHINE, Config, keys, plain, section_in
from conf.measurement import NOISY, Entry, Host, Measured, Predicted, percentile, worst
from conf.sizes import unit

COMM_COLUMNS = [entry.name for entry in fields(Entry) if entry.name != "weights"]
MIB = 2**20
SERIES = list[float | None]  # a number that is not finite is none in JSON


@dataclass(frozen=True)
class Column:
    """A column of results.csv and a field of record.json.

    of: its value in what was measured; None where somebody else writes it. head: its heading where tables show it, in
    units of `scale`, as `form` has it (of bytes `over` says which); in_terminal: there too, or in the report alone.
    timed: it needs a clock. in_csv: or in record.json alone. doubt: the column that is true where this value is to be
    shown as ~value. holds: the type of its value, where it has one.
    """

    name: str
    unit: str
    says: str
    of: Callable[[Any], Any] | None = None
    head: str = ""
    form: str = "{:,.4g}"
    scale: float = 1
    in_terminal: bool = True
    timed: bool = False
    in_csv: bool = True
    doubt: str = ""
    holds: Any = float

    def text(self, row: Mapping) -> str:
        """The row's value as tables show it; nothing where it has none."""
        value = row.get(self.name)
        if value is None or value != value:
            return ""
        doubted = str(row.get(self.doubt)) == "True"
        return "~" * doubted + self.form.format(value / self.scale if self.scale != 1 else value)

    def over(self, rows: Iterable[Mapping]) -> "Column":
        """The same in a table of these rows: bytes in the unit in which most of them are read."""
        values = [value for row in rows if (value := row.get(self.name)) and value == value] if self.unit == "B" else []
        if not values:
            return self
        of, name = unit(median(values))
        return replace(self, head=f"{self.head} {name}", scale=of, form=self.form if of == MIB else "{:,.2f}")


def clock(
    name: str,
    unit: str,
    says: str,
    of: Callable[[Measured], Any],
    head: str = "",
    form: str = "{:,.4g}",
    doubt: str = "",
) -> Column:
    return Column(name, unit, says, of, head, form, timed=True, doubt=doubt)


def bytes_of(
    name: str,
    says: str,
    of: Callable[[Measured], Any],
    head: str = "",
    form: str = "{:,.1f}",
    in_terminal: bool = True,
) -> Column:
    return Column(name, "B", says, of, head, form, MIB, in_terminal)


def predicted(name: str, says: str, of: Callable[[Predicted], float], head: str = "") -> Column:
    return Column(name, "ms", f"predicted: {says}", lambda m: m.predicted and of(m.predicted), head, "{:,.1f}")


def predicted_tokens_per_s(m: Measured) -> float | None:
    return tokens_per_s(m, m.predicted.step_ms) if m.predicted else None


def predicted_mfu(m: Measured) -> float | None:
    """Of what a peak is published for, which is 16 bits."""
    if m.predicted is None or m.config.cluster is None or m.config.precision == "fp32":
        return None
    return m.flops / m.predicted.step_ms / 1e9 / m.config.cluster.bf16_dense_tflops


def capacity(measured: Measured) -> int | None:
    cluster = measured.config.cluster
    return cluster.capacity_bytes if cluster else None


def context(measured: Measured) -> int | None:
    cluster = measured.config.cluster
    return cluster.context_bytes if cluster else None


TIGHT = 0.9  # of the capacity: published runs that held more were slow, or failed


def fits(measured: Measured) -> str | None:
    """How the fullest rank, with its context, fits into the cluster's GPU."""
    has, held = capacity(measured), measured.fullest.peak.total + (context(measured) or 0)
    if has is None:
        return None
    return "oom" if held > has else "tight" if held > TIGHT * has else "ok"


def on_hosts(what: Callable[[Host], Any]) -> Callable[[Measured], str | None]:
    """What hosts say, each different answer once."""

    def said(m: Measured) -> str | None:
        answers = (what(host) for host in tiers.machines(m))
        return "; ".join(dict.fromkeys(str(answer) for answer in answers if answer)) or None

    return said


def links(host: Host) -> str:
    """The kinds of links between a host's GPUs."""
    kinds = {kind for name, others in host.links.items() for other, kind in others.items() if other in host.links}
    return ", ".join(sorted(kinds))


def card(host: Host) -> str | None:
    speed = f" {host.interface_mbit} Mbit/s" if host.interface_mbit else ""
    return f"{host.interface}{speed}" if host.interface else None


def busiest_load(when: str) -> Callable[[Measured], float | None]:
    return lambda m: max((getattr(host, when) for host in tiers.machines(m)), default=None)


def between_hosts(m: Measured) -> int:
    return max(tiers.to_other_hosts(m.config, rank) for rank in m.ranks)


def tokens_per_s(m: Measured, step_ms: float) -> float:
    return m.config.batch_size * m.config.seq_len / step_ms * 1000


WHO = [
    Column("run_id", "", "hash of what of the configuration is not as by default; the row's folder", holds=str),
    Column("status", "", "ok, invalid, oom, timeout or error", holds=str),
    Column("reason", "", "why, in a sentence", holds=str),
]
ON = [
    Column(
        "device_name", "", "of the processor, or of the simulated cluster", lambda m: m.first.device_name, holds=str
    ),
    Column("backend", "", "of the collectives", lambda m: m.first.backend, holds=str),
]
OF_A_STEP = [
    # Times: of the slowest rank of each step, medians over the timed steps.
    clock("step_ms_median", "ms", "a step; ~ where noisy", lambda m: m.step_ms, "step ms", "{:,.1f}", "noisy"),
    clock("step_ms_p10", "ms", "of the steps, the 10th percentile", lambda m: percentile(m.laps["step"], 0.1)),
    clock("step_ms_p90", "ms", "of the steps, the 90th percentile", lambda m: percentile(m.laps["step"], 0.9)),
    Column(
        "noisy",
        "",
        f"do steps, or rounds, spread (p10 to p90) over {NOISY:.0%} of their median",
        lambda m: m.noisy,
        timed=True,
        holds=bool,
    ),
    clock("forward_ms", "ms", "forward", lambda m: median(m.laps["forward"])),
    clock("backward_ms", "ms", "backward", lambda m: median(m.laps["backward"])),
    clock("optimizer_ms", "ms", "clipping, AdamW, new weights sent", lambda m: median(m.laps["optimizer"])),
    clock(
        "cpu_ms_max",
        "ms",
        "CPU time of a step, of the busiest rank: with more ranks than cores imbalance shows here alone",
        lambda m: max(m.cpu_ms),
    ),
    clock("cpu_ms_min", "ms", "CPU time of a step, of the idlest rank", lambda m: min(m.cpu_ms)),
    clock("tokens_per_s", "1/s", "over all ranks", lambda m: tokens_per_s(m, m.step_ms), "tokens/s", "{:,.0f}"),
    clock("iterations_per_s", "1/s", "steps", lambda m: 1000 / m.step_ms),
    clock(
        "exposed_comm_ms",
        "ms",
        "of exposed_comm=true: the step less the same step with collectives that return at once",
        lambda m: m.exposed_comm_ms,
        "exposed ms",
        "{:.1f}",
    ),
    clock(
        "exposed_offload_ms",
        "ms",
        "of offload: what a step waits for copies to and from the host's memory",
        lambda m: m.exposed_offload_ms,
    ),
    clock(
        "ideal_ms",
        "ms",
        "of workload=attention: one process' time for the whole, divided perfectly",
        lambda m: median(m.ideal) if m.ideal else None,
    ),
    clock("share_of_ideal", "", "ideal_ms over the step's time", lambda m: m.share_of_ideal, "of ideal", "{:.0%}"),
    Column(
        "flops_per_rank",
        "FLOP",
        "matrix products, and the query-key pairs that the mask lets through, of the rank that does most",
        lambda m: m.flops,
    ),
    Column(
        "attention_work_max_by_mean",
        "",
        "query-key pairs that the mask lets through, of the rank with most over the ranks' mean",
        lambda m: m.work_max_by_mean,
    ),
    Column("analytic_flops_per_rank", "FLOP", "what the strategy's account says of it", lambda m: m.derived_flops),
    clock("tflops_per_rank", "TFLOP/s", "flops_per_rank over the step's time", lambda m: m.tflops),
    clock(
        "mfu", "", "tflops_per_rank over the GPU's peak", lambda m: m.tflops / m.peak_tflops if m.peak_tflops else None
    ),
    # Of mode=simulate, by the clock of its cluster. Nothing of it is measured.
    predicted("predicted_step_ms", "a step", lambda p: p.step_ms, "predicted ms"),
    predicted("predicted_forward_ms", "forward", lambda p: p.laps.get("forward", 0.0)),
    predicted("predicted_backward_ms", "backward", lambda p: p.laps.get("backward", 0.0)),
    predicted("predicted_optimizer_ms", "clipping, AdamW, new weights sent", lambda p: p.laps.get("optimizer", 0.0)),
    predicted("predicted_exposed_comm_ms", "of a step, waiting for collectives", lambda p: p.exposed_comm_ms),
    Column("predicted_tokens_per_s", "1/s", "over all ranks", predicted_tokens_per_s),
    Column("predicted_mfu", "", "flops_per_rank over the predicted time, and that over the GPU's peak", predicted_mfu),
    Column(
        "predicted_parts",
        "ms",
        "what a predicted step computes, and what it waits for",
        lambda m: m.predicted and {"work": m.predicted.work, "exposed": m.predicted.exposed},
        in_csv=False,
        holds=dict,
    ),
    # Memory: of the fullest rank at its fullest moment. On CPU, what a kernel frees before it returns is not seen.
    bytes_of("peak_bytes", "at most, the sum of its five parts", lambda m: m.fullest.peak.total, "peak"),
    bytes_of("param_bytes", "of these, weights of this rank", lambda m: m.fullest.peak.params),
    bytes_of("grad_bytes", "their gradients", lambda m: m.fullest.peak.grads),
    bytes_of("optimizer_bytes", "the optimizer's state", lambda m: m.fullest.peak.optimizer),
    bytes_of(
        "activation_bytes",
        "kept from forward for backward",
        lambda m: m.fullest.peak.activations,
        "activations",
        in_terminal=False,
    ),
    bytes_of("other_bytes", "gathered weights, buffers, the batch", lambda m: m.fullest.peak.other),
    bytes_of(
        "peak_reserved_bytes",
        "by CUDA's allocator",
        lambda m: max((rank.reserved for rank in m.ranks if rank.reserved is not None), default=None),
    ),
    bytes_of("after_forward_bytes", "held when forward ends", lambda m: max(rank.after_forward for rank in m.ranks)),
    bytes_of("host_bytes", "of offload, in the host's memory", lambda m: max(rank.host_bytes for rank in m.ranks)),
    bytes_of("capacity_bytes", "memory of the cluster's GPU", capacity),
    bytes_of("context_bytes", "of it, what a process holds before it begins, beside the peak", context),
    Column("fits", "", "peak and context: ok, tight (over 90 % of the capacity) or oom", fits, "fits", "{}", holds=str),
    Column("max_seq_len", "tokens", "of search=max_seq_len: the longest that fits", head="longest", form="{:,}"),
    # Bytes sent: of the busiest rank in a step, by the bandwidth-optimal algorithm of each collective.
    bytes_of("comm_bytes", "in all, the sum of comm.csv", lambda m: m.sent(), "sent", "{:,.2f}"),
    bytes_of("comm_bytes_forward", "in forward", lambda m: m.sent("forward")),
    bytes_of("comm_bytes_backward", "in backward, recomputation included", lambda m: m.sent("backward", "recompute")),
    bytes_of("comm_bytes_optimizer", "by the optimizer", lambda m: m.sent("optimizer")),
    bytes_of("comm_bytes_params", "of these, weights and their gradients", lambda m: m.sent(weights=True)),
    bytes_of("comm_bytes_activations", "activations and theirs", lambda m: m.sent(weights=False)),
    bytes_of("comm_bytes_inter", "to other hosts, of the rank that sends most there", between_hosts),
    bytes_of("comm_bytes_intra", "the rest of comm_bytes, within a host", lambda m: m.sent() - between_hosts(m)),
    bytes_of("analytic_comm_bytes", "what the strategy's account says that it sends", lambda m: m.derived_bytes),
    Column("busiest_rank", "", "whose bytes these are, and the calls below, and comm.csv", lambda m: m.busiest.rank),
    *(
        Column(f"calls_{kind}", "", f"calls of {kind} in a step", lambda m, kind=kind: m.calls(kind))  # type: ignore[misc]
        for kind in COLLECTIVES
    ),
    # Results.
    Column(
        "loss_first",
        "nats",
        "of the first step, warm-up included",
        lambda m: m.first.losses[0] if m.first.losses else None,
    ),
    Column("loss_last", "nats", "of the last step", lambda m: m.first.losses[-1] if m.first.losses else None),
    Column(
        "relative_error",
        "",
        "of workload=attention: how far output or gradients are from one process', at most, on any rank",
        lambda m: max(m.errors.values(), key=worst, default=None),
    ),
    Column("losses", "nats", "of every step", lambda m: m.first.losses, in_csv=False, holds=SERIES),
    Column("steps_ms", "ms", "each timed step", lambda m: m.steps_ms, timed=True, in_csv=False, holds=SERIES),
    Column(
        "steps_bytes",
        "B",
        "of every step, on the fullest rank: CUDA's allocator at most, or what the process has resident after it",
        lambda m: m.steps_bytes,
        timed=True,
        in_csv=False,
        holds=SERIES,
    ),
    Column("errors", "", "of the output and each gradient", lambda m: m.errors, in_csv=False, holds=dict),
    Column("round_ms", "ms", "a step, of each round", lambda m: m.round_ms, timed=True, in_csv=False, holds=SERIES),
]
WHERE = [
    Column("mode_seconds", "s", "how long the ranks of the row took in all", lambda m: m.seconds),
    # Of several hosts, what differs is told in their order.
    Column("hosts", "", "among which the ranks are shared out", lambda m: tiers.hosts(m.config)),
    Column("ranks_per_host", "", "of them, on each", lambda m: tiers.ranks_per_host(m.config)),
    Column("host_names", "", "where it ran", on_hosts(lambda host: host.name), holds=str),
    Column("kernel", "", "of the operating system", on_hosts(lambda host: host.kernel), holds=str),
    Column("governor", "", "of the CPU's clock", on_hosts(lambda host: host.governor), holds=str),
    Column("power_limit", "W", "of the GPU", on_hosts(lambda host: max(host.power_limits_w, default=None)), holds=str),
    Column("gpu_links", "", "between GPUs of a host, as nvidia-smi topo -m names them", on_hosts(links), holds=str),
    Column("nic", "", "network interface over which ranks talked, and its speed", on_hosts(card), holds=str),
    Column("load_before", "", "processes that wanted a core in the minute before", busiest_load("load_before")),
    Column("load_after", "", "and in the last minute, of the busiest host", busiest_load("load_after")),
    Column("torch_version", "", "gloo's too, which is part of it", lambda m: m.first.torch_version, holds=str),
    Column("nccl_version", "", "", on_hosts(lambda host: host.nccl), holds=str),
    Column("driver_version", "", "of the GPUs", on_hosts(lambda host: host.driver), holds=str),
    Column(
        "machines",
        "",
        "all that the hosts tell of themselves",
        lambda m: [asdict(host) for host in tiers.machines(m)],
        in_csv=False,
        holds=list[dict],
    ),
]
MEASURED = [*ON, *OF_A_STEP, *WHERE]
WHERE_FROM = [
    Column("git_sha", "", "the commit", holds=str),
    Column("git_dirty", "", "was the checkout changed since", holds=bool),
    Column("command", "", "reproduces the row", holds=str),
    Column("started_at", "UTC", "when", holds=str),
]


def asked() -> Iterator[Column]:
    """A column for each key."""
    for key in keys().values():
        holds = dict if section_in(key.hint) else key.hint
        yield Column(key.column, "", key.says, in_csv=not key.of_any_names, holds=holds)


def columns() -> list[Column]:
    """Every column, in the order of results.csv."""
    return [*WHO, *asked(), *MEASURED, *WHERE_FROM]


def csv_columns() -> list[str]:
    return [column.name for column in columns() if column.in_csv]


def described(config: Config) -> dict[str, Any]:
    """The columns that say what was asked for."""
    values = {key.column: plain(key.of(config)) for key in keys().values()}
    return {name: None if value == MISSING else value for name, value in values.items()}


def measured(found: Measured) -> dict[str, Any]:
    """The columns that say what came out; of what runs no step, where it ran."""
    said = MEASURED if found.config.workload not in OF_A_MACHINE else [*ON, *WHERE]
    return {
        column.name: column.of(found) for column in said if column.of is not None and (found.timed or not column.timed)
    }
