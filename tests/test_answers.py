"""What a report says first: which rows are compared, what fits, who is fastest, what stands as an example."""

from pathlib import Path

import pytest

from analysis import answers, examples, fits, plots, race, reading, report, results, tasks
from conf.columns import columns, described
from conf.compose import configuration
from conf.resolve import resolve
from conf.sizes import about, size, tokens

GIB = 2**30
COLUMNS = {column.name: column for column in columns()}


def row(words: str, **found: object) -> dict:
    """A row of a step as results.csv has it."""
    asked = described(resolve(configuration(["world_size=8", "seq_len=512", *words.split()])).config)
    known = {"run_id": f"{words} {found}", "status": "ok", "reason": "", "device_name": "a CPU", "comm_bytes": GIB}
    return {**asked, **known, "analytic_comm_bytes": GIB, "activation_bytes": GIB, **found}


def on_a_gpu(words: str, share: float, **found: object) -> dict:
    """A row of a GPU of 80 GiB, of which so much is held, 1 GiB of it before a process begins."""
    word = "oom" if share > 1 else "tight" if share > 0.9 else "ok"
    memory = {"peak_bytes": (80 * share - 1) * GIB, "context_bytes": GIB, "capacity_bytes": 80 * GIB, "fits": word}
    return row(words, status="oom" if share > 1 else "ok", **memory, **found)


def sweep_of(*rows: dict) -> reading.Sweep:
    return reading.Sweep(Path("runs/x"), reading.table_of(list(rows)))


def said(*rows: dict) -> dict[str, str]:
    """heading -> its sentences"""
    return {each.at: " ".join(each.sentences) for each in answers.answers(sweep_of(*rows))}


def timed(words: str, ms: float, **found: object) -> dict:
    times = {"step_ms_median": ms, "step_ms_p10": ms - 1, "step_ms_p90": ms + 1, "tokens_per_s": 1e6 / ms}
    return row(words, **{"peak_bytes": 2 * GIB, **times, **found})


def test_sizes_are_read_in_one_system():
    assert [size(n) for n in (512, 1536, 80 * GIB, 3_349_232.47 * 2**20)] == ["512 B", "1.5 KiB", "80 GiB", "3.194 TiB"]
    assert [tokens(n) for n in (512, 65536, 2**20, 1000)] == ["512", "64K", "1M", "1000"]
    assert [about(n) for n in (0, 96, 114_688, 1_081_344)] == ["-", "96", "112K", "1.03M"]


def test_a_column_of_bytes_has_the_unit_of_most_of_its_rows():
    sent, rows = COLUMNS["comm_bytes"], [{"comm_bytes": n * GIB} for n in (0.5, 300, 3270)]
    shown = sent.over(rows)
    assert (shown.head, [shown.text(each) for each in rows]) == ("sent GiB", ["0.50", "300.00", "3,270.00"])
    assert sent.over([{"comm_bytes": 3 * 2**20}]).head == "sent MiB"
    assert COLUMNS["seq_len"].over([{"seq_len": 2**40}]) == COLUMNS["seq_len"]


def test_only_what_was_asked_for_the_same_is_compared():
    """Precisions, heads and numbers of ranks apart; of one of them the other's fastest is not heard."""
    asked = ("precision=fp32", "precision=bf16", "precision=bf16 model.n_kv_heads=2", "world_size=4 precision=fp32")
    rows = [
        timed(f"strategy={name} {words}", n + ms)
        for n, words in enumerate(asked)
        for name, ms in (("tp", 20), ("ring", 9))
    ]
    found = said(*rows)
    assert len(found) == len(asked)
    fastest = [sentences.partition(" ms")[0] for sentences in found.values()]
    assert sorted(fastest) == [f"Fastest is ring: {9 + n}.0" for n in (1, 2, 3)] + ["Fastest is ring: 9.0"]
    assert sum("precision=bf16, " in at or at.endswith("precision=bf16") for at in found) == 2
    assert any("on 4 ranks" in at for at in found)
    labels = [label for task in tasks.at_longest(sweep_of(*rows).steps) for label in task.rows.label]
    assert labels == ["tp", "ring"] * len(asked)


