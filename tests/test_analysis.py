"""The cost table in print, and the report: its numbers, its refusals, its pages in a real browser."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import sympy

from analysis import UserError, plots, symbols
from analysis.accounts import account_of
from analysis.accounts.letters import Letters
from analysis.accounts.sent import total
from analysis.looks import colour, marker
from analysis.plots import draw_all, group_but
from analysis.reading import load
from analysis.report import write
from analysis.table import crossovers, printed, standing, standings
from bench.app.sweep import run_all
from conf.columns import columns, described
from conf.compose import configuration
from conf.keys import Config
from conf.labels import mesh
from conf.meshes import PEERS, STRATEGIES
from conf.resolve import resolve
from conf.series import SERIES
from conf.sizes import size
from conf.words import Invalid
from tests.browser import CUT_OFF, opened
from tests.jobs import job

ROOT = Path(__file__).parents[1]


def analysis(*arguments: str, cwd: Path = ROOT, code: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", "analysis", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


# The table.


def test_the_table_has_every_strategy_in_the_order_of_the_folder():
    rows = symbols.rows()
    assert list(dict.fromkeys(row.strategy for row in rows)) == list(STRATEGIES)
    variants = {row.variant for row in rows}
    assert {"ulysses.packed", "ring.kv=all_gather", "zero_stage=1", "recompute=block", "with a ring"} <= variants


@pytest.mark.parametrize("row", symbols.rows(), ids=lambda row: row.title)
def test_the_formulas_with_numbers_put_in_are_the_numbers(row):
    """The symbols and the plain arithmetic are one code; this holds the simplified expressions to it."""
    numbers = {"B": 2, "L": 4096, "d": 512, "i": 1536, "h": 8, "h_kv": 8, "V": 1024, "n_layers": 3, "e": 2, "e_g": 4}
    ranks = {"N": 4, "tp": 2, "u": 2, "r": 2, "c": 2, "rho": 1, "dp": 1, "H": 100}

    def number(value):
        if isinstance(value, dict):
            return {name: number(each) for name, each in value.items()}
        return {**numbers, **ranks}[value.name] if isinstance(value, sympy.Symbol) else value

    for expression, plain in (
        (symbols.sent(row, weights=False), lambda s: total(row.account.of_block(s), weights=False)),
        (symbols.sent(row, weights=True), lambda s: total(row.account.of_block(s), weights=True)),
        (symbols.saved(row), row.account.saved_by_block),
        (symbols.neat(total(row.account.of_step(row.letters))), lambda s: total(row.account.of_step(s))),
    ):
        values = {symbol: {**numbers, **ranks}[symbol.name] for symbol in expression.free_symbols}
        put_in = {name: number(value) for name, value in vars(row.letters).items()}
        assert float(expression.subs(values)) == pytest.approx(float(plain(Letters(**{**put_in, "K": 64}))))


def test_the_known_volumes_of_a_layer():
    """GB sent per rank and layer, N=8, bf16, 64K tokens, batch 1, of Llama-2-7B and Llama-3-8B: worked out by hand."""
    known = {
        "llama2_7b": {"tp": 3.76, "tp_sp": 4.70, "odysseus": 3.06, "ulysses": 1.53},
        "llama3_8b": {"tp": 3.76, "tp_sp": 4.70, "odysseus": 3.27, "ulysses": 1.44},
    }
    for model, volumes in known.items():
        found = standing(standings([f"model={model}", "seq_len=65536", "world_size=8", "precision=bf16"]))
        for strategy, gigabytes in volumes.items():
            sent = total(found[strategy].account.of_block(found[strategy].letters)) / 1e9
            assert sent == pytest.approx(gigabytes, abs=0.01), strategy


def test_where_odysseus_begins_to_pay():
    """Against TP-SP from L = 1.8 i, against Ulysses up to 12 d / (5 - 8/N): per block, MHA, no norms."""
    n, d, i = 8, 4096, 11008
    at = {}
    for strategy, axis in (("odysseus", "tp"), ("tp_sp", "tp"), ("ulysses", "u")):
        base = symbols.letters(B=1, d=d, i=i, h=32, h_kv=32, K=d // 32, e=2, e_w=2, e_dw=2, e_g=4, **{axis: n})
        at[strategy] = total(account_of(strategy).of_block(base))
    length = symbols.SYMBOLS["L"]
    crossing = sympy.solve(at["odysseus"] - at["tp_sp"], length)[0]
    assert float(crossing) == pytest.approx(1.8 * i, rel=1e-6)
    crossing = sympy.solve(at["odysseus"] - at["ulysses"], length)[0]
    assert float(crossing) == pytest.approx(12 * d / (5 - 8 / n), rel=1e-3)  # ulysses' norms travel with ZeRO
    said = crossovers(standing(standings(["model=llama2_7b", "world_size=8", "precision=bf16"])))
    assert any(re.match(r"from L = 1[0-9],\d{3} odysseus sends less than tp_sp", line) for line in said)


@pytest.mark.parametrize("format", ["text", "markdown", "latex", "csv"])
def test_the_table_prints(format):
    text, problems = printed(format, [])
    assert problems == []
    for word in ("tp_usp", "2 AG(D) + 2 RS(D)", "Korthikanti", "swapped"):
        assert word in text


SIZES = [(8, 8, 512), (8, 2, 96), (12, 4, 240), (32, 8, 65536), (5, 5, 1000)]  # heads, kv heads, tokens
RANKS = [*range(1, 11), 12, 16, 24, 48, 63, 64]


@pytest.mark.slow
def test_the_table_takes_the_meshes_that_bench_takes_and_gives_its_answers():
    judges = {}
    for n, world_size in enumerate(RANKS):
        heads, kv_heads, seq_len = sizes = SIZES[n % len(SIZES)]
        asked = [f"model.n_heads={heads}", f"model.n_kv_heads={kv_heads}", "model.dim=960", f"seq_len={seq_len}"]
        text, _ = printed("csv", [*asked, f"world_size={world_size}", f"strategy={','.join(STRATEGIES)}"])
        rows = {row["strategy"]: row for row in csv.DictReader(text.splitlines())}
        assert list(rows) == list(STRATEGIES)
        for name, row in rows.items():
            judge = judges.setdefault((name, sizes), configuration([*asked, f"strategy={name}"]))
            judge.world_size = world_size
            try:
                expected = mesh(described(resolve(judge).config))
            except Invalid as reason:
                expected = str(reason)
            assert row["mesh"] == expected, (name, world_size, sizes)
            assert bool(row["GiB a step"]) == ("would do" not in expected)


def test_single_and_a_full_table_stand_where_nothing_is_said_of_ranks():
    rows = {row["strategy"]: row for row in csv.DictReader(printed("csv", ["seq_len=64"])[0].splitlines())}
    assert rows["single"]["GiB a step"] == "0.00"
    assert rows["tp_usp"]["mesh"] == "tp=2 ulysses=2"


def test_the_columns_are_printed_with_unit_and_meaning():
    lines = analysis("columns").stdout.splitlines()
    of_series = [f"{workload}.{column.name}" for workload, of_lines in SERIES.items() for column in of_lines]
    assert [line.split()[0] for line in lines] == [*(column.name for column in columns()), *of_series]
    assert any(re.match(r"peak_bytes +B +at most", line) for line in lines)
    assert len(analysis("columns", "--format", "csv").stdout.strip().splitlines()) == len(lines) + 1


WRONG = {
    "table model=lama": "model=lama is not one of",
    "table strategy=tp_ps": "strategy=tp_ps is not one of",
    "table seq_length=5": "there is no key seq_length; did you mean seq_len?",
    "table seqlen=4": "there is no key seqlen; did you mean seq_len?",
    "table precision=fp8": "precision=fp8 is not one of fp32, bf16, bf16_mixed",
    "table ring.layout=zigzagg": "did you mean zigzag?",
    "table seq_len=100 world_size=8 strategy=ring": "seq_len=100 must be a multiple of 2 * mesh.ring = 16",
    "table strategy=ddp": "ddp has no account",
    "table strategy=tp,ulysses world_size=7": "none of these strategies can stand here",
    "report runs/nowhere": "runs/nowhere: no such folder",
    "sources tp_sp odyseus": "there is no strategies/odyseus.py",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_mistake_is_one_sentence(command, tmp_path):
    result = analysis(*command.split(), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert WRONG[command] in result.stderr


# Accounts that are not all there.

PARTIAL = """from analysis.accounts.account import Account
from analysis.accounts.tp_sp import around_attention

