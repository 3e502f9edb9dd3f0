"""The command line: `fastgan train | generate | bench | doctor`."""

import io
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastgan.bench.command import bench
from fastgan.doctor import report
from fastgan.training import generate as generating
from fastgan.training import run
from fastgan.training.errors import Diverged, InputError, Interrupted, OutputError, one_line
from fastgan.training.latent import LARGEST
from fastgan.training.system import require

UsageError: Any = typer.BadParameter.__base__
"""click's, or that of typer's own copy of click, as typer's version has it."""


class OneLineErrors(typer.core.TyperGroup):
    """Prints what is wrong as one line on stderr.

    Exit status: 2 for bad input, 1 for what fails later, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        previous = signal.signal(signal.SIGTERM, _terminate)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # a path may be any bytes
        try:
            sys.exit(super().main(*args, **{**options, "standalone_mode": False}))
        except UsageError as error:
            message, status = error.format_message(), 2
        except InputError as error:
            message, status = str(error), 2
        except (Diverged, OutputError) as error:
            message, status = str(error), 1
        except Interrupted as error:
            message, status = str(error), 128 + error.signal
        except Terminated:
            message, status = "terminated", 128 + signal.SIGTERM
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            message, status = f"out of memory: smaller images, or fewer at a time, need less ({one_line(error)})", 1
        except (KeyboardInterrupt, typer.Abort):
            message, status = "interrupted", 130
        finally:
            signal.signal(signal.SIGTERM, previous)
        if message:
            line = message.replace("\n", "\\n")  # of a value that has one, or of a file's name
            print(f"fastgan: {line}", file=sys.stderr)
        sys.exit(status)


class Terminated(BaseException):
    """SIGTERM where there is no step to finish. It passes all that catches errors, and what was begun is cleaned up."""


def _terminate(*_: Any) -> None:
    raise Terminated


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. On the CPU torch has no type of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="Fused operators for GAN training, and what they train.",
)
train = typer.Typer(no_args_is_help=True, help="Train a reference system.")
app.add_typer(train, name="train")


SOURCES = "digits, photos, photos:china, photos:flower, a folder of images, or hf:NAME for the Hugging Face hub"

# What every system takes. None stands for the setting's default, or for what a resumed checkpoint keeps.
Data = Annotated[
    str | None,
    typer.Option(help=f"{SOURCES}.", show_default="digits"),
]
ImageSize = Annotated[int | None, typer.Option(help=f"A power of two from 8 to {LARGEST}.", show_default="32")]
BatchSize = Annotated[int | None, typer.Option(help="Images per batch and process.", show_default="64")]
Steps = Annotated[int | None, typer.Option(help="Generator updates, instead of --epochs.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the data.", show_default="40")]
Seed = Annotated[int | None, typer.Option(help="Decides weights, noise and data order.", show_default="0")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Precision = Annotated[str | None, typer.Option(help="fp32, or bf16 for autocast.", show_default="fp32")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoint, curves and samples.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue --out's checkpoint exactly, with the options that it keeps.")
]
Fuse = Annotated[
    bool | None,
    typer.Option("--fuse/--no-fuse", help="Fuse the networks, or leave them in stock PyTorch.", show_default="fuse"),
]
Compare = Annotated[bool, typer.Option("--compare", help="Compare with stock PyTorch at length.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Two steps of a real run, of which nothing stays.")]


@train.command()
def dcgan(
    data: Data = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", show_default="12")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.", show_default="0.0002")] = None,
    d_steps: Annotated[
        int | None, typer.Option(help="Discriminator updates per generator update.", show_default="1")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="The discriminator's target for real images is 1 minus this.", show_default="0")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/dcgan"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train a DCGAN, by default on scikit-learn's handwritten digits."""
    _train("dcgan", **locals())


