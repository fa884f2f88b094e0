"""Figures as PNG files: what is in the image, what the files of a page are called."""

import io
import re

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from builders import write_run

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, page, plots


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3] in [0, 1]."""
    assert png.startswith(b"\x89PNG\r\n")
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def test_title_and_legend_stand_apart():
    def bands(title: str) -> int:
        """Stretches of rows with something in them."""
        series = {
            name: ([0, 1, 2], values)
            for name, values in (("training", [1, 2, 3]), ("validation", [3, 2, 1]))
        }
        inked = (pixels(figures.png(figures.Plot(title, "step", "nats", series))) < 0.9).any(
            axis=(1, 2)
        )
        return int(np.sum(np.diff(inked.astype(int), prepend=0) == 1))

    assert bands("A long title over the whole width") == bands("") + 1


@pytest.mark.parametrize(
    ("y_label", "scale"), [("ratio", 1e-4), ("nats per token", -123456.7), ("a" * 32, 1.02)]
)
def test_labels_are_not_cut(y_label, scale):
    values = [scale * (1 + 0.2 * np.sin(i)) for i in range(40)]
    series = {f"objective/reward number {i}": (range(40), values) for i in range(6)}
    plot = figures.Plot("A title", "iteration", y_label, series)
    image = pixels(figures.png(plot))
    assert image.shape == (int((3.3 + 5 * 0.22) * figures.PNG_DPI), int(5.2 * figures.PNG_DPI), 3)
    inked = (image < 0.95).any(axis=2)
    assert inked.any()
    assert not any(edge.any() for edge in (inked[:3], inked[-3:], inked[:, :3], inked[:, -3:]))
    assert figures.png(plot) == figures.png(plot)
    [left] = re.findall(
        rf'transform="rotate\(-90 ([-\d.]+) [-\d.]+\)">{y_label}<', figures.svg(plot)
    )
    assert (
        float(left) > 14
    )  # a line's height, and room for a browser's own font, which may be larger


def test_the_files_of_a_run(tmp_path, capsys):
    run = write_run(tmp_path / "mine")
    assert cli.run(["report", str(run), "--png", str(tmp_path / "png")]) is None
    names = ["score-objective-score", "kl-from-the-reference-objective-kl", "reward-against-kl"]
    names += ["scores", "response-lengths"]
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == sorted(
        f"{name}.png" for name in names
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"5 figures in {tmp_path / 'png'}"
    histogram = pixels((tmp_path / "png" / "scores.png").read_bytes())
    for color in figures.COLORS[:2]:  # before, after
        assert np.sum(np.abs(histogram - matplotlib.colors.to_rgb(color)).max(axis=2) < 0.02) > 100


def test_equal_titles_are_numbered(tmp_path, monkeypatch):
    plot, empty = (
        figures.Plot("Score!", "x", "y", {"a": points}) for points in (([1], [1]), ([], []))
    )
    monkeypatch.setattr(plots, "curves", lambda groups: ([plot, empty, plot], {}))
    monkeypatch.setattr(plots, "distributions", lambda groups: [plot])
    run = write_run(tmp_path / "run")
    paths = page.write_png([run], tmp_path / "png")
    assert [path.name for path in paths] == ["score.png", "score--2.png", "score--3.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written: File exists"):
        page.write_png([run], tmp_path / "file")
