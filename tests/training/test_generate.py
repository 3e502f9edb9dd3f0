"""Images from checkpoints."""

import pytest
from PIL import Image

from fastgan.training.errors import InputError
from fastgan.training.generate import FRAMES, STRIPS, generate


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
