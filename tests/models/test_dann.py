"""The networks of domain-adversarial training: the paper's sizes, and sizes that do not fit."""

import pytest
import torch

from fastgan.models.dann import Classifier, DomainHead


def test_at_28_pixels_both_heads_see_the_paper_s_768_features():
    classifier = Classifier()
    features = classifier.features(torch.randn(2, 3, 28, 28))
    assert features.shape == (2, classifier.width) == (2, 768)
    assert classifier.labels(features).shape == (2, 10)
    assert DomainHead(classifier.width)(features).shape == (2, 1)


@pytest.mark.parametrize("size", [16, 20, 32])
def test_other_sizes_and_channels_fit(size):
    assert Classifier(size, channels=1, features=4, classes=3)(torch.randn(2, 1, size, size)).shape == (2, 3)


@pytest.mark.parametrize("size", [12, 18])
def test_a_size_that_does_not_halve_twice_is_refused(size):
    with pytest.raises(ValueError, match=f"image_size must be a multiple of 4, 16 or more; got {size}"):
        Classifier(size)
