"""A training run from its options to its result: checks, data, system, loop, comparison."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_origin

import torch
from accelerate import Accelerator
from rich.console import Console

from fastgan import backend
from fastgan.training import checkpoint
from fastgan.training.compare import Comparison, compare
from fastgan.training.cyclegan import CycleGAN
from fastgan.training.dann import DANN
from fastgan.training.data import PictureSet, Turns
from fastgan.training.dcgan import DCGAN
from fastgan.training.errors import Diverged, InputError, Interrupted, OutputError, one_line
from fastgan.training.folder import RunFolder, check_writable
from fastgan.training.loop import KEPT, Plan, Training
from fastgan.training.memory import keep_freed_memory
from fastgan.training.sngan import SNGAN
from fastgan.training.srgan import SRGAN
from fastgan.training.stylegan import StyleGAN
from fastgan.training.system import Score, Settings, System, as_option, require, require_count
from fastgan.training.wgan_gp import WGANGP

SYSTEMS: dict[str, type[System]] = {
    system.name: system for system in (DCGAN, WGANGP, SNGAN, StyleGAN, CycleGAN, SRGAN, DANN)
}

COMPARE_SECONDS = {False: 4.0, True: 40.0}
"""How long the comparison with stock PyTorch takes, without and with `--compare`."""

OTHER_VERSION = "another version of fastgan may have written it"


@dataclass(frozen=True)
class Result:
    """What a run did. `comparison` is None when the model was not fused, `previous` where an earlier run was moved; `scores`
    are the system's.

    `folder` is None after a dry run, which leaves nothing.
    """

    folder: RunFolder | None
    steps: int
    images_per_s: float
    seconds: float
    scores: dict[str, Score]
    comparison: Comparison | None
    previous: Path | None


def train(
    system_name: str,
    given: Mapping[str, Any],
    *,
    out: Path,
    steps: int | None = None,
    epochs: int | None = None,
    device: str = "auto",
    checkpoint_every: int = 500,
    resume: bool = False,
    careful_compare: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> Result | None:
    """Trains `system_name` with the settings in `given`, the others at their defaults or as the checkpoint has them.

    Returns None when the resumed run had already reached its end. Raises `InputError` before anything is written, except
    for a broken image in a set that is too large to be decoded at the start (`data.IN_MEMORY`). A dry run takes two steps
    from where a real one would start, in a folder of its own that is then removed.
    """
    console = console or Console(quiet=True)
    folder = RunFolder(out)
    system_type = SYSTEMS[system_name]
    state = read_checkpoint(folder.checkpoint, system_name) if resume else None
    settings = _settings(system_type.settings_type, given, state, folder.checkpoint)
    _check_schedule(steps, epochs, checkpoint_every)
    comparable = settings.fuse or not careful_compare
    require(comparable, "--compare", "with --no-fuse", "one of the two: it measures the fused model")
    accelerator = make_accelerator(device, settings.precision)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if settings.fuse:
        _check_backend(accelerator.device)
    if accelerator.is_main_process:
        check_writable(out)
    console.quiet |= not accelerator.is_main_process

    with console.status("Reading images"):
        sets = settings.load()
    channels = max(images.channels for images in sets)
    for images in sets:
        if images.channels < channels:
            images.add_color()
    if state:
        _check_same(sets, channels, state, folder.checkpoint)
    batches = Turns(sets, settings.batch_size, settings.seed, accelerator)

    def build(fused: bool) -> System:
        system = system_type(settings, channels, accelerator)
        system.prepare()
        if fused:
            system.fuse()
        return system

    torch.manual_seed(settings.seed)
    system = build(settings.fuse)
    for remark in system.remarks():
        console.print(remark)
    if accelerator.process_index:
        torch.manual_seed(settings.seed + accelerator.process_index)

    steps_per_epoch = max(1, batches.per_epoch // system.draws)
    if dry_run:
        steps = (state["step"] if state else 0) + 2
    elif steps is None and epochs is None and state:
        steps = state["steps"]
    elif steps is None:
        steps = (epochs or system.epochs) * steps_per_epoch
    if state and state["step"] >= steps:
        return None
    previous = None
    if accelerator.is_main_process and not state and not dry_run:
        previous = folder.set_aside()
    accelerator.wait_for_everyone()

    with folder.scratch() if dry_run else nullcontext(folder) as used:
        training = Training(system, batches, used, Plan(steps, steps_per_epoch, checkpoint_every), console)
        if state:
            restore(training, state, folder.checkpoint)
        try:
            curves = training.run()
        except (Diverged, InputError, Interrupted, OutputError) as error:
            error.args = (f"{error}; {'a dry run keeps nothing' if dry_run else _kept(error, training)}",)
            raise

    scores = system.scores(sets)
    comparison = None
    if settings.fuse:
        with console.status("Comparing with stock PyTorch"):
            stock = build(False)
            stock.is_stock = True
            stock.load_state_dict(system.state_dict())
            comparison = compare(system, stock, batches, COMPARE_SECONDS[careful_compare])
    return Result(
        folder=None if dry_run else folder,
        steps=training.step,
        images_per_s=curves.images / curves.seconds,
        seconds=curves.seconds,
        scores=scores,
        comparison=comparison,
        previous=previous,
    )


def _check_same(sets: Sequence[PictureSet], channels: int, state: dict[str, Any], path: Path) -> None:
    """Raises `InputError` unless the checkpoint was trained on as many images."""
    for images, count in zip(sets, state["images"], strict=False):
        found = images.pictures.count
        if (found, channels) != (count, state["channels"]):
            raise InputError(
                f"{images.option}: {found} images with {channels} channels, but {path} was trained on {count} with "
                f"{state['channels']}; resume with the same images"
            )


def _kept(error: Exception, training: Training) -> str:
    """What is left of a run that ended in `error`."""
    if isinstance(error, Interrupted):
        return f"--resume continues {training.folder.checkpoint}"
    good = f"{training.folder.checkpoint} (step {training.saved})" if training.saved else "none, it came too early"
    return f"the last good checkpoint: {good}"


def read_checkpoint(path: Path, system_name: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint of a known system, of `system_name` if given, that holds what it must and settings that fit."""
    state = checkpoint.load(path)
    name, expected = state.get("system", "no system"), [system_name] if system_name else list(SYSTEMS)
    if name not in expected:
        raise InputError(f"{path}: a checkpoint of {name}, expected one of {', '.join(expected)}")
    settings_type = SYSTEMS[name].settings_type
    _check_kinds(path, "entry", state, {"format": str, **KEPT, **SYSTEMS[name].kept})
    _check_kinds(path, "setting", state["settings"], {field.name: field.type for field in fields(settings_type)})
    try:
        settings_type(**state["settings"]).check()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return state


