"""Images from checkpoints."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.models.cyclegan import ResNetGenerator, UNetGenerator
from fastgan.models.srgan import Generator
from fastgan.training import checkpoint, run
from fastgan.training.errors import InputError
from fastgan.training.generate import COLUMNS, FRAMES, ROWS, STRIPS, generate, transform


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


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num": 0}, "--num: 0"), ({"num": 2**63}, "--num: 9223372036854775808"), ({"seed": -1}, "--seed: -1")],
)
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


@pytest.fixture
def pictures(tmp_path):
    """Files of several kinds and sizes, as a folder to translate."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, shape in (
        ("a.png", (32, 24, 3)),
        ("a.jpg", (9, 30, 3)),
        ("below/odd.png", (33, 26)),
        ("b.bmp", (8, 8, 3)),
    ):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def cyclegan(tmp_path):
    """Trains a small one; `cyclegan(generator="unet")` is the folder of its run."""

    def make(**settings):
        given = {"image_size": 24, "features": 2, "blocks": 1, "fuse": False} | settings
        run.train("cyclegan", given, out=tmp_path / "cyclegan", steps=1, device="cpu")
        return tmp_path / "cyclegan"

    return make


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("generator", ["resnet", "unet"])
def test_a_folder_is_translated_each_image_at_its_own_size(cyclegan, pictures, generator):
    folder = cyclegan(generator=generator)
    paths = transform(folder, pictures)
    names = [path.relative_to(folder / "generated").as_posix() for path in paths]
    assert names == ["a.jpg.png", "a.png.png", "b.png", "below/odd.png"]
    sizes = [Image.open(path).size for path in paths]
    assert sizes == [(30, 9), (24, 32), (8, 8), (26, 33)]


