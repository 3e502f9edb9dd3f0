"""The pages' code runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgan

PAGE = Path(__file__).parent.parent / "docs" / "migrating.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
CODE = {section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for section in SECTIONS}


def critic():
    return nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 16 * 16, 1))


def images():
    return torch.rand(2, 3, 32, 32)


def residual_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.InstanceNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 3, 3, 1, 1))


NAMES = {
    "# fastgan in the code that you have": lambda: {"model": residual_net()},
    "DCGAN": lambda: {
        "Generator": lambda ngpu: residual_net(),
        "Discriminator": lambda ngpu: critic(),
        "ngpu": 1,
        "weights_init": lambda module: None,
    },
    "WGAN-GP": lambda: {"critic": critic(), "D": critic(), "real_imgs": images(), "fake_imgs": images()},
    "StyleGAN": lambda: {"generator": residual_net(), "discriminator": critic(), "real_images": images()},
    "CycleGAN": lambda: dict.fromkeys(("netG_A", "netG_B", "netD_A", "netD_B"), residual_net()),
    "SRGAN": lambda: {"generator": residual_net(), "discriminator": critic()},
}


@pytest.mark.parametrize("section", NAMES)
def test_the_code_of_the_migration_page_runs(section):
    names = {"fastgan": fastgan, "torch": torch, **NAMES[section]()}
    assert CODE[section]
    for code in CODE[section]:
        exec(code, names)


def test_both_penalties_of_the_page_are_stock_s():
    stock, lean = (code for code in CODE["WGAN-GP"] if code.startswith("def compute"))
    penalties, net, real, fake = [], critic(), images(), images()
    for code in (stock, lean):
        names = {"fastgan": fastgan, "torch": torch}
        exec(code, names)
        torch.manual_seed(0)
        penalties.append(names["compute_gradient_penalty"](net, real, fake))
    torch.testing.assert_close(*penalties)
