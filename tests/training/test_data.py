"""Reading real images: what each kind of file becomes, in which order batches come, and what is refused."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.training import data
from fastgan.training.data import Batches, Turns, load_images
from fastgan.training.errors import InputError


def plain(mode, color, size=(12, 12)):
    return Image.new(mode, size, color)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    return path


def only(folder, size=8):
    images = load_images(str(folder), size)
    assert len(images) == 1
    return images[np.array([0])][0]


def test_digits_are_all_there_and_span_the_range():
    images = load_images("digits", 16)
    pixels = images[np.arange(len(images))]
    assert pixels.shape == (1797, 1, 16, 16) and pixels.dtype == np.uint8
    assert pixels.min() == 0 and pixels.max() == 255
    assert len(np.unique(pixels.reshape(1797, -1), axis=0)) > 1700


def test_photos_are_crops_of_both_photographs_and_always_the_same():
    both, again = load_images("photos", 16), load_images("photos", 16)
    each = [load_images(f"photos:{name}", 16) for name in ("china", "flower")]
    assert both.pixels.shape == (2 * data.CROPS, 3, 16, 16) and [len(one) for one in each] == [data.CROPS] * 2
    np.testing.assert_array_equal(both.pixels, np.concatenate([one.pixels for one in each]))
    np.testing.assert_array_equal(both.pixels, again.pixels)
    assert len(np.unique(both.pixels.reshape(len(both), -1), axis=0)) == len(both)


def test_crops_have_many_places_and_sizes_inside_their_photograph():
    pictures = load_images("photos:flower", 8).pictures
    crops = [pictures.open(row) for row in range(pictures.count)]
    assert all(crop.width == crop.height for crop in crops)
    sides = [crop.width for crop in crops]
    assert min(sides) == pytest.approx(427 / 4, abs=2) and max(sides) == pytest.approx(427, abs=2)
    assert pictures.name(3) == "crop 3 of photos:flower"


@pytest.mark.parametrize("name", ["photos:", "photos:rome"])
def test_a_photograph_that_does_not_exist_is_named(name):
    with pytest.raises(InputError, match=f"^--data: no {name}; expected photos, photos:china, photos:flower$"):
        load_images(name, 8)


def test_a_mixed_folder_becomes_rgb(folder):
    plain("L", 100).save(folder / "gray.png")
    plain("RGB", (255, 0, 0), (20, 10)).save(folder / "wide.jpg", quality=100)
    plain("CMYK", (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=100)
    plain("P", 1).save(folder / "palette.gif")
    sixteen = np.full((9, 9), 257 * 80, np.uint16)
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    plain("RGBA", (0, 0, 255, 0)).save(folder / "clear.webp", lossless=True)
    (folder / "notes.txt").write_text("no image")
    images = load_images(str(folder), 8)
    assert images.channels == 3
    means = images[np.arange(len(images))].mean((2, 3)).round().astype(int).tolist()
    colors = {Path(images.pictures.name(row)).name: mean for row, mean in enumerate(means)}
    assert colors.keys() == {"gray.png", "wide.jpg", "cmyk.jpg", "palette.gif", "sixteen.png", "clear.webp"}
    assert colors["gray.png"] == [100] * 3
    assert colors["sixteen.png"] == [80] * 3
    assert colors["clear.webp"] == [255] * 3
    for name in ("wide.jpg", "cmyk.jpg"):
        assert np.abs(np.array(colors[name]) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("picture", "value"),
    [
        (plain("L", 9), 9),
        (plain("1", 1), 255),
        (plain("LA", (9, 0)), 255),
        (plain("LA", (9, 255)), 9),
        (Image.fromarray(np.full((5, 5), 65535, np.uint16)), 255),
        (Image.fromarray(np.full((5, 5), 20 * 257, np.uint16)), 20),
    ],
)
def test_a_grayscale_folder_keeps_one_channel(folder, picture, value):
    picture.save(folder / "image.png")
    pixels = only(folder)
    assert pixels.shape == (1, 8, 8)
    assert (pixels == value).all()


def test_the_central_square_is_kept(folder):
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(folder / "wide.png")
    assert (only(folder) == 200).all()


def test_exif_orientation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: the file's left column is the picture's top row
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 0] = 255
    Image.fromarray(pixels).save(folder / "turned.png", exif=exif)
    np.testing.assert_array_equal(only(folder)[0], pixels.T)


def test_every_image_below_the_folder_counts_whatever_its_name(tmp_path):
    folder = tmp_path / "odd [x] *name"
    for name in ("train/a.png", "test/b.PNG", "val_c.jpeg", "deep/er/d.bmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        plain("L", 1).save(folder / name)
    assert len(load_images(str(folder), 8)) == 4


@pytest.fixture
def archive(folder):
    """A zip file with an image, as it lies in a folder of downloads."""
    plain("L", 1).save(folder / "packed.png")
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        file.write(folder / "packed.png", "inside/packed.png")
    (folder / "packed.png").unlink()


def test_what_is_packed_hidden_or_linked_does_not_count(folder, archive):
    for name in ("a.png", ".hidden.png", "._a.png", ".trash/b.png", "other/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        plain("L", 1).save(folder / name)
    (folder / "loop").symlink_to(".")
    (folder / "gone.png").symlink_to("nowhere.png")
    images = load_images(str(folder), 8)
    assert [images.pictures.name(row) for row in range(len(images))] == [f"{folder}/a.png", f"{folder}/other/c.png"]


def test_a_folder_with_an_archive_only_is_refused(folder, archive):
    with pytest.raises(InputError, match=r"^--data: no images found in .*images or below; archives are not opened$"):
        load_images(str(folder), 8)


def test_nothing_is_written_beside_the_images(folder):
    plain("L", 1).save(folder / "a.png")
    load_images(str(folder), 8)
    assert [path.name for path in folder.parent.rglob("*")] == ["images", "a.png"]


def test_a_set_too_large_for_memory_is_decoded_batch_by_batch_with_the_same_result(folder, monkeypatch):
    for number in range(5):
        plain("RGB", (number, 50, 200)).save(folder / f"{number}.png")
    rows = np.array([4, 0, 2])
    kept = load_images(str(folder), 8)[rows]
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    images = load_images(str(folder), 8)
    assert images.pixels is None
    np.testing.assert_array_equal(images[rows], kept)


def test_a_broken_image_is_named(folder):
    plain("RGB", 1, (64, 64)).save(folder / "good.jpg")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"^--data: cannot read image .*cut\.jpg \(.*\)$"):
        load_images(str(folder), 8)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "text.png").write_text("text")
    with pytest.raises(InputError, match=r"^--data: cannot read image .*text\.png \(.*\)$"):
        load_images(str(folder), 8)


def test_floating_point_pixels_are_refused(folder):
    plain("F", 0.5).save(folder / "float.tiff")
    with pytest.raises(InputError, match=r"float\.tiff \(floating-point pixels"):
        load_images(str(folder), 8)


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_without_images_is_refused(folder, content):
    if content:
        (folder / content).write_text("text")
    with pytest.raises(InputError, match=r"^--data: no images found in"):
        load_images(str(folder), 8)


def test_a_missing_folder_is_refused(folder):
    with pytest.raises(InputError, match=r"^--data: .*nowhere is no folder; expected digits, photos, a folder of"):
        load_images(str(folder / "nowhere"), 8)


def processes(count, index=0):
    return SimpleNamespace(num_processes=count, process_index=index, device=torch.device("cpu"))


@pytest.fixture
def numbered(folder):
    """20 images, number i having brightness 10 i."""
    for number in range(20):
        plain("L", 10 * number).save(folder / f"{number:02}.png")
    return load_images(str(folder), 8)


def brightness(batch):
    return ((batch[:, 0, 0, 0] + 1) * 12.75).round().int().tolist()


def test_an_epoch_shows_each_image_at_most_once_and_the_next_in_another_order(numbered):
    batches = Batches(numbered, 6, 0, processes(1))
    assert batches.per_epoch == 3
    epochs = [[value for _ in range(3) for value in brightness(next(batches))] for _ in range(2)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_batches_lie_in_minus_one_to_one(numbered):
    batch = next(Batches(numbered, 20, 0, processes(1)))
    assert batch.dtype == torch.float32 and not batch.requires_grad
    torch.testing.assert_close(batch.min(), torch.tensor(-1.0))
    torch.testing.assert_close(batch.max(), torch.tensor(190 / 127.5 - 1))


def test_the_seed_decides_the_order(numbered):
    first, same, other = (brightness(next(Batches(numbered, 20, seed, processes(1)))) for seed in (0, 0, 1))
    assert first == same != other


def test_seek_continues_where_drawing_stopped(numbered):
    batches = Batches(numbered, 6, 0, processes(1))
    drawn = [brightness(next(batches)) for _ in range(8)]
    resumed = Batches(numbered, 6, 0, processes(1))
    resumed.seek(5)
    assert [brightness(next(resumed)) for _ in range(3)] == drawn[5:]
    assert resumed.drawn == batches.drawn == 8


def test_processes_share_an_epoch_without_overlap(numbered):
    shares = [Batches(numbered, 5, 0, processes(2, index)) for index in range(2)]
    seen = [value for share in shares for _ in range(2) for value in brightness(next(share))]
    assert shares[0].per_epoch == 2
    assert sorted(seen) == list(range(20))


def test_fewer_images_than_a_batch_are_refused(numbered):
    with pytest.raises(InputError, match=r"^--batch-size: 21 is more than the 20 images in --data$"):
        Batches(numbered, 21, 0, processes(1))


@pytest.fixture
def bright(tmp_path):
    """5 images of brightness 200 to 240, beside the 20 of `numbered`, 0 to 190."""
    folder = tmp_path / "bright"
    folder.mkdir()
    for number in range(5):
        plain("L", 200 + 10 * number).save(folder / f"{number}.png")
    return load_images(str(folder), 8, "--data-b")


def test_two_sets_are_drawn_from_in_turn_until_the_larger_has_been_seen(numbered, bright):
    turns = Turns([numbered, bright], 4, 0, processes(1))
    assert turns.per_epoch == 10
    epoch = [brightness(next(turns)) for _ in range(10)]
    assert sorted(value for batch in epoch[0::2] for value in batch) == list(range(20))
    assert all(len(set(batch)) == 4 and min(batch) >= 20 for batch in epoch[1::2])


def test_sets_of_one_size_are_not_aligned(numbered):
    turns = Turns([numbered, numbered], 20, 0, processes(1))
    assert brightness(next(turns)) != brightness(next(turns))


def test_turns_continue_where_drawing_stopped(numbered, bright):
    turns = Turns([numbered, bright], 3, 0, processes(1))
    drawn = [brightness(next(turns)) for _ in range(15)]
    for place in range(15):
        resumed = Turns([numbered, bright], 3, 0, processes(1))
        resumed.seek(place)
        assert [brightness(next(resumed)) for _ in range(15 - place)] == drawn[place:]
        assert resumed.drawn == turns.drawn == 15


def test_a_set_smaller_than_a_batch_is_named_by_its_option(numbered, bright):
    with pytest.raises(InputError, match=r"^--batch-size: 6 is more than the 5 images in --data-b$"):
        Turns([numbered, bright], 6, 0, processes(1))


@pytest.mark.parametrize("memory", [None, 0])
def test_color_can_be_added_to_a_grayscale_set(numbered, folder, monkeypatch, memory):
    rows = np.array([3, 1])
    gray = numbered[rows]
    if memory is not None:
        monkeypatch.setattr(data, "IN_MEMORY", memory)
    images = load_images(str(folder), 8)
    images.add_color()
    np.testing.assert_array_equal(images[rows], np.repeat(gray, 3, axis=1))