@pytest.mark.parametrize("direction", ["a2b", "b2a"])
def test_a_translation_is_what_the_directions_generator_makes(cyclegan, pictures, direction):
    folder = cyclegan()
    paths = transform(folder, pictures, direction=direction)
    network = ResNetGenerator(3, 2, 1)
    network.load_state_dict(checkpoint.load(folder / "checkpoint.pt")["networks"][f"generator_{direction}"])
    image = torch.from_numpy(pixels(pictures / "a.png").copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = (network(image)[0].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(pixels(paths[1]) - expected.numpy()).max() <= 0.51


def test_a_size_that_does_not_halve_is_translated_with_its_border_repeated(cyclegan, pictures):
    folder = cyclegan(generator="unet")
    network = UNetGenerator(3, 2, 3)
    network.load_state_dict(checkpoint.load(folder / "checkpoint.pt")["networks"]["generator_a2b"])
    image = np.repeat(pixels(pictures / "below" / "odd.png")[..., None], 3, axis=2)
    padded = torch.from_numpy(np.pad(image, ((0, 7), (0, 6), (0, 0)), mode="edge")).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = (network(padded)[0, :, :33, :26].permute(1, 2, 0) + 1) * 127.5
    assert np.abs(pixels(transform(folder, pictures)[3]) - expected.numpy()).max() <= 0.51


def test_a_broken_or_a_small_image_is_named_and_nothing_written(cyclegan, pictures):
    folder = cyclegan()
    (pictures / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"^--input: cannot read image .*text\.png \("):
        transform(folder, pictures)
    Image.new("RGB", (40, 7)).save(pictures / "text.png")
    with pytest.raises(InputError, match=r"^--input: .*text\.png, 40x7, does not fit; expected sides of 8 or more$"):
        transform(folder, pictures)
    assert not (folder / "generated").exists()


def test_folders_and_directions_that_do_not_fit_are_named(cyclegan, pictures, tmp_path):
    folder = cyclegan()
    with pytest.raises(InputError, match=r"^--input: no images found in .*empty"):
        (tmp_path / "empty").mkdir()
        transform(folder, tmp_path / "empty")
    with pytest.raises(InputError, match=r"^--out: .*pictures is the folder of --input"):
        transform(folder, pictures, pictures)
    with pytest.raises(InputError, match=r"^--direction: back does not fit; expected a2b or b2a"):
        transform(folder, pictures, direction="back")


def test_what_a_system_does_not_do_is_said(cyclegan, trained, pictures):
    with pytest.raises(InputError, match=r"cyclegan starts from images; name one, or a folder of them, by --input$"):
        generate(cyclegan())
    with pytest.raises(InputError, match=r"^--input: .* is of dcgan, which makes images from noise, not from images$"):
        transform(trained, pictures)


def test_one_file_is_translated_beside_others(cyclegan, pictures):
    folder = cyclegan()
    (path,) = transform(folder, pictures / "a.png")
    assert path == folder / "generated" / "a.png" and Image.open(path).size == (24, 32)


# ── SRGAN ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def srgan(tmp_path):
    """Trains a small one, and gives the folder of its run."""
    settings = {"image_size": 32, "batch_size": 2, "features": 2, "blocks": 1, "fuse": False, "pretrain_steps": 1}
    run.train("srgan", settings, out=tmp_path / "srgan", steps=2, device="cpu")
    return tmp_path / "srgan"


def test_a_folder_is_upscaled_whatever_the_sizes(srgan, pictures):
    Image.new("RGB", (1, 2), "red").save(pictures / "tiny.png")
    paths = transform(srgan, pictures)
    names = [path.relative_to(srgan / "generated").as_posix() for path in paths]
    assert names == ["a.jpg.png", "a.png.png", "b.png", "below/odd.png", "tiny.png"]
    sizes = [Image.open(path).size for path in paths]
    assert sizes == [(120, 36), (96, 128), (32, 32), (104, 132), (4, 8)]
    assert Image.open(paths[3]).mode == "L"


def test_an_upscaled_file_is_what_the_generator_makes_of_it(srgan, pictures):
    (path,) = transform(srgan, pictures / "a.png")
    network = Generator(4, 3, 2, 1)
    network.load_state_dict(checkpoint.load(srgan / "checkpoint.pt")["networks"]["generator"])
    image = torch.from_numpy(pixels(pictures / "a.png").copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = ((network.eval()(image)[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255)
    assert path == srgan / "generated" / "a.png"
    assert np.abs(pixels(path) - expected.numpy()).max() <= 0.51


@pytest.mark.parametrize(
    ("mode", "upscaled"),
    [
        ("1", "L"),
        ("L", "L"),
        ("LA", "LA"),
        ("I;16", "L"),
        ("RGB", "RGB"),
        ("RGBA", "RGBA"),
        ("P", "RGB"),
        ("CMYK", "RGB"),
    ],
)
def test_grayscale_stays_and_transparency_is_kept(srgan, tmp_path, mode, upscaled):
    random = np.random.default_rng(0)
    colors = Image.fromarray(random.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    picture = colors.convert("RGBA") if mode == "LA" else colors
    picture = Image.new(mode, (10, 12), 9) if mode == "I;16" else picture.convert(mode)
    alpha = Image.fromarray(random.integers(0, 256, (12, 10), dtype=np.uint8))
    if upscaled.endswith("A"):
        picture.putalpha(alpha)
    picture.save(tmp_path / "it.tiff")
    (path,) = transform(srgan, tmp_path / "it.tiff")
    result = Image.open(path)
    assert result.mode == upscaled and result.size == (40, 48)
    if upscaled.endswith("A"):
        expected = alpha.resize((40, 48), Image.Resampling.BICUBIC)
        assert result.getchannel("A").tobytes() == expected.tobytes()


def test_what_does_not_fit_an_srgan_is_named_and_nothing_written(srgan, pictures):
    with pytest.raises(
        InputError, match=r"^--direction: a checkpoint of srgan does not fit; expected one of cyclegan$"
    ):
        transform(srgan, pictures, direction="a2b")
    (pictures / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"^--input: cannot read image .*text\.png \("):
        transform(srgan, pictures)
    with pytest.raises(InputError, match=r"^--input: .*nowhere"):
        transform(srgan, pictures / "nowhere")
    with pytest.raises(InputError, match=r"srgan starts from images; name one, or a folder of them, by --input$"):
        generate(srgan)
    assert not (srgan / "generated").exists()


def test_the_vgg_is_not_needed_to_upscale(srgan, pictures):
    state = checkpoint.load(srgan / "checkpoint.pt")
    state["settings"]["vgg_weights"] = "gone.pth"
    checkpoint.save(srgan / "checkpoint.pt", state)
    assert len(transform(srgan, pictures / "a.png")) == 1