def _check_kinds(path: Path, what: str, found: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the checkpoint has just the names of `kinds`, with values of those kinds.

    A `Literal` is of kind str here: which words it takes is for `Settings.check` to say.
    """
    for name in [*kinds, *found]:
        kind = str if get_origin(kinds.get(name)) is Literal else kinds.get(name)
        if name not in found:
            problem = "is missing"
        elif kind is None:
            problem = "is unknown"
        elif not isinstance(found[name], (int, float) if kind is float else kind):
            problem = f"is of type {type(found[name]).__name__}, not {kind.__name__}"
        else:
            continue
        raise InputError(f"{path}: {what} {name} {problem}; {OTHER_VERSION}")


def restore(part: System | Training, state: dict[str, Any], path: Path) -> None:
    """`part.load_state_dict(state)`, naming the checkpoint where its contents do not fit."""
    try:
        part.load_state_dict(state)
    except Exception as error:  # torch raises many kinds
        raise InputError(f"{path}: its state does not fit ({one_line(error)}); {OTHER_VERSION}") from error


def make_accelerator(device: str, precision: str) -> Accelerator:
    """accelerate's view of the device, the number format and the processes."""
    present = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu", *([present.type] if present else [])]
    if device != "auto":
        kind, _, index = device.partition(":")
        require(kind in known, "--device", device, f"{' or '.join(known)}, which this machine has, or auto")
        if index and kind != "cpu":
            count = torch.accelerator.device_count()
            require(index.isdecimal() and int(index) < count, "--device", device, f"an index below {count}")
            torch.accelerator.set_device_index(int(index))
    # Where accelerate is not told that it is the CPU, each of several processes without a GPU takes itself for the only one.
    on_cpu = device.startswith("cpu") or present is None
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if precision == "bf16" else "no")


def _check_backend(device: torch.device) -> None:
    """Raises `InputError` unless the kernels that the environment asks for can serve `device`."""
    try:
        backend.serving(device.type)
    except RuntimeError as error:
        raise InputError(str(error)) from error


def _settings(kind: type[Settings], given: Mapping[str, Any], state: dict[str, Any] | None, path: Path) -> Settings:
    """`given` over the defaults, or over the checkpoint's settings: then only `sources`, which may have moved, change, and
    none where there was none."""
    if state is None:
        settings = kind(**given)
    else:
        settings = kind(**state["settings"])
        for name, value in given.items():
            kept = getattr(settings, name)
            moved = name in kind.sources and value and kept
            if value != kept and not moved:
                given_option, kept_option = _typed(name, value), _typed(name, kept)
                raise InputError(
                    f"{given_option} does not fit {path}, trained with {kept_option}; a resumed run keeps it"
                )
        settings = replace(settings, **{name: given[name] for name in kind.sources if name in given})
    settings.check()
    return settings


def _typed(name: str, value: Any) -> str:
    """Setting `name` as typed on the command line."""
    if isinstance(value, bool):
        return as_option(name if value else f"no_{name}")
    return f"{as_option(name)} {value}"


def _check_schedule(steps: int | None, epochs: int | None, checkpoint_every: int) -> None:
    require(steps is None or epochs is None, "--steps", f"{steps} with --epochs {epochs}", "one of the two")
    for option, value in (("--steps", steps), ("--epochs", epochs), ("--checkpoint-every", checkpoint_every)):
        if value is not None:
            require_count(option, value)