ACCOUNT = Account(linears=(around_attention,))
"""


@pytest.fixture
def code(tmp_path) -> Path:
    """A copy of the sources, in which a test may write and delete accounts."""
    for folder in ("analysis", "conf", "strategies"):
        shutil.copytree(ROOT / folder, tmp_path / "code" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "code"


@pytest.mark.slow
def test_an_account_that_says_little_is_good_for_what_it_says(code, sweep):
    (code / "analysis" / "accounts" / "odysseus.py").write_text(PARTIAL)
    table = analysis("table", code=code, cwd=code)
    assert re.search(r"odysseus\n  forward +AG\(D\) \+ RS\(D\)", table.stdout), table.stderr
    assert "tp=4" in analysis("table", "strategy=odysseus", code=code, cwd=code).stdout
    report = analysis("report", sweep, code=code, cwd=code)
    assert report.returncode == 1
    said = report.stderr.splitlines()
    assert said
    assert all(line.startswith("analysis: odysseus") and "was derived as" in line for line in said), report.stderr
    assert "odysseus" in (sweep / "report" / "index.html").read_text()
    assert analysis("sources", "odysseus", "tp_sp", "--run", sweep, code=code, cwd=code).returncode == 0


@pytest.mark.slow
def test_a_strategy_without_an_account_is_named(code, sweep):
    (code / "analysis" / "accounts" / "odysseus.py").unlink()
    nothing = "odysseus has no account: analysis/accounts/odysseus.py would be it"
    assert nothing in analysis("table", code=code, cwd=code).stdout
    assert nothing in analysis("table", "world_size=2", code=code, cwd=code).stdout
    assert nothing in analysis("table", "strategy=odysseus", code=code, cwd=code).stderr
    assert analysis("report", sweep, code=code, cwd=code).returncode == 0
    assert nothing in (sweep / "report" / "index.html").read_text()
    assert "there is no account to hold it to" in (sweep / "report" / "sources.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["ACCOUNT = ", "import nothing_like_it", ""])
def test_an_account_that_cannot_be_read_is_a_sentence(code, sweep, text):
    (code / "analysis" / "accounts" / "odysseus.py").write_text(text)
    for command in (["table", "strategy=odysseus"], ["report", sweep]):
        result = analysis(*command, code=code, cwd=code)
        assert result.returncode == 1
        assert result.stderr.startswith("analysis: analysis/accounts/odysseus.py: "), result.stderr
        assert result.stderr.count("\n") == 1
    assert "tp_sp" in (sweep / "report" / "index.html").read_text()
    assert analysis("table", "strategy=tp_sp", code=code, cwd=code).returncode == 0


def test_importing_the_accounts_needs_nothing_heavy():
    heavy = "sympy pandas matplotlib torch strategies bench"
    loads = f"import sys, analysis.accounts as a; [a.account_of(n) for n in {list(STRATEGIES)}]; "
    check = loads + f"print(sorted(set('{heavy}'.split()) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_strategy_and_peer_looks_like_itself():
    looks = {name: (colour(name), marker(name)) for name in (*STRATEGIES, *PEERS)}
    assert len(set(looks.values())) == len(looks)
    assert len({marker for _, marker in looks.values()}) == len(looks)
    assert looks["yunchang"][0] == looks["usp"][0]


# The report.


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """A small real sweep, with one configuration that cannot stand."""
    here = tmp_path_factory.mktemp("measured")
    before = os.getcwd()
    os.chdir(here)
    try:
        names = ("single", "tp_sp", "ulysses", "odysseus", "usp")
        ranks = {name: "world_size=1" if name == "single" else "world_size=2" for name in names}
        jobs = [
            job("name=small", f"strategy={name}", ranks[name], f"seq_len={n}", "batch_size=2")
            for n in (64, 128)
            for name in names
        ]
        run_all([*jobs, job("name=small", "strategy=ulysses", "seq_len=63")])
    finally:
        os.chdir(before)
    return here / "runs" / "small"


@pytest.fixture
def sweep(measured, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(measured, tmp_path / "runs" / "small"))


def test_the_report_has_the_sweeps_numbers(sweep):
    assert write(sweep) == []
    page = (sweep / "report" / "index.html").read_text()
    assert "≠" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="http' not in page
    stored = pd.read_csv(sweep / "report" / "results.csv")
    assert len(stored) == 11
    measured = stored[stored.comm_bytes > 0]
    assert (measured.counted_by_derived == 1).all()
    assert (measured.derived_comm_bytes == measured.comm_bytes).all()
    for name in ("loss_curves", "time_and_throughput", "memory_parts", "bytes_sent", "pareto"):
        assert (sweep / "report" / "plots" / f"{name}.png").stat().st_size > 5000
        assert (sweep / "report" / "plots" / f"{name}.svg").exists()
    for sentence in ("Weak scaling", "Compute and exposed communication"):
        assert sentence in page
    assert "seq_len=63 must be a multiple of mesh.ulysses = 2" in page


@pytest.mark.slow
def test_what_was_searched_is_drawn_and_held_against_the_account_of_its_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = "name=long", "mode=simulate", "search=max_seq_len", "cluster=h100", "model.n_layers=1", "world_size=2"
    away = "recompute=block", "offload=activations"
    run_all([job(*asked, "strategy=ring"), job(*asked, "strategy=tp_sp", *away)])
    sweep = load(tmp_path / "runs" / "long")
    rows = sweep.rows
    assert (rows.seq_len == rows.max_seq_len).all()
    figure = plots.longest_that_fits(sweep)
    shown = sorted(text.get_text() for text in figure.axes[0].texts)
    assert shown == sorted(plots.about(n) for n in rows.max_seq_len)
    assert write(tmp_path / "runs" / "long") == []
    stored = pd.read_csv(tmp_path / "runs" / "long" / "report" / "results.csv")
    assert (stored.counted_by_derived == 1).all()


def test_a_count_that_differs_is_red_and_the_command_fails(sweep):
    record = next(r for r in records_of(sweep) if r["strategy"] == "tp_sp")
    file = sweep / record["run_id"] / "comm.csv"
    rows = list(csv.DictReader(file.open()))
    rows[0]["sent_bytes"] = str(int(rows[0]["sent_bytes"]) // 2)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    result = analysis("report", sweep)
    assert result.returncode == 1
    assert "forward" in result.stderr
    assert "was derived as" in result.stderr
    assert 'class="bad"' in (sweep / "report" / "index.html").read_text()


def records_of(sweep: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sweep.glob("*/record.json")]


def test_what_is_broken_is_named_and_the_rest_is_reported(sweep):
    whole, half = sorted(r["run_id"] for r in records_of(sweep) if r["status"] == "ok")[:2]
    (sweep / half / "record.json").write_text('{"run_id": "')
    (sweep / whole / "comm.csv").unlink()
    problems = write(sweep)
    assert any(f"{half}/record.json: not valid JSON" in problem for problem in problems)
    assert any(f"{whole}/comm.csv: cannot be read" in problem for problem in problems)
    assert all("\n" not in problem for problem in problems)
    assert "tokens/s" in (sweep / "report" / "index.html").read_text()


def change_record(sweep: Path, strategy: str, **changes: object) -> str:
    """Change what one record says; returns its run_id."""
    record = next(r for r in records_of(sweep) if r["strategy"] == strategy and r["status"] == "ok")
    (sweep / record["run_id"] / "record.json").write_text(json.dumps({**record, **changes}))
    return record["run_id"]


@pytest.mark.parametrize("column", ["comm_bytes", "comm_bytes_backward", "calls_all_to_all"])
def test_a_record_that_is_not_the_sum_of_its_comm_csv_is_named(sweep, column):
    run_id = change_record(sweep, "ulysses", **{column: 12})
    result = analysis("report", sweep)
    assert result.returncode == 1
    assert re.search(
        rf"{run_id}/comm.csv: its lines add up to {column}=\d+, and record.json has {column}=12", result.stderr
    )


def test_a_split_that_does_not_add_up_is_named(sweep):
    run_id = change_record(sweep, "ulysses", comm_bytes_params=7)
    said = f"{run_id}/record.json: comm_bytes_activations and comm_bytes_params do not add up to comm_bytes"
    assert any(said in problem for problem in write(sweep))


def test_a_lost_comm_line_is_named(sweep):
    run_id = next(r["run_id"] for r in records_of(sweep) if r["strategy"] == "usp" and r["status"] == "ok")
    file = sweep / run_id / "comm.csv"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert any(f"{run_id}/comm.csv: its lines add up to comm_bytes=0" in problem for problem in write(sweep))


def test_a_row_that_is_not_its_record_is_named(sweep):
    run_id = change_record(sweep, "tp_sp", loss_last=1.5)
    (problem,) = write(sweep)
    assert re.search(rf"results.csv: the row of {run_id} has loss_last=[\d.]+, and its record loss_last=1.5", problem)
    assert analysis("report", sweep).returncode == 1


def test_a_row_that_is_missing_is_named(sweep):
    lines = (sweep / "results.csv").read_text().splitlines(keepends=True)
    (sweep / "results.csv").write_text("".join(lines[:-1]))
    (problem,) = write(sweep)
    assert f"results.csv: there is no row of {lines[-1].partition(',')[0]}" in problem


def test_whatever_differs_stands_in_the_label_and_divides_the_lines(sweep):
    """Of records of today, and of a version that did not know some keys yet, nor most columns."""
    record = next(r for r in records_of(sweep) if r["strategy"] == "usp" and r["status"] == "ok")
    for folder in sweep.glob("*/"):
        shutil.rmtree(folder)
    for grad_dtype, n_layers, seq_len in itertools.product(("fp32", "same"), (1, 2), (64, 128)):
        config = json.loads(json.dumps(record["config"]))
        config["ring"]["grad_dtype"], config["model"]["n_layers"], config["seq_len"] = grad_dtype, n_layers, seq_len
        asked = described(Config.of(config))
        said = {**record, **asked}
        if n_layers == 1:
            del config["compile"], config["ulysses"]["chunks"]
            said = {column: said[column] for column in said if column not in asked or column == "strategy"}
        run_id = f"{grad_dtype}{n_layers}at{seq_len}"
        (sweep / run_id).mkdir()
        (sweep / run_id / "record.json").write_text(json.dumps({**said, "run_id": run_id, "config": config}))
    rows = load(sweep).ok
    assert set(rows.ulysses_chunks) == {1}
    assert rows.label.nunique() == 4
    assert all("model.n_layers=" in label for label in rows.label)
    said = rows.label.str.contains("ring.grad_dtype=same", regex=False)
    assert list(said) == list(rows.ring_grad_dtype == "same")  # fp32 is its default
    lines = group_but(rows, "seq_len")
    assert [list(part.seq_len) for _, part in lines] == [[64, 128]] * 4
    assert len({label for label, _ in lines}) == 4


def test_an_empty_folder_and_an_old_table(tmp_path):
    with pytest.raises(UserError, match="no readable record"):
        write(tmp_path)
    (tmp_path / "results.csv").write_text("run_id,status,strategy,seq_len\na,ok,tp,512\nb,oom,tp,1024\n")
    problems = write(tmp_path)
    assert any("written by an older version" in problem for problem in problems)
    (tmp_path / "results.csv").write_text("")
    with pytest.raises(UserError, match="not a table"):
        write(tmp_path)


def test_a_sweep_of_failures_is_a_report_that_says_so(sweep):
    for record in records_of(sweep):
        if record["status"] == "ok":
            shutil.rmtree(sweep / record["run_id"])
    problems = write(sweep)
    assert problems == [f"{sweep}: no configuration ended well (1 invalid)"]
    assert "must be a multiple" in (sweep / "report" / "index.html").read_text()


def test_a_table_without_its_records_is_reported_too(sweep, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(sweep / "results.csv", alone)
    assert write(alone) == []
    assert "Bytes sent by collective: the folder has no comm.csv" in (alone / "report" / "index.html").read_text()


def test_compare_finds_what_got_slower(sweep, tmp_path):
    slow = Path(shutil.copytree(sweep, tmp_path / "runs" / "slow"))
    record = next(r for r in records_of(slow) if r["strategy"] == "ulysses" and r["status"] == "ok")
    for column in ("step_ms_median", "step_ms_p10", "step_ms_p90"):
        record[column] *= 10
    record["peak_bytes"] += 1024
    (slow / record["run_id"] / "record.json").write_text(json.dumps(record))
    result = analysis("compare", sweep, slow)
    assert result.returncode == 0, result.stderr
    assert sum("slower, more memory" in line for line in result.stdout.splitlines()) == 1
    assert result.stdout.count("the same within the spread") == 9


def test_scaling_exposed_communication_and_the_end_of_memory_are_drawn_where_there_is_data(sweep):
    """The same records as if there had been more: twice the ranks, a column more, a length that did not fit."""
    for n, record in enumerate(r for r in records_of(sweep) if r["strategy"] == "ulysses" and r["status"] == "ok"):
        record["exposed_comm_ms"] = 0.3 * record["step_ms_median"]
        record |= {"capacity_bytes": 2**30, "context_bytes": 2**20, "fits": "ok"}
        (sweep / record["run_id"] / "record.json").write_text(json.dumps(record))
        for kind in ("more ranks", "out of memory"):
            other = {**record, "run_id": f"{kind[:4]}{n}"}
            if kind == "more ranks":
                faster = {column: record[column] / 1.8 for column in record if column.startswith("step_ms")}
                other |= {"world_size": 4, "ulysses": 4, **faster}
            else:
                other |= {"status": "oom", "seq_len": 4096, "reason": "rank 0: out of memory"}
            shutil.copytree(sweep / record["run_id"], sweep / other["run_id"])
            (sweep / other["run_id"] / "record.json").write_text(json.dumps(other))
    figures, left_out = draw_all(load(sweep))
    assert {"strong_scaling", "weak_scaling", "exposed"} <= figures.keys()
    several = ["The longest sequence that fits", "Where a predicted step goes", "Bytes against balance"]
    absent = ["Ulysses x ring", "Bytes by link tier", *several]
    assert [sentence.partition(":")[0] for sentence in left_out] == absent
    texts = [text.get_text() for axes in figures["time_and_throughput"].axes for text in axes.texts]
    assert "out of memory" in texts
    assert any("capacity" in text.get_text() for text in figures["memory_parts"].legends[0].get_texts())


# The pages, as a reader's browser shows them.


@pytest.fixture(scope="module")
def pages(measured) -> Path:
    write(measured)
    return measured / "report"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index.html", "sources.html"])
def test_nothing_is_cut_off_and_nothing_goes_wrong(browser, pages, name, width):
    page, wrong = opened(browser, pages / name, width)
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert len(page.screenshot(full_page=True)) > 20_000
    assert wrong == []
    page.close()


def test_the_page_shows_the_numbers_of_the_csv(browser, pages):
    page, _ = opened(browser, pages / "index.html", 1280)
    stored = pd.read_csv(pages / "results.csv").set_index("run_id")
    rows = page.locator("#results-table tbody tr").all()
    assert len(rows) == 10
    for row in rows:
        run = row.get_attribute("data-run")
        for column in ("step_ms_median", "tokens_per_s", "peak_bytes", "comm_bytes", "loss_last"):
            value = row.locator(f"td[data-column={column}]").get_attribute("data-order")
            assert float(value) == pytest.approx(stored.loc[run, column])
    for picture in page.locator("figure svg").all():
        assert picture.bounding_box()["width"] > 300
        assert len(set(picture.screenshot())) > 50
    page.close()


def test_a_line_lights_up_with_its_counterparts(browser, pages):
    page, _ = opened(browser, pages / "sources.html", 1280)
    page.locator(".row.sends", has_text="gathered_linear(x, [attn.q").first.click()
    lit = page.locator(".row.sends.lit")
    texts = " ".join(lit.all_inner_texts())
    assert "arriving_q = start_all_to_all(q, HEADS, SEQUENCE" in texts
    assert "return reduce_scatter" not in texts
    assert page.locator(".sum .bad").count() == 0
    assert page.locator(".sum .good").count() == 8  # activations and weights of four strategies
    page.close()


def test_the_gutter_shows_the_bytes_of_comm_csv(browser, pages):
    """One line of Ulysses: q's exchange, forward, per block."""
    page, _ = opened(browser, pages / "sources.html", 1280)
    record = max(
        (r for r in records_of(pages.parent) if r["strategy"] == "ulysses" and r["status"] == "ok"),
        key=lambda r: r["seq_len"],
    )
    lines = csv.DictReader((pages.parent / record["run_id"] / "comm.csv").open())
    text = (ROOT / "strategies" / "ulysses.py").read_text().splitlines()
    number = next(n for n, line in enumerate(text, 1) if "arriving_q = start_all_to_all(q" in line)
    sent = sum(
        int(e["sent_bytes"]) for e in lines if e["source"].endswith(f"ulysses.py:{number}") and e["phase"] == "forward"
    )
    per_block = sent / record["config"]["model"]["n_layers"]
    row = page.locator("[data-strategy=ulysses] .row.sends", has_text="arriving_q = start_all_to_all(q").first
    assert f"→ A2A {size(per_block)}" in row.inner_text()
    page.close()


def test_state_is_divided_as_zero_promises():
    """By formula: 16 bytes a weight in all of them, stage by stage (Rajbhandari et al. 2020, figure 1, fp32 here)."""
    asked = ["model=llama3_8b", "world_size=64", "batch_size=64", "strategy=zero"]
    held = {}
    for stage in (0, 1, 2, 3):
        (zero,) = standing(standings([*asked, f"zero_stage={stage}"])).values()
        held[stage] = sum(zero.account.state(zero.letters).values())
    shares = {stage: held[stage] / held[0] for stage in (1, 2, 3)}
    assert shares[1] == pytest.approx(1 / 2 + 1 / 128, rel=1e-3)
    assert shares[2] == shares[3] == pytest.approx(1 / 64, rel=1e-3)
