"""Published memory figures: a well-formed table, a page that its rows make, and claims that hold in them."""

from pathlib import Path
from statistics import median

import pytest

from analysis import UserError, published
from conf.compose import configuration
from conf.resolve import resolve

ROWS = Path("runs/reference/published_memory")
PAGE = Path("docs/published_memory.md")
KINDS = {"after_forward_gib", "peak_gib", "ran", "oom", "longest"}


@pytest.fixture(scope="module")
def cells():
    return published.beside(published.figures(), ROWS)


def test_every_figure_has_a_source_and_either_a_command_or_a_reason():
    for cell in published.figures():
        assert cell.published in KINDS
        assert cell.url.startswith("https://")
        assert cell.where
        assert (cell.value is None) == (cell.published in ("ran", "oom"))
        assert bool(cell.overrides) != cell.note.startswith("not simulated: ")


def test_every_command_can_stand_and_is_of_the_model_and_the_ranks_that_were_published():
    for cell in published.figures():
        if cell.overrides:
            config = resolve(configuration(cell.overrides.split())).config
            assert (config.model.name, config.world_size) == (cell.model, cell.world_size)


def test_the_page_is_what_the_reference_rows_say(cells):
    assert PAGE.read_text() == published.written(cells)


def test_a_row_that_is_missing_is_said_with_its_command():
    with pytest.raises(UserError, match=r"python -m bench .* name=published_memory"):
        published.written(published.figures())


def test_nine_of_ten_cells_fit_where_they_ran(cells):
    """None is published as lost in what we could read: this bounds from above what ours holds."""
    seen = [c for c in cells if c.published in ("ran", "oom")]
    assert sum(c.right for c in seen) >= 0.9 * len(seen)


def test_memory_after_forward_is_as_published_where_the_published_tensors_are_known(cells):
    wrapped = [c for c in cells if c.published == "after_forward_gib" and c.what.split(",")[0] in ("ulysses", "ring")]
    assert len(wrapped) == 4
    assert median(abs(c.difference) for c in wrapped) < 0.03


def test_what_is_kept_beyond_ours_by_hand(cells):
    """Llama-2-7B at 16K on 8 ranks: [S/N, D] is 16 MiB in bf16, 32 layers of it 0.5 GiB; an MLP's 1.34 GiB."""
    ulysses = next(c for c in cells if c.what == "ulysses, 16K tokens")
    kept = ulysses.beyond
    assert kept["norms"] == pytest.approx(2.0)
    assert kept["silu(gate)"] == pytest.approx(2048 * 11008 * 32 * 2 / 2**30)
    assert kept["gathered weights"] == pytest.approx(2 * 6_738_415_616 / 2**30)