def test_what_two_rows_differ_in_is_found_in_their_commands_where_there_was_no_such_column_yet(tmp_path):
    lines = [
        f"{heads}{name},ok,{name},tiny,4096,4,9,9,{ms},python -m bench model.n_kv_heads={heads} strategy={name}"
        for heads, ms in ((8, 40.0), (2, 20.0))
        for name in ("ulysses", "ring")
    ]
    head = "run_id,status,strategy,model,seq_len,world_size,comm_bytes,analytic_comm_bytes,step_ms_median,command"
    (tmp_path / "results.csv").write_text("\n".join([head, *lines]))
    sweep = reading.load(tmp_path)
    assert sweep.rows.label.nunique() == 4
    assert [at for at in (each.at for each in answers.answers(sweep)) if "model.n_kv_heads=8" in at]


def test_a_wrong_result_is_not_the_fastest():
    rows = [timed("strategy=tp", 20), timed("strategy=ring", 9, reason="wrong: grad of q is up to 102% away")]
    (sentences,) = said(*rows).values()
    assert "Fastest is tp" in sentences
    assert [line.status for line in results.lines(sweep_of(*rows).steps)] == ["ok", "wrong"]


def test_an_exact_tie_is_called_one():
    rows = [timed("strategy=tp", 20), timed("strategy=ring", 30), timed("strategy=tp_sp", 40, comm_bytes=2 * GIB)]
    (sentences,) = said(*rows).values()
    assert "Least is sent by tp, ring (an exact tie): 1 GiB" in sentences
    assert "most by tp_sp: 2 GiB, 2.0 times as much" in sentences
    assert "Smallest are tp, ring, tp_sp (an exact tie): 2 GiB" in sentences


CLUSTER = "mode=simulate device=cuda cluster=h100 precision=bf16"


def grid() -> list[dict]:
    """tp and ring at three lengths on 4 and 8 ranks: what of the memory they hold, doubled by the length."""
    at = {("tp", 4): 0.46, ("tp", 8): 0.3, ("ring", 4): 1.2, ("ring", 8): 0.1}
    return [
        on_a_gpu(
            f"{CLUSTER} strategy={name} world_size={ranks} seq_len={2**n * 1024}", share * 2**n, predicted_step_ms=9 - n
        )
        for (name, ranks), share in at.items()
        for n in range(3)
    ]


def test_of_so_many_configurations_so_many_fit():
    found = said(*grid())
    assert found[""].startswith("Of 12 configurations 7 fit into 80 GiB of a GPU, 1 of them with less than a tenth")
    assert "Out of memory: 5 configurations, 2 of tp, 3 of ring." in found[""]
    assert (
        "Of 2 configurations 1 fits into 80 GiB; what does not needs 95 GiB (tp)" in found["seq_len=4,096 on 8 ranks"]
    )
    assert "Of 2 configurations 1 fits into 80 GiB, 1 of them" in found["seq_len=2,048 on 4 ranks"]


