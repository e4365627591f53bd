"""Figures show what their tables hold, legible at page width, and nothing is missing or clipped."""

import io
import re
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from helpers import draw_ablation, draw_sets, plots
from helpers.paths import ROOT
from helpers.plots import alteration as figures
from helpers.plots import style

TINY = sorted((ROOT / "figures" / "tiny").glob("*.csv"))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines_of(fig):
    return [line.get_ydata() for ax in fig.axes for line in ax.get_lines()]


def shown(fig, values):
    return any(
        len(y) == len(values) and np.allclose(np.asarray(y, float), values) for y in lines_of(fig)
    )


def test_layers_mark_what_is_beyond_the_floor():
    table = pd.DataFrame(
        {
            "panel": "a",
            "layer": range(3),
            "similarity": [0.2, 0.5, 0.4],
            "low": [0.1, 0.4, 0.3],
            "high": [0.3, 0.6, 0.5],
            "floor": [0.6, 0.5, 0.7],
            "beyond": [True, False, True],
            "n": 9,
        }
    )
    fig = figures.layers(table)
    assert shown(fig, table["floor"])
    assert shown(fig, [0.2, 0.4])
    assert shown(fig, [0.5])


def test_curves_are_the_tables():
    steps, rng = [0, 25, 100, 2600], np.random.default_rng(0)
    table = pd.concat(
        [
            pd.DataFrame(
                {
                    "panel": "a",
                    "line": line,
                    "step": steps,
                    "value": rng.random(4),
                    "null": line.startswith("null"),
                    "n": 9,
                }
            )
            for line in ("accuracy", "neurons: left the base's sets", "null: further")
        ]
    )
    fig = figures.trajectory(table)
    assert all(shown(fig, part["value"]) for _, part in table.groupby("line"))
    table = pd.concat(
        [
            pd.DataFrame(
                {
                    "panel": panel,
                    "set": kind,
                    "share": [0, 0.1, 1],
                    "loss": rng.random(3),
                    "low": 0,
                    "high": 1,
                    "host": 1,
                    "donor": 0,
                    "n": 9,
                }
            )
            for panel in "abcd"
            for kind in ("most moved", "random")
        ]
    )
    fig = figures.transplant(table)
    assert all(shown(fig, part["loss"]) for _, part in table.groupby(["panel", "set"]))


def test_single_components_are_not_joined():
    table = pd.DataFrame(
        {
            "panel": ["a", "a", "b", "b"],
            "layer": 0,
            "weight": [0.1, 0.2, 0.3, 0.4],
            "moved": [0.5, 0.6, 0.7, 0.8],
            "components": [9, 8, 1, 1],
            "null": 0.65,
            "n": 9,
        }
    )
    fig = figures.weights(table)
    styles = [ax.get_lines()[0].get_linestyle() for ax in fig.axes]
    assert styles == ["-", "None"]
    assert shown(fig, [0.5, 0.6])
    assert shown(fig, [0.7, 0.8])


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_legends_stand_inside_the_page(panels):
    names = [f"p{n}: tuned into base" for n in range(panels)]
    table = pd.concat(
        [
            pd.DataFrame(
                {"panel": name, "set": kind, "share": [0, 1], "loss": [1, 2], "n": 9}
            ).assign(low=1, high=2, host=1, donor=2)
            for name in names
            for kind in ("most moved", "random")
        ]
    )
    layers = pd.concat(
        [
            pd.DataFrame(
                {
                    "panel": name,
                    "layer": [0, 1],
                    "similarity": 0.5,
                    "low": 0.4,
                    "high": 0.6,
                    "floor": 0.7,
                    "beyond": [True, False],
                    "n": 9,
                }
            )
            for name in names
        ]
    )
    for fig in (figures.transplant(table), figures.layers(layers)):
        fig.canvas.draw()
        box, page = fig.legends[0].get_window_extent(), fig.bbox
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        assert len(fig.legends) == 1


