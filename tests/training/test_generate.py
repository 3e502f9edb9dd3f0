"""Images from checkpoints."""

import numpy as np
import pytest
from PIL import Image

from fastgan.training import run
from fastgan.training.errors import InputError
from fastgan.training.generate import COLUMNS, FRAMES, ROWS, STRIPS, generate


@pytest.fixture
def trained(train, tmp_path):
    train(tmp_path / "run", steps=2)
    return tmp_path / "run"


def test_it_writes_a_grid_and_strips_beside_the_checkpoint(trained):
    paths = generate(trained / "checkpoint.pt", num=9)
    assert paths == [trained / "generated" / "samples.png", trained / "generated" / "interpolation.png"]
    samples, strips = map(Image.open, paths)
    assert samples.size == (3 * 10 + 2, 3 * 10 + 2)
    assert strips.size == (FRAMES * 10 + 2, STRIPS * 10 + 2)


def test_the_seed_decides_the_images(trained, tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        paths = generate(trained, tmp_path / name, seed=seed)
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0] and contents[0][1] != contents[2][1]


def test_many_images_are_those_of_few_and_more(trained, tmp_path):
    few, many = (Image.open(generate(trained, tmp_path / str(num), num=num)[0]) for num in (64, 100))
    assert many.size == (102, 102)
    assert few.crop((2, 2, 82, 10)).tobytes() == many.crop((2, 2, 82, 10)).tobytes()


@pytest.mark.parametrize(("options", "message"), [({"num": 0}, "--num: 0"), ({"seed": -1}, "--seed: -1")])
def test_bad_options_are_named(trained, options, message):
    with pytest.raises(InputError, match=f"^{message} does not fit"):
        generate(trained, **options)
    assert not (trained / "generated").exists()


def test_an_output_that_cannot_be_written_is_named(trained):
    with pytest.raises(InputError, match=r"^--out: cannot write to .*checkpoint\.pt/below"):
        generate(trained, trained / "checkpoint.pt" / "below")


@pytest.fixture
def styled(tmp_path):
    settings = {"image_size": 16, "batch_size": 64, "features": 4, "latent_dim": 5, "w_dim": 5, "phase_images": 0}
    run.train("stylegan", settings | {"fuse": False}, out=tmp_path / "styled", steps=2, device="cpu")
    return tmp_path / "styled"


def tiles(path, columns):
    """Row by row."""
    image, size = np.asarray(Image.open(path)), 18
    rows = image.shape[0] // size
    return [
        image[2 + r * size : 18 + r * size, 2 + c * size : 18 + c * size] for r in range(rows) for c in range(columns)
    ]


def test_truncation_at_zero_gives_one_image_whatever_the_seed(styled, tmp_path):
    means = []
    for seed in (1, 2):
        paths = generate(styled, tmp_path / str(seed), num=4, seed=seed, truncation=0.0)
        means += [*tiles(paths[0], 2), *tiles(paths[1], FRAMES)]
    assert all((mean == means[0]).all() for mean in means)
    whole, one = (generate(styled, tmp_path / str(psi), num=4, truncation=psi)[0] for psi in (None, 1.0))
    assert whole.read_bytes() == one.read_bytes()
    assert any((tile != means[0]).any() for tile in tiles(whole, 2))


def test_a_style_matrix_has_a_row_for_each_coarse_and_a_column_for_each_fine_image(styled):
    paths = generate(styled, style_mix=True)
    assert [path.name for path in paths] == ["samples.png", "interpolation.png", "style-mix.png"]
    matrix = tiles(paths[2], COLUMNS + 1)
    assert len(matrix) == (ROWS + 1) * (COLUMNS + 1)
    assert (matrix[0] == 0).all() and not any((tile == 0).all() for tile in matrix[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": 0.7}, "--truncation: a checkpoint of dcgan does not fit; expected one of stylegan"),
        ({"style_mix": True}, "--style-mix: a checkpoint of dcgan does not fit; expected one of stylegan"),
    ],
)
def test_options_of_another_system_are_refused(trained, options, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        generate(trained, **options)
    assert not (trained / "generated").exists()


def test_a_truncation_that_is_no_number_is_refused(styled):
    with pytest.raises(InputError, match=r"^--truncation: nan does not fit"):
        generate(styled, truncation=float("nan"))
