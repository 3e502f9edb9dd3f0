"""Networks of domain-adversarial training (Ganin & Lempitsky, 2015): features, and a head for labels and one for domains.

The layout is figure 4a of the paper, its network for handwritten digits, with batch norms, and dropout for small sets of
images, without which the features are learned by heart. The layer that reverses the gradient is no part of it: whoever
trains puts one before the domain head.
"""

from torch import Tensor, nn


class Classifier(nn.Module):
    """Maps images `(N, channels, image_size, image_size)` to logits `(N, classes)`.

    `features` maps them to `(N, width)` for the two heads, `labels` those to the logits.
    """

    def __init__(self, image_size: int = 28, channels: int = 3, features: int = 32, classes: int = 10):
        super().__init__()
        if image_size < 16 or image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, 16 or more; got {image_size}")
        second, side = features * 3 // 2, (image_size - 12) // 4
        self.width = second * side * side
        self.features = nn.Sequential(
            nn.Conv2d(channels, features, 5),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(features, second, 5),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.Dropout2d(0.5),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.labels = nn.Sequential(
            nn.Linear(self.width, 100),
            nn.BatchNorm1d(100),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(100, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.labels(self.features(images))


class DomainHead(nn.Sequential):
    """Maps features `(N, width)` to logits `(N, 1)`: positive means "of the source"."""

    def __init__(self, width: int, hidden: int = 100):
        super().__init__(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 1))