@train.command()
def cyclegan(
    data_a: Annotated[
        str | None, typer.Option(help=f"The first domain: {SOURCES}.", show_default="photos:china")
    ] = None,
    data_b: Annotated[
        str | None, typer.Option(help="The other domain, likewise.", show_default="photos:flower")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="A multiple of 4, 24 or more.", show_default="32")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of each domain per batch and process.", show_default="1")
    ] = None,
    steps: Steps = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the larger of the two domains.", show_default="2")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Adam's learning rate; over the second half it falls to zero.", show_default="0.0002"),
    ] = None,
    generator: Annotated[str | None, typer.Option(help="resnet, or unet for pix2pix's.", show_default="resnet")] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Of the resnet; the paper takes 6 at 128, 9 from 256 on.", show_default="6")
    ] = None,
    features: Annotated[int | None, typer.Option(help="Channels of the largest maps.", show_default="32")] = None,
    loss: Annotated[str | None, typer.Option(help="lsgan for least squares, or log.", show_default="lsgan")] = None,
    cycle_weight: Annotated[float | None, typer.Option(help="Of the cycle term.", show_default="10")] = None,
    identity_weight: Annotated[
        float | None, typer.Option(help="Of the identity term, as a part of --cycle-weight.", show_default="0.5")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/cyclegan"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train a CycleGAN, by default between crops of scikit-learn's two photographs."""
    _train("cyclegan", **locals())


@train.command()
def wgan_gp(
    data: Data = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.", show_default="0.0001")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="dcgan, or residual for the paper's residual networks.", show_default="dcgan")
    ] = None,
    features: Annotated[
        int | None, typer.Option(help="Channels: of DCGAN's largest maps, or of all residual ones.", show_default="64")
    ] = None,
    critic_norm: Annotated[
        str | None, typer.Option(help="none, layer or instance (or batch, which spoils it).", show_default="none")
    ] = None,
    critic_steps: Annotated[
        int | None, typer.Option(help="Critic updates per generator update.", show_default="5")
    ] = None,
    penalty_weight: Annotated[float | None, typer.Option(help="Of the gradient penalty.", show_default="10")] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/wgan-gp"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train a WGAN-GP, by default on scikit-learn's handwritten digits."""
    _train("wgan-gp", **locals())


@train.command()
def sngan(
    data: Data = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.", show_default="0.0002")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="standard, or residual: the paper's tables 3 and 4.", show_default="standard")
    ] = None,
    features: Annotated[
        int | None, typer.Option(help="Channels: of the largest maps, or of all residual ones.", show_default="64")
    ] = None,
    d_steps: Annotated[
        int | None, typer.Option(help="Discriminator updates per generator update.", show_default="1")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/sngan"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train an SN-GAN, by default on scikit-learn's handwritten digits."""
    _train("sngan", **locals())


@train.command()
def stylegan(
    data: Data = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch and process.", show_default="32")] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.", show_default="0.001")] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Weight of R1; the paper has 10, at 1024x1024.", show_default="1")
    ] = None,
    penalty_every: Annotated[
        int | None, typer.Option(help="Steps for each of which R1 is computed once.", show_default="1")
    ] = None,
    features: Annotated[
        int | None,
        typer.Option(help="Channels up to 32x32, halved at each doubling; the paper has 512.", show_default="32"),
    ] = None,
    latent_dim: Annotated[int | None, typer.Option(help="Of z; the paper has 512.", show_default="64")] = None,
    w_dim: Annotated[int | None, typer.Option(help="Of w; the paper has 512.", show_default="64")] = None,
    mapping_layers: Annotated[int | None, typer.Option(help="From z to w.", show_default="8")] = None,
    mixing_probability: Annotated[
        float | None, typer.Option(help="How often images have the styles of two latents.", show_default="0.9")
    ] = None,
    phase_images: Annotated[
        int | None,
        typer.Option(
            help="Images per process in which a resolution settles, and its double fades in; 0: no growing.",
            show_default="6000",
        ),
    ] = None,
    average_images: Annotated[
        int | None, typer.Option(help="Half-life of the averaged generator, in images.", show_default="2000")
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/stylegan"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train a StyleGAN that grows from 8x8, by default on scikit-learn's handwritten digits."""
    _train("stylegan", **locals())


@train.command()
def srgan(
    data: Annotated[
        str | None,
        typer.Option(help="photos, a folder of images, or hf:NAME; a part is kept for testing.", show_default="photos"),
    ] = None,
    scale: Annotated[int | None, typer.Option(help="How many times larger: 2, 4 or 8.", show_default="4")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Of large crops: a multiple of 16, 32 or more; the paper has 96.", show_default="64"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Crops per batch and process; the paper has 16.", show_default="4")
    ] = None,
    steps: Steps = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over 2000 crops, or one of each image.", show_default="8")
    ] = None,
    pretrain_steps: Annotated[
        int | None, typer.Option(help="Of SRResNet alone, before the discriminator is there.", show_default="3000")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Adam's learning rate at the start; it falls to a tenth, then to a hundredth.", show_default="0.001"
        ),
    ] = None,
    features: Annotated[int | None, typer.Option(help="Channels; the paper has 64.", show_default="32")] = None,
    blocks: Annotated[int | None, typer.Option(help="Residual blocks; the paper has 16.", show_default="4")] = None,
    adversarial_weight: Annotated[
        float | None, typer.Option(help="Of the adversarial term.", show_default="0.001")
    ] = None,
    vgg_weights: Annotated[
        str | None,
        typer.Option(
            help="A state_dict of torchvision's vgg19, for a content loss of its features.", show_default="pixels"
        ),
    ] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/srgan"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train an SRGAN, SRResNet first, by default on scikit-learn's photographs."""
    _train("srgan", **locals())