def test_the_longest_that_fits_is_a_table_and_a_picture():
    sweep = sweep_of(*grid())
    (found,) = fits.longest(sweep)
    assert found.ranks == [4, 8]
    assert {name: [text for text, _ in cells] for name, cells in found.lines.items()} == {
        "tp": ["2K", "2K"],
        "ring": ["-", "\u2265 4K"],
    }
    assert found.lines["tp"][0][1].endswith("92% of the memory")
    figure = plots.what_fits(sweep)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}
    bold = {
        name: [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
        for name, axes in panels.items()
    }
    assert bold == {"tp": ["2K", "2K"], "ring": ["4K"]}
    assert {name: sum(bool(patch.get_hatch()) for patch in axes.patches) for name, axes in panels.items()} == {
        "tp": 2,
        "ring": 3,
    }
    assert "80 GiB" in figure.get_suptitle()


def test_rows_out_of_memory_are_results_whose_reason_is_not_told_twice():
    sweep = sweep_of(*grid(), row("strategy=zero", status="oom", reason="rank 0: out of memory", seq_len=9))
    statuses = [line.status for line in results.lines(sweep.steps)]
    assert (len(statuses), statuses.count("oom")) == (13, 6)
    assert [each["reason"] for each in report.failures(sweep)] == ["rank 0: out of memory"]


def test_what_did_not_run_says_how_many_more():
    sweep = sweep_of(*(row("strategy=tp", status="invalid", reason="no", tp=n, run_id=str(n)) for n in range(3, 9)))
    (found,) = report.failures(sweep)
    assert found["labels"][-1] == "and 2 more"


@pytest.mark.parametrize(
    ("strategy", "pure"),
    [("tp", "tp=8"), ("ring", "ring=8"), ("odysseus", "tp=8"), ("usp", "ulysses=2 ring=4"), ("zero", "dp=8")],
)
def test_an_example_is_on_the_strategys_own_axes(strategy, pure):
    meshes = [
        "mesh.dp=8",
        "mesh.dp=2 mesh.tp=4",
        "mesh.tp=4 mesh.ring=2",
        "mesh.tp=8",
        "mesh.ring=8",
        "mesh.ulysses=2 mesh.ring=4",
    ]
    has = {"tp": "tp", "ring": "ring", "odysseus": "tp ring", "usp": "ulysses ring", "zero": ""}[strategy].split()
    can = [mesh for mesh in meshes if all(word[5:].split("=")[0] in ("dp", *has) for word in mesh.split())]
    rows = sweep_of(*(row(f"strategy={strategy} {mesh}") for mesh in can)).ok
    best = examples.purest(strategy, rows)
    assert " ".join(f"{axis}={best[axis]:g}" for axis in ("dp", "tp", "ulysses", "ring") if best[axis] > 1) == pure


def test_bars_that_are_the_same_are_one_with_a_count():
    names = ("tp", "tp_sp", "ulysses", "ring", "usp")
    rows = [row(f"strategy={name} mesh.dp=8", peak_bytes=GIB + n) for n, name in enumerate(names)]
    rows += [row(f"strategy={name} mesh.dp=2", peak_bytes=GIB * (1 + n)) for n, name in enumerate(names)]
    (task,) = tasks.at_longest(sweep_of(*rows).steps)
    labels = list(plots.once(task.rows, "peak_bytes").label)
    assert labels[0] == "5 strategies: dp=8"
    assert len(labels) == 1 + len(names)  # the others differ in what they hold, or where


def test_a_grid_says_what_one_is_and_why_a_cell_is_empty():
    meshes = {(1, 8): 30.0, (2, 4): 20.0, (4, 2): 25.0}
    rows = [timed(f"strategy=usp mesh.ulysses={u} mesh.ring={r}", ms) for (u, r), ms in meshes.items()]
    why = "world_size=8 is no multiple of mesh.tp * mesh.ulysses * mesh.ring = 16; 16 would do"
    refused = {**rows[0], "status": "invalid", "reason": why, "run_id": "no", "ulysses": 2, "ring": 8, "dp": None}
    figure = plots.ulysses_by_ring(sweep_of(*rows, refused))
    shown = sorted(text.get_text() for text in figure.axes[0].texts)
    assert shown == ["1.00", "1.25", "1.50", *"aaaaa", "b"]
    assert "1.00 is 20.0 ms a step" in figure.axes[0].get_title(loc="left")
    assert "ulysses=2 ring=4" in figure.axes[0].get_title(loc="left")
    legend = figure.get_supxlabel()
    assert why.partition(";")[0] in legend
    assert "was not run" in legend


def test_a_peers_note_names_its_settings_unless_it_is_of_all():
    lines = [{"theirs": "yunchang", "setting": at, "said": note} for at, note in (("fp32", "wrong"), ("bf16", "ours"))]
    assert race.notes(lines) == ["yunchang (fp32): wrong.", "yunchang (bf16): ours."]
    assert race.notes([{**line, "said": "ours"} for line in lines]) == ["yunchang: ours."]
