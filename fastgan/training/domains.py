"""Two domains of digits: scikit-learn's as they are, and blended with photographs, as MNIST-M was made of MNIST.

A blended digit is |patch − digit| in each channel (Ganin & Lempitsky 2015, section 4). No digit is in two of the sets, and
no part of a photograph both in the target set and in the test set.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastgan.training.data import ImageSet, Pictures, Pixels, Rows

TEST, SOURCE = 500, 650
"""Digits of the test set and of the source set; the target set has the others."""

COPIES = 8
"""Of each digit that is trained on, each turned, scaled and shifted a little: there are few of them."""

ROWS, COLUMNS = 5, 7
"""Parts into which a photograph is cut. Every fourth is kept for the test set."""

LARGEST = 84
"""Pixels of a side that a patch may have, to lie in one part."""


class Domains(NamedTuple):
    """Labelled sets. `test` is of the target domain, each of its digits there once and as it is."""

    source: ImageSet
    target: ImageSet
    test: ImageSet


@functools.cache
def load_domains(size: int) -> Domains:
    """The three sets at `size` x `size` pixels, in three channels: always the same ones."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    random = np.random.default_rng(0)
    order = random.permutation(len(digits.target))
    test, source, target = np.split(order, [TEST, TEST + SOURCE])
    source, target = np.repeat(source, COPIES), np.repeat(target, COPIES)
    parts = _parts(load_sample_images().images)
    train_parts = [part for place, part in enumerate(parts) if place % 4]

    def labelled(rows: Rows, images: list[Pixels], name: str) -> ImageSet:
        pictures = Pictures(len(rows), lambda row: f"{name} {row}", lambda row: Image.fromarray(images[row]))
        return ImageSet(pictures, size, name, digits.target[rows])

    def copies(rows: Rows) -> list[Pixels]:
        return [_drawn(digits.images[row], size, random) for row in rows]

    originals = [_placed(digits.images[row], size, 0.0, 1.0, (0.0, 0.0)) for row in test]
    return Domains(
        labelled(source, copies(source), "the source digits"),
        labelled(target, [_blended(digit, train_parts, random) for digit in copies(target)], "the target digits"),
        labelled(test, [_blended(digit, parts[::4], random) for digit in originals], "the test digits"),
    )


def _parts(photos: list[Pixels]) -> list[Pixels]:
    return [
        part
        for photo in photos
        for row in np.array_split(photo, ROWS, axis=0)
        for part in np.array_split(row, COLUMNS, axis=1)
    ]


def _drawn(digit: np.ndarray, size: int, random: np.random.Generator) -> Pixels:
    """A digit turned by up to 10 degrees, scaled by up to a tenth, and shifted by up to 8 % of the image."""
    angle, scale, *shift = random.uniform((-math.pi / 18, 0.9, -0.08, -0.08), (math.pi / 18, 1.1, 0.08, 0.08))
    return _placed(digit, size, angle, scale, (shift[0], shift[1]))


def _placed(digit: np.ndarray, size: int, angle: float, scale: float, shift: tuple[float, float]) -> Pixels:
    """A digit of 0 to 16 as an image in three channels. `shift` is in parts of the image's side."""
    picture = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    factor = picture.width / (size * scale)
    cos, sin = math.cos(angle) * factor, math.sin(angle) * factor
    right, down = (size * (0.5 + part) for part in shift)  # where the digit's centre comes to lie
    centre = picture.width / 2
    inverse = (cos, -sin, centre - cos * right + sin * down, sin, cos, centre - sin * right - cos * down)
    turned = picture.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(turned)[..., None], 3, axis=2)


def _blended(digit: Pixels, parts: list[Pixels], random: np.random.Generator) -> Pixels:
    part = parts[random.integers(len(parts))]
    size = len(digit)
    top, left = (random.integers(side - size + 1) for side in part.shape[:2])
    return np.abs(part[top : top + size, left : left + size].astype(np.int16) - digit).astype(np.uint8)
