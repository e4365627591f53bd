"""Figures of alteration show what their tables hold, and nothing is missing or clipped."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers.plots import alteration as figures
from helpers.plots import style


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
