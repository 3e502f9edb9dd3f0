"""Sample grids, scatter plots, and walks between latents."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.training.errors import OutputError
from fastgan.training.images import GAP, PLOT, save_grid, scatter, to_grid
from fastgan.training.latent import slerp


@pytest.mark.parametrize("channels", [1, 3])
def test_images_stand_row_by_row_with_gaps_between(channels):
    images = torch.linspace(-1, 1, 5 * channels * 4 * 6).view(5, channels, 4, 6)
    grid = np.asarray(to_grid(images, columns=3)).reshape(2 * (4 + GAP) + GAP, 3 * (6 + GAP) + GAP, channels)
    covered = np.zeros(grid.shape[:2], bool)
    for number, image in enumerate(images):
        row, column = divmod(number, 3)
        top, left = GAP + row * (4 + GAP), GAP + column * (6 + GAP)
        area = np.s_[top : top + 4, left : left + 6]
        covered[area] = True
        np.testing.assert_array_equal(grid[area], ((image + 1) * 127.5).round().permute(1, 2, 0).numpy())
    assert not grid[~covered].any()


def test_values_beyond_the_range_are_clipped_not_wrapped():
    assert np.asarray(to_grid(torch.tensor([-1.5, 1.5]).view(2, 1, 1, 1)))[GAP, [GAP, 2 * GAP + 1]].tolist() == [0, 255]


def test_a_grid_is_square_by_default():
    assert to_grid(torch.zeros(9, 1, 4, 4)).size == (3 * (4 + GAP) + GAP,) * 2


def test_a_saved_grid_is_the_grid(tmp_path):
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    save_grid(images, tmp_path / "new" / "grid.png")
    saved = Image.open(tmp_path / "new" / "grid.png")
    assert saved.format == "PNG"
    np.testing.assert_array_equal(np.asarray(saved), np.asarray(to_grid(images)))


def test_a_full_disk_is_named(tmp_path, full_disk):
    with full_disk(at=1000), pytest.raises(OutputError, match=r"^cannot write .*grid\.png \(File too large\)$"):
        save_grid(torch.rand(4, 3, 32, 32), tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_slerp_goes_from_start_to_end_without_nearing_the_origin():
    torch.manual_seed(0)
    start, end = torch.randn(2, 100, 1, 1)
    walk = slerp(start, end, 9)
    torch.testing.assert_close(walk[0], start)
    torch.testing.assert_close(walk[-1], end)
    lengths = walk.flatten(1).norm(dim=1)
    assert lengths.min() > 0.95 * min(start.norm(), end.norm())
    angles = torch.cosine_similarity(walk[1:].flatten(1), walk[:-1].flatten(1)).acos()
    assert angles.max() < 1.5 * angles.min()


def test_a_scatter_plot_fills_its_square_and_keeps_proportions():
    points = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    plot = scatter(points, ["red", "lime", "blue"])
    assert plot.shape == (3, PLOT, PLOT) and (plot[:, 0, 0] == 1).all()
    centres = []
    for channel in range(3):
        alone = (plot[channel] == 1) & (plot.sum(0) == -1)
        centres.append(alone.nonzero().float().mean(0).flip(0))
    red, lime, blue = centres
    assert red[0] < 8 and lime[0] > PLOT - 8
    torch.testing.assert_close(blue, torch.stack([(red + lime)[0] / 2, red[1] + (lime - red)[0] / 4]), atol=0.5, rtol=0)


def test_a_scatter_plot_of_one_place_is_drawn():
    assert (scatter(torch.ones(3, 2), ["black"] * 3) == -1).any()
