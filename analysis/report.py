"""runs/NAME/report/: index.html, self-contained; results.csv with the analytic columns; every picture as PNG and SVG.

Published, derived and counted stand side by side; where derived and counted differ the page says so in red, and the
command exits with 1.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import UserError, fits, interactive, results, sources, symbols
from analysis.accounts import account_of, none_of, predicted
from analysis.accounts.comparison import PHASES, compared
from analysis.accounts.letters import Letters
from analysis.accounts.sent import SHORT, Sent, total
from analysis.answers import answers
from analysis.examples import purest
from analysis.looks import colour, known
from analysis.measured import Pair, foretold
from analysis.mismatches import mismatches
from analysis.plots import PLOTS, draw_all, parity, save
from analysis.race import notes, race, verdict
from analysis.reading import Sweep, load
from analysis.table import written
from analysis.templates import TEMPLATES
from analysis.validate import PREDICTORS, coordinates, errors, told
from conf import meshes
from conf.columns import described
from conf.keys import Config
from conf.labels import title
from conf.series import summary

EXAMPLES = 4  # that are named of rows with one reason


def write(folder: Path) -> list[str]:
    """Write the report of a sweep; returns its problems, a sentence each, mismatches among them."""
    sweep = load(folder)
    target = folder / "report"
    (target / "plots").mkdir(parents=True, exist_ok=True)
    audits = audit_all(sweep)
    sweep.problems += mismatches(sweep)
    sweep.problems += [f"{a.label}, seq_len={a.seq_len}: {fault}" for a in audits for fault in a.faults]
    ours = [name for name in dict.fromkeys(sweep.ok.strategy) if name in meshes.STRATEGIES and name != "single"]
    if sweep.comm and ours:
        try:
            sources.write(ours, sweep, target / "sources.html")
        except UserError as error:
            sweep.problems.append(str(error))
    sweep.problems = list(dict.fromkeys(sweep.problems))
    pictures, left_out = draw(sweep, target / "plots")
    with_analytic(sweep, audits).to_csv(target / "results.csv", index=False)
    if races := race(sweep):
        pd.DataFrame(races).to_csv(target / "race.csv", index=False)
    pairs, lines = foretold(sweep), results.lines(sweep.steps)
    page = TEMPLATES.get_template("report.html").render(
        sweep=sweep,
        facts=facts(sweep),
        answers=answers(sweep),
        fits=fits.longest(sweep),
        shown=results.shown(sweep.steps.to_dict("records")),
        results=lines,
        has_keys=any(line.keys for line in lines),
        library={name: interactive.packed(name) for name in ("dt_bundle.js", "dt_bundle.css")},
        machine=of_machine(sweep),
        judged=judged(pairs) if pairs else [],
        parity=beside_each_other(pairs, target / "plots") if pairs else None,
        races=races,
        verdict=verdict(races),
        race_notes=notes(races),
        comparisons=comparisons(audits, sweep.ok),
        without_account=[none_of(name) for name in ours if known(name) is None],
        pictures=pictures,
        left_out=left_out,
        failures=failures(sweep),
        sources_page="sources.html" if (target / "sources.html").exists() else None,
    )
    (target / "index.html").write_text(page)
    return sweep.problems


def draw(sweep: Sweep, target: Path) -> tuple[list[dict], list[str]]:
    """Every picture as a file and for the page, and a sentence for each that the data does not allow."""
    figures, left_out = draw_all(sweep)
    return [picture(name, figure, PLOTS[name][1], target) for name, figure in figures.items()], left_out


def picture(name: str, figure: Figure, caption: str, target: Path) -> dict:
    save(figure, target, name)
    return {"name": name, "caption": caption, "svg": interactive.inlined(figure, name.replace("_", " "))}


# Predicted beside measured.


def judged(pairs: list[Pair]) -> list[dict]:
    """How far the replay is from what was measured, of each strategy and of all."""
    of = {**by_strategy(pairs), "all": pairs}
    return [
        {"strategy": name, "colour": colour(name), "rows": len(found), **told(errors(found, PREDICTORS["replay"]))}
        for name, found in of.items()
    ]


def beside_each_other(pairs: list[Pair], target: Path) -> dict:
    """The picture of it."""
    of = by_strategy(pairs)
    who = {name: [title(described(pair.config), []) for pair in found] for name, found in of.items()}
    figure = parity({name: coordinates(found) for name, found in of.items()}, {name: colour(name) for name in of}, who)
    return picture(
        "parity", figure, "Predicted by the machine's clock, which saw no step; measured by the rows above.", target
    )


def by_strategy(pairs: list[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.config.strategy.name, []).append(pair)
    return found


# Derived against counted.


@dataclass
class Audit:
    """One configuration's prediction beside its count, by phase and kind of collective; and of its state."""

    run_id: str
    label: str
    strategy: str
    seq_len: int
    lines: list[dict]
    kept: list[dict]
    derived: float
    faults: list[str]


def audit_all(sweep: Sweep) -> list[Audit]:
    """Of every configuration that has an account and a count."""
    audits = []
    for _, row in sweep.ok.iterrows():
        if row.run_id in sweep.configs and row.run_id in sweep.comm:
            config = sweep.configs[row.run_id]
            try:
                lines = predicted(config, sweep.records[row.run_id].get("busiest_rank"))
            except UserError as error:
                sweep.problems.append(str(error))
                continue
            if lines is not None:
                audits.append(audit(row, config, lines, sweep.comm[row.run_id]))
    return audits