@train.command()
def dann(
    image_size: Annotated[int | None, typer.Option(help="A multiple of 4 from 16 to 84.", show_default="28")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of each domain per batch and process.", show_default="32")
    ] = None,
    steps: Steps = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the domains.", show_default="20")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Adam's learning rate at the start, from which it falls.", show_default="0.003")
    ] = None,
    features: Annotated[int | None, typer.Option(help="Channels of the first convolution.", show_default="32")] = None,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precision = None,
    out: Out = Path("runs/dann"),
    checkpoint_every: CheckpointEvery = 500,
    resume: Resume = False,
    fuse: Fuse = None,
    compare: Compare = False,
    dry_run: DryRun = False,
) -> None:
    """Train a classifier of digits for digits blended with photographs, whose labels it never sees."""
    _train("dann", **locals())


def _train(
    system: str,
    *,
    out: Path,
    steps: int | None,
    epochs: int | None,
    device: str,
    checkpoint_every: int,
    resume: bool,
    compare: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    console = Console()
    result = run.train(
        system,
        {name: value for name, value in settings.items() if value is not None},
        out=out,
        steps=steps,
        epochs=epochs,
        device=device,
        checkpoint_every=checkpoint_every,
        resume=resume,
        careful_compare=compare,
        dry_run=dry_run,
        console=console,
    )
    if result is None:
        console.print(f"{out} is trained to its end already; give more --steps or --epochs to go on")
    else:
        console.print(_summary(system, result))


def _summary(system: str, result: run.Result) -> Table:
    table = Table(title=system, title_justify="left", show_header=False)
    table.add_row("trained", f"to step {result.steps} in {result.seconds:.0f} s")
    table.add_row("speed", f"{result.images_per_s:.0f} images/s")
    for name, score in result.scores.items():
        table.add_row(name, str(score))
    if comparison := result.comparison:
        times = f"{comparison.fused * 1e3:.1f} against {comparison.stock * 1e3:.1f} ms a step"
        table.add_row("against stock", f"{comparison.speedup:.2f}x: {times}, medians of {comparison.pairs}")
    if folder := result.folder:
        table.add_row("samples", str(folder.final_grid))
        table.add_row("curves", str(folder.curves))
        table.add_row("", f"tensorboard --logdir {folder.tensorboard}")
        table.add_row("checkpoint", str(folder.checkpoint))
    else:
        table.add_row("kept", "nothing: this was a dry run")
    if result.previous:
        table.add_row("run before", f"moved to {result.previous}")
    return table


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="Folder for them.", show_default="generated, beside it")] = None,
    num: Annotated[int | None, typer.Option(help="Images in the grid.", show_default="64")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same images.", show_default="0")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="An image to translate or upscale, or a folder, for CycleGAN and SRGAN."),
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="CycleGAN: a2b or b2a, beside --input.", show_default="a2b")
    ] = None,
    truncation: Annotated[
        float | None, typer.Option(help="StyleGAN: 0 for the mean style, 1 for styles as they are.", show_default="1")
    ] = None,
    style_mix: Annotated[
        bool, typer.Option("--style-mix", help="StyleGAN: also a matrix of coarse styles by fine ones.")
    ] = False,
) -> None:
    """Write a grid of samples and a strip of latent interpolations; or, with --input, images translated or upscaled."""
    options: dict[str, Any] = {
        "num": num, "seed": seed, "direction": direction, "truncation": truncation, "style_mix": style_mix or None,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        fits = (name == "direction") == (source is not None)
        require(
            fits,
            f"--{name.replace('_', '-')}",
            given[name],
            "it only beside --input" if name == "direction" else "no --input beside it",
        )
    paths = (
        generating.transform(checkpoint, source, out, **given)
        if source
        else generating.generate(checkpoint, out, **given)
    )
    for path in paths:
        typer.echo(path)


app.command()(bench)


@app.command()
def doctor() -> None:
    """Show versions, devices, and which backend serves each operator."""
    Console().print(report())


if __name__ == "__main__":
    app()