def test_a_figure_is_kept_as_pixels_of_few_colours_lines_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "figures_dir", lambda profile: tmp_path)
    fig, ax = plt.subplots()
    ax.imshow(np.linspace(0, 1, 900).reshape(30, 30), cmap="cividis")
    table = pd.DataFrame({"x": [1, 2]})
    for _ in range(2):  # the same bytes each time
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        style.save_figure(fig, table, "one", "p")
        after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert not before or before == after
    assert set(after) == {"one.png", "one.svg", "one.csv"}
    drawn = plt.imread(tmp_path / "one.png")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    buffer.seek(0)
    exact = plt.imread(buffer)[..., :3]
    assert drawn.shape[:2] == exact.shape[:2]
    assert np.abs(drawn[..., :3] - exact).max() < 0.02
    assert np.abs(drawn[..., :3] - exact).mean() < 0.005


def test_a_title_says_the_range_of_n():
    assert style.title("a", pd.DataFrame({"n": [5, 5]})) == "a (n = 5)"
    assert style.title("a", pd.DataFrame({"n": [40, 0]})) == "a (n = 0 to 40)"
    assert style.title("a", pd.DataFrame({"x": [1]})) == "a"


def sensitivity(table):
    gap = table["tau"].isna()
    return plots.overlap.sensitivity(table[gap], table[~gap].astype({"components": int}))


def differences(table):
    return figures.differences(table, "y", "none", list(pd.unique(table["line"])))


def matrices(table):
    return plots.matrices(table, "ablated", "measured", "increase", list(table["panel"].unique()))


# as the notebooks draw them
DRAWN = {
    "00_ability": plots.data.ability,
    "01_lengths": plots.data.lengths,
    "01_lexical": plots.data.lexical,
    "01_matched": plots.data.subset_lengths,
    "02_blocks": plots.diagram.blocks,
    "03_frequencies": plots.sets.frequencies,
    "03_layer_share": partial(plots.sets.layer_share, null="null"),
    "04_block": plots.diagram.blocks,
    "04_routing_tiny-moe": plots.sets.routing,
    "04_single_experts": plots.ablation.single_experts,
    "05_layers": plots.overlap.layers,
    "05_overlap": plots.overlap.excess_matrices,
    "05_readable": plots.overlap.readable,
    "05_sensitivity": sensitivity,
    "05_waterfall": plots.overlap.waterfall,
    "05_wordings": plots.overlap.wordings,
    "06_ablation": matrices,
    "06_categories": plots.ablation.by_category,
    "06_damage": plots.ablation.damage,
    "06_dose": plots.ablation.dose,
    "06_league": plots.ablation.league,
    "06_planted": plots.ablation.planted,
    "07_alteration": figures.layers,
    "07_matter": figures.matter,
    "07_training": figures.training,
    "07_trajectory": figures.trajectory,
    "07_transplant": figures.transplant,
    "07_weights": figures.weights,
    "08_claims": plots.claims.forest,
    "08_claims_others": plots.claims.forest,
    "09_ablation": draw_ablation,
    "09_sets": draw_sets,
    "10_improved": figures.improved,
    "10_matter": figures.matter,
    "10_training": differences,
    "10_trajectory": figures.trajectory,
    "10_transplant": figures.transplant,
    "10_where": figures.where,
}


def committed(name):
    path = ROOT / "figures" / "tiny" / f"{name}.csv"
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    return table.fillna({column: "" for column in table.select_dtypes("object")})


def texts_of(fig):
    found = [text for text in fig.findobj(Text) if text.get_visible()]
    return [text for text in found if text.get_text().strip()]


def test_every_committed_figure_is_drawn_here():
    assert set(DRAWN) == {path.stem for path in TINY}


