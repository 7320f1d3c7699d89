"""What a picture of losses shows: running means where they belong, on a scale that the first guesses do not set."""

import pytest
import torch
from matplotlib.figure import Figure

from titans.evaluation.plots import plot_loss_by_position


def test_losses_by_position_are_running_means_at_their_places(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    loss = torch.cat((torch.full((4,), 90.0), torch.arange(100.0) / 100))
    plot_loss_by_position({"on": loss, "off": loss + 1}, tmp_path / "a.png", title="a", segment=20, smooth=3)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    on, off, end = axes.lines
    assert list(on.get_xdata()) == list(range(1, 103)) and list(end.get_xdata()) == [20, 20]
    assert on.get_ydata()[50] == pytest.approx(loss[50:53].mean().item())
    assert off.get_ydata()[-1] == pytest.approx(on.get_ydata()[-1] + 1)
    assert axes.get_ylim()[1] < 3, "the first positions are off the scale"
