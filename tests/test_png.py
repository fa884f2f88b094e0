"""Figures as PNG files: what is in the image, what the files of a page are called."""

import io
import re

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from builders import slow, write_run

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, page, plots


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3] in [0, 1]."""
    assert png.startswith(b"\x89PNG\r\n")
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def inked(png: bytes) -> np.ndarray:
    """[height, width] whether there is something on the paper."""
    return (pixels(png) < 0.95).any(axis=2)


def test_title_and_legend_stand_apart():
    curves = {"training": ([0, 1, 2], [1, 2, 3]), "validation": ([0, 1, 2], [3, 2, 1])}

    def num_bands(title: str) -> int:
        """Stretches of rows with something in them."""
        rows = inked(figures.png(figures.Plot(title, "step", "nats", curves))).any(axis=1)
        begins = np.diff(rows.astype(int), prepend=0) == 1
        return np.sum(begins)

    assert num_bands("A long title over the whole width") == num_bands("") + 1


@pytest.mark.parametrize(
    ("y_label", "scale"),
    [slow("ratio", 1e-4), ("nats per token", -123456.7), slow("a" * 32, 1.02)],
)
def test_labels_are_not_cut(y_label, scale):
    steps = range(40)
    values = scale * (1 + 0.2 * np.sin(steps))
    series = {f"objective/reward number {i}": (steps, values) for i in range(6)}
    plot = figures.Plot("A title", "iteration", y_label, series)
    png = figures.png(plot)
    image = inked(png)
    rows_of_legend = 6
    inches = (3.3 + 0.22 * (rows_of_legend - 1), 5.2)
    assert image.shape == tuple(int(length * figures.PNG_DPI) for length in inches)
    inside = np.zeros_like(image)
    inside[3:-3, 3:-3] = True
    assert image.any()
    assert not image[~inside].any()
    assert figures.png(plot) == png
    place = rf'transform="rotate\(-90 ([-\d.]+) [-\d.]+\)">{y_label}<'
    [left] = re.findall(place, figures.svg(plot))
    # A line's height, and room for a browser's own font, which may be larger.
    assert float(left) > 14


def test_the_files_of_a_run(tmp_path, capsys):
    folder = tmp_path / "png"
    assert cli.run(["report", str(write_run(tmp_path / "mine")), "--png", str(folder)]) is None
    names = ["score-objective-score", "kl-from-the-reference-objective-kl", "reward-against-kl"]
    names += ["scores", "response-lengths"]
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    said = capsys.readouterr().out
    assert said.endswith(f"5 figures in {folder}\n")
    histogram = pixels((folder / "scores.png").read_bytes())
    for color in figures.COLORS[:2]:  # before, after
        differences = np.abs(histogram - matplotlib.colors.to_rgb(color))
        assert np.sum(differences.max(axis=2) < 0.02) > 100


def test_equal_titles_are_numbered(tmp_path, monkeypatch):
    plot = figures.Plot("Score!", "x", "y", {"a": ([1], [1])})
    empty = figures.Plot("Score!", "x", "y", {"a": ([], [])})
    monkeypatch.setattr(plots, "curves", lambda groups: ([plot, empty, plot], {}))
    monkeypatch.setattr(plots, "distributions", lambda groups: [plot])
    draw = figures.png
    # Drawing takes long.
    monkeypatch.setattr(figures, "png", lambda plot: draw(plot) if plot is empty else b"png")
    run = write_run(tmp_path / "run")
    paths = page.write_png([run], tmp_path / "png")
    assert [path.name for path in paths] == ["score.png", "score--2.png", "score--3.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written"):
        page.write_png([run], tmp_path / "file")