@pytest.mark.parametrize("name", DRAWN)
def test_a_page_shows_a_figure_whole_and_its_text_legible(name):
    fig = DRAWN[name](committed(name))
    fig.canvas.draw()
    wide, high = fig.get_size_inches()
    assert wide <= style.PAGE
    assert min(text.get_fontsize() for text in texts_of(fig)) >= style.SMALLEST
    box = fig.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= wide
    assert box.y1 <= high
    assert not [t for t in texts_of(fig) if re.fullmatch(r"-0?\.0+", t.get_text())]
    for ax in fig.axes:
        labels = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_rotation() == 0]
        ends = sorted((box.x0, box.x1) for box in labels if box.width)
        assert all(left[1] < right[0] for left, right in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("inches", [3, 5, 7.2, 12])
def test_no_number_of_panels_is_wider_than_a_page(number, inches):
    table = pd.DataFrame({"panel": range(number)})
    fig, drawn = style.panels(table, "panel", (inches, 1))
    assert fig.get_size_inches()[0] <= style.PAGE
    assert len(drawn) == number


def test_a_page_of_labels_of_ones_own_is_no_wider():
    labels = [f"label number {n}" for n in range(14)]
    row = committed("09_ablation").iloc[0].to_dict()
    pairs = [row | {"ablated": a, "measured": m} for a in labels for m in labels]
    for number in (1, 5, 6, 14):
        some = labels[:number]
        table = pd.DataFrame([p for p in pairs if p["ablated"] in some and p["measured"] in some])
        assert draw_ablation(table).get_size_inches()[0] <= style.PAGE
    sets = pd.DataFrame({"label": "a", "layer": range(40), "neuron": 0})
    assert draw_sets(sets).get_size_inches()[0] <= style.PAGE


def test_a_panel_of_small_shares_does_not_cut_the_tallest_bin():
    table = pd.DataFrame({"pair": ["a", "a", "b", "b"], "model": "tuned", "p": [0.1, 0.9] * 2})
    table = table.assign(share=[0.04, 0.01, 0.9, 1e-4], n=[1000, 1000, 9000, 9000])
    low, high = plots.sets.frequencies(table).axes[0].get_ylim()
    assert high > 0.9
    assert low <= 0.3 / 9000


def test_shares_of_too_few_are_grey_and_a_difference_of_zero_is_not():
    gaps = pd.DataFrame({"pair": "a", "epsilon": [0.01, 0.1], "rule": "exact"})
    gaps = gaps.assign(gap=0.1, null=0.0, n=9)
    shares = pd.DataFrame({"pair": "a", "epsilon": [0.01, 0.1], "tau": 0.5})
    shares = pd.concat([shares, shares.assign(tau=1.0)])
    shares = shares.assign(value=[0.5, 0.2, 1.0, 0.3], null=[0.5, 0.1, 0.0, 0.2])
    fig = plots.overlap.sensitivity(gaps, shares.assign(components=[20, 30, 1, 0]))
    image = fig.axes[1].images[0]
    assert image.get_array().mask.tolist() == [[False, False], [True, True]]
    drawn = image.cmap(image.norm(image.get_array()))
    assert np.allclose(drawn[1, :, :3], float(plots.overlap.TOO_FEW))
    assert not np.allclose(drawn[0, 0], drawn[1, 0], atol=0.05)
    assert any("not coloured" in text.get_text() for text in fig.legends[0].get_texts())


def test_one_size_of_a_score_stands_at_its_name():
    table = pd.DataFrame({"pair": "a", "score": ["frequency", "contribution"], "n": 9})
    table = table.assign(size=0.05, critical=1.0, critical_low=0.5, critical_high=1.5)
    for seen in (False, True):
        fig = plots.ablation.league(table.assign(sees_reference=[False, seen]))
        assert shown(fig, [0, 1])
        assert ("*" in fig.legends[0].get_title().get_text()) == seen


def test_a_category_that_damages_all_text_is_named_once():
    table = pd.DataFrame({"pair": "a", "category": "SUM", "plain": [1.5, 1.4, 2], "n": 9})
    table = table.assign(own=[1, 1.01, 0.1], score=["contribution"] * 2 + ["null: random"])
    fig = plots.ablation.damage(table)
    fig.canvas.draw()
    (ax,) = fig.axes
    (named,) = ax.texts
    assert named.get_text() == "SUM"
    assert named.xy == (1.5, 1)
    box, inside = named.get_window_extent(), ax.get_window_extent()
    assert inside.x0 <= box.x0 < box.x1 <= inside.x1


def test_a_category_is_not_squashed_by_another():
    table = committed("10_improved")
    fig = figures.improved(table)
    for ax, (name, part) in zip(fig.axes, table.groupby("panel", sort=False), strict=False):
        assert ax.get_title().startswith(name)
        assert ax.get_yscale() == ("symlog" if part["high"].max() > 1 else "linear")


def test_a_trajectory_below_nothing_is_seen_in_each_panel():
    table = pd.DataFrame({"panel": ["a", "a", "b", "b"], "line": "one", "step": [0, 1] * 2})
    table = table.assign(value=[0, -0.5, 0, 1.4], null=False, n=9)
    low, high = figures.trajectory(table).axes[0].get_ylim()
    assert low < -0.5
    assert high > 1.4


def test_the_n_of_halves_is_in_a_title():
    table = pd.DataFrame({"panel": "a", "what": "gained", "half": ["all", "A"], "n": [240, 120]})
    fig = figures.matter(table.assign(critical=0.1, low=0.0, high=0.2))
    assert fig.axes[0].get_title() == "a (n = 120 to 240)"


def test_sets_say_their_number_scale_and_null():
    table = pd.DataFrame({"label": ["a", "a", "b"], "layer": [0, 1, 1], "neuron": [3, 4, 4]})
    ax, scale = draw_sets(table).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a (n = 2)", "b (n = 1)"]
    assert "null, 50%" in scale.get_ylabel()
    assert any(np.allclose(line.get_ydata(), 0.5) for line in scale.get_lines())


LINES = pd.DataFrame({"panel": ["a", "a", "b"], "low": 0.1, "high": 0.3, "n": 9})  # b lacks one
MODELS = LINES.assign(model=["tuned", "base", "tuned"], wordings=3)
EFFECTS = LINES.set_axis(["pair", "critical_low", "critical_high", "n"], axis=1)
EFFECTS = EFFECTS.assign(critical=0.2, category="SUM", sees_reference=False, supported=True)
LACKS_ONE = {
    plots.overlap.wordings: MODELS.assign(pairs="same", value=0.2, null=0.1),
    plots.overlap.waterfall: MODELS.assign(step="words", left=0.2),
    plots.overlap.readable: MODELS.rename(columns={"model": "read off"}).assign(
        half="all", accuracy=0.2, chance=0.1
    ),
    plots.ablation.league: EFFECTS.assign(score="frequency", size=[0.01, 0.05, 0.01]),
    plots.ablation.by_category: EFFECTS.assign(score=["frequency", "contribution", "frequency"]),
}


@pytest.mark.parametrize("draw", LACKS_ONE, ids=lambda draw: draw.__name__)
def test_a_panel_may_lack_a_line_that_another_has(draw):
    """As a pair without a base lacks the base's, beside one that has it."""
    fig = draw(LACKS_ONE[draw])
    fig.canvas.draw()
    bars = [[len(bar.get_segments()) for bar in ax.collections] for ax in fig.axes]
    assert [sum(kinds) for kinds in bars] == [2 * sum(bars[1]), sum(bars[1])]
    assert sum(bars[1])


def test_categories_that_are_not_testable_give_a_page_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "figures_dir", lambda profile: tmp_path)
    table = committed("06_categories").iloc[:0]
    fig = plots.ablation.by_category(table)
    assert [text.get_text() for text in texts_of(fig)] == ["not testable: see the table's notes"]
    plots.save_figure(fig, table, "none", "p")
    assert {path.name for path in tmp_path.iterdir()} == {"none.png", "none.svg", "none.csv"}


def test_a_table_without_a_row_has_no_panel():
    fig, drawn = style.panels(pd.DataFrame({"panel": []}), "panel", (5, 1))
    fig.canvas.draw()
    assert drawn == []
    assert not any(ax.get_visible() for ax in fig.axes)