def audit(row: pd.Series, config: Config, lines: list[Sent], comm: list[dict]) -> Audit:
    found = compared(lines, comm)
    table = [{**vars(each), "kind": SHORT[each.kind], "bytes": (round(each.bytes[0]), each.bytes[1])} for each in found]
    faults = [str(each) for each in found if not each.exact]
    kept = kept_by(row, config) if config.workload == "step" else []
    return Audit(row.run_id, row.label, row.strategy, int(row.seq_len), table, kept, total(lines), faults)


def kept_by(row: pd.Series, config: Config) -> list[dict]:
    """The state of the fullest rank, derived and counted."""
    account = account_of(row.strategy)
    counted = {"params": row.param_bytes, "grads": row.grad_bytes, "optimizer": row.optimizer_bytes}
    return [
        {"part": part, "derived": round(size), "counted": int(counted[part]), "exact": size == counted[part]}
        for part, size in (account.state(Letters.of(config)) if account else {}).items()
    ]


def with_analytic(sweep: Sweep, audits: list[Audit]) -> pd.DataFrame:
    """The rows again, with what was derived for them and the ratio of counted to derived."""
    rows = sweep.rows.drop(columns=["label", "config", "losses", "errors", "round_ms", "traceback"], errors="ignore")
    rows = rows.copy()  # pandas warns of many columns that were added one by one
    derived = {a.run_id: a for a in audits}
    rows["derived_comm_bytes"] = [round(derived[r].derived) if r in derived else None for r in rows.run_id]
    analytic = pd.to_numeric(rows.derived_comm_bytes).fillna(rows.analytic_comm_bytes)
    rows["counted_by_derived"] = (rows.comm_bytes / analytic).where(analytic > 0)
    for phase in PHASES:
        rows[f"derived_comm_bytes_{phase}"] = [
            sum(line["bytes"][0] for line in derived[r].lines if line["phase"] == phase) if r in derived else None
            for r in rows.run_id
        ]
    return rows


def comparisons(audits: list[Audit], rows: pd.DataFrame) -> list[dict]:
    """Per strategy: what was published, the derived formula, and one configuration's numbers, derived and counted."""
    found = []
    for strategy in dict.fromkeys(a.strategy for a in audits):
        of_this = [a for a in audits if a.strategy == strategy]
        shown_of = purest(strategy, rows[rows.run_id.isin(a.run_id for a in of_this)])
        plain = symbols.rows_of(strategy)[0]
        lines = plain.account.of_block(plain.letters)
        found.append(
            {
                "strategy": strategy,
                "colour": colour(strategy),
                "published": plain.account.published,
                "forward": symbols.collectives(lines, "forward"),
                "backward": symbols.collectives(lines, "backward", "optimizer"),
                "activations": written(symbols.sent(plain, weights=False)),
                "weights": written(symbols.sent(plain, weights=True)),
                "example": next(a for a in of_this if a.run_id == shown_of.run_id),
                "all_exact": not any(a.faults for a in of_this),
                "number": len(of_this),
            }
        )
    return found


# What a reader wants to know first.


def facts(sweep: Sweep) -> list[tuple[str, str]]:
    """Where and when this was measured."""
    rows = sweep.rows
    names = {"device_name": "device", "backend": "collectives", "model": "model", "mode": "mode"}
    found = {name: ", ".join(said(rows[column])) for column, name in {**names, "torch_version": "torch"}.items()}
    dirty = " with changes" if "True" in said(rows.git_dirty) else ""
    found["commit"] = ", ".join(sha[:10] for sha in said(rows.git_sha)) + dirty
    if times := [time[:16].replace("T", " ") for time in sorted(said(rows.started_at))]:
        found["measured"] = f"{times[0]} to {times[-1]} UTC"
    found["configurations"] = ", ".join(f"{n} {status}" for status, n in rows.status.value_counts().items())
    return [(name, text) for name, text in found.items() if text]


def said(values: pd.Series) -> list[str]:
    """What a column says, each once."""
    return [text for text in map(str, values.dropna().unique()) if text]


def of_machine(sweep: Sweep) -> list[dict]:
    """A table in short of each row that measured the machine, and the file that has it all."""
    found = []
    for run_id, lines in sweep.series.items():
        workload = sweep.configs[run_id].workload
        label = sweep.rows[sweep.rows.run_id == run_id].label.iloc[0]
        found.append({"label": label, "file": f"{run_id}/{workload}.csv", "lines": summary(workload, lines)})
    return found


def failures(sweep: Sweep) -> list[dict]:
    """Rows that did not end well, those with the same reason together; not those whose memory the results have."""
    lost = sweep.rows[(sweep.rows.status != "ok") & ~((sweep.rows.status == "oom") & sweep.rows.peak_bytes.notna())]
    groups = []
    for (status, reason), part in lost.groupby(["status", "reason"], sort=False):
        labels = list(dict.fromkeys(part.label))
        few = [*labels[:EXAMPLES], *([f"and {len(labels) - EXAMPLES} more"] if len(labels) > EXAMPLES else [])]
        groups.append({"status": status, "reason": reason, "number": len(part), "labels": few})
    return groups
