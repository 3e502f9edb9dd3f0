"""The command line: one line and status 2 for bad input, nothing left behind, and signals."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.training import checkpoint, loop, run
from fastgan.training.dcgan import DCGAN
from fastgan.training.loop import KEPT

TINY = ["--image-size", "8", "--batch-size", "256", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "COMPARE_SECONDS", {False: 0.01, True: 0.1})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    AcceleratorState._reset_state(reset_partial_state=True)


def fastgan(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def dcgan(*args):
    return fastgan("train", "dcgan", *args)


def images(path, count=3, size=(8, 8)):
    Path(path).mkdir()
    for number in range(count):
        Image.new("L", size, number).save(f"{path}/{number}.png")


def assert_refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("fastgan: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_a_run_prints_where_things_are_and_how_fast_it_was():
    result = dcgan(*TINY, "--steps", 2)
    assert result.exit_code == 0, result.output
    for part in ("images/s", "against stock", "ms a step", "final.png", "curves.csv", "tensorboard", "checkpoint.pt"):
        assert part in result.stdout
    assert sorted(os.listdir("runs/dcgan")) == ["checkpoint.pt", "curves.csv", "samples", "tensorboard"]


def test_a_folder_may_be_named_in_bytes_that_are_no_text():
    trained = dcgan(*TINY, "--steps", 1, "--no-fuse", "--out", "run\udcff")
    assert trained.exit_code == 0 and b"run\xff/checkpoint.pt" in trained.stdout_bytes, trained.exception
    generated = fastgan("generate", "run\udcff", "--num", 4)
    assert generated.stdout_bytes.split() == [b"run\xff/generated/samples.png", b"run\xff/generated/interpolation.png"]


def test_an_unfused_run_has_nothing_to_compare():
    result = dcgan(*TINY, "--steps", 1, "--no-fuse")
    assert result.exit_code == 0 and "against" not in result.stdout


def test_options_reach_the_run():
    options = ["--lr", 0.001, "--seed", 5, "--d-steps", 2, "--label-smoothing", 0.1, "--precision", "bf16", "--no-fuse"]
    assert dcgan(*TINY, *options, "--epochs", 1, "--out", "here").exit_code == 0
    state = checkpoint.load(Path("here/checkpoint.pt"))
    expected = {"data": "digits", "image_size": 8, "batch_size": 256, "lr": 0.001, "seed": 5, "d_steps": 2}
    expected |= {"label_smoothing": 0.1, "precision": "bf16", "fuse": False}
    assert expected.items() <= state["settings"].items()
    assert state["step"] == 1797 // 256 // 2
    assert state["drawn"] == 2 * state["step"]


def test_stylegan_s_options_reach_the_run_and_its_images():
    options = {
        "gamma": 1.0, "penalty_every": 2, "features": 4, "latent_dim": 5, "w_dim": 6, "mapping_layers": 3,
        "mixing_probability": 0.5, "phase_images": 300, "average_images": 100, "lr": 0.002, "image_size": 16,
    }  # fmt: skip
    typed = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = fastgan("train", "stylegan", *typed, "--batch-size", 256, "--steps", 2, "--device", "cpu", "--no-fuse")
    assert result.exit_code == 0, result.output
    state = checkpoint.load(Path("runs/stylegan/checkpoint.pt"))
    assert options.items() <= state["settings"].items()
    result = fastgan("generate", "runs/stylegan", "--num", 4, "--truncation", 0.5, "--style-mix", "--out", "images")
    assert result.stdout.split() == [f"images/{name}.png" for name in ("samples", "interpolation", "style-mix")]


def test_stylegan_refuses_what_does_not_fit():
    assert_refused(fastgan("train", "stylegan", "--mixing-probability", 2), "--mixing-probability", "from 0 to 1")
    assert_refused(fastgan("train", "stylegan", "--image-size", 24), "--image-size", "power of two")
    assert_refused(fastgan("train", "dcgan", "--gamma", 1), "--gamma")
    assert os.listdir() == []


def test_resume_alone_continues_and_says_when_there_is_nothing_left():
    dcgan(*TINY, "--steps", 2, "--no-fuse", "--precision", "bf16")
    assert dcgan("--resume", "--steps", 3).exit_code == 0
    state = checkpoint.load(Path("runs/dcgan/checkpoint.pt"))
    assert (state["step"], state["settings"]["precision"], state["settings"]["fuse"]) == (3, "bf16", False)
    result = dcgan("--resume")
    assert result.exit_code == 0 and "trained to its end already" in result.stdout


@pytest.mark.parametrize("option", [["--precision", "fp32"], ["--fuse"]], ids=" ".join)
def test_an_option_that_disagrees_with_the_checkpoint_is_refused(option):
    dcgan(*TINY, "--steps", 1, "--no-fuse", "--precision", "bf16")
    assert_refused(dcgan("--resume", "--steps", 2, *option), " ".join(option) + " does not fit", "checkpoint.pt")


def test_a_new_run_says_where_the_old_one_went():
    dcgan(*TINY, "--steps", 1, "--no-fuse")
    assert "moved to runs/dcgan/previous-1" in dcgan(*TINY, "--steps", 1, "--no-fuse").stdout


def test_a_dry_run_says_that_it_leaves_nothing():
    result = dcgan(*TINY, "--dry-run", "--no-fuse")
    assert result.exit_code == 0 and "images/s" in result.stdout and "dry run" in result.stdout
    assert "runs/dcgan" not in result.stdout and os.listdir() == []


def test_doctor_prints_its_report():
    result = fastgan("doctor")
    assert result.exit_code == 0 and torch.__version__ in result.stdout


def test_generate_prints_what_it_wrote():
    dcgan(*TINY, "--steps", 1, "--no-fuse")
    result = fastgan("generate", "runs/dcgan/checkpoint.pt", "--num", 4, "--out", "images")
    assert result.exit_code == 0
    assert result.stdout.split() == ["images/samples.png", "images/interpolation.png"]
    assert all(Path(path).is_file() for path in result.stdout.split())


TINY_CYCLEGAN = ["--image-size", 24, "--features", 2, "--blocks", 1, "--device", "cpu"]


def test_cyclegan_trains_and_translates_a_folder():
    options = ["--lr", 0.001, "--generator", "unet", "--loss", "log", "--cycle-weight", 5, "--identity-weight", 0]
    options += ["--data-a", "digits", "--data-b", "photos:flower", "--batch-size", 2, "--seed", 3, "--no-fuse"]
    assert fastgan("train", "cyclegan", *TINY_CYCLEGAN, *options, "--steps", 2).exit_code == 0
    settings = checkpoint.load(Path("runs/cyclegan/checkpoint.pt"))["settings"]
    expected = {"data_a": "digits", "data_b": "photos:flower", "lr": 0.001, "generator": "unet", "loss": "log"}
    expected |= {"cycle_weight": 5, "identity_weight": 0, "batch_size": 2, "seed": 3, "features": 2, "blocks": 1}
    assert expected.items() <= settings.items()
    images("mine", 2, (20, 30))
    result = fastgan("generate", "runs/cyclegan", "--input", "mine", "--direction", "b2a", "--out", "theirs")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["theirs/0.png", "theirs/1.png"]
    assert Image.open("theirs/0.png").size == (20, 30)


def test_srgan_trains_scores_and_upscales_a_file():
    options = {
        "scale": 2, "image_size": 32, "batch_size": 2, "features": 2, "blocks": 1, "pretrain_steps": 1, "lr": 0.002,
        "adversarial_weight": 0.01, "seed": 3,
    }  # fmt: skip
    typed = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = fastgan("train", "srgan", *typed, "--steps", 2, "--device", "cpu", "--no-fuse")
    assert result.exit_code == 0, result.output
    for part in ("no --vgg-weights", "PSNR, bicubic", "PSNR, SRResNet", "PSNR, SRGAN", " dB", "SSIM, SRGAN"):
        assert part in result.stdout
    assert options.items() <= checkpoint.load(Path("runs/srgan/checkpoint.pt"))["settings"].items()
    images("mine", 1, (20, 30))
    result = fastgan("generate", "runs/srgan", "--input", "mine/0.png", "--out", "theirs")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["theirs/0.png"] and Image.open("theirs/0.png").size == (40, 60)


def test_srgan_refuses_what_does_not_fit():
    assert_refused(fastgan("train", "srgan", "--scale", 3), "--scale", "2, 4 or 8")
    assert_refused(fastgan("train", "srgan", "--vgg-weights", "nowhere.pth"), "--vgg-weights", "nowhere.pth")
    images("small", 12, (90, 60))
    assert_refused(fastgan("train", "srgan", "--data", "small"), "--data", "1.png, 90x60", "sides of 64")
    assert os.listdir() == ["small"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--direction", "a2b"], ["--direction", "beside --input"]),
        (["--input", "mine", "--seed", 1], ["--seed", "no --input"]),
        (["--input", "mine", "--num", 1], ["--num", "no --input"]),
        (["--input", "mine"], ["--input", "dcgan"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_options_of_the_other_kind_of_system_are_refused(args, parts):
    dcgan(*TINY, "--steps", 1, "--no-fuse")
    images("mine")
    assert_refused(fastgan("generate", "runs/dcgan", *args), *parts)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--lr", -1], ["--lr", "above 0"]),
        (["--lr", "nan"], ["--lr", "above 0"]),
        (["--steps", 0], ["--steps", "1 or more"]),
        (["--steps", "many"], ["--steps", "integer"]),
        (["--epochs", -2], ["--epochs", "1 or more"]),
        (["--steps", 1, "--epochs", 1], ["--steps", "--epochs", "one of the two"]),
        (["--batch-size", 1], ["--batch-size", "2 or more"]),
        (["--batch-size", 1798], ["--batch-size", "1797"]),
        (["--image-size", 12], ["--image-size", "power of two"]),
        (["--image-size", 1 << 20], ["--image-size", "1024 or less"]),
        (["--d-steps", 0], ["--d-steps", "1 or more"]),
        (["--label-smoothing", 1], ["--label-smoothing", "below 1"]),
        (["--seed", -1], ["--seed"]),
        (["--checkpoint-every", 0], ["--checkpoint-every", "1 or more"]),
        (["--precision", "fp8"], ["--precision", "fp32 or bf16"]),
        (["--device", "toaster"], ["--device", "cpu"]),
        (["--compare", "--no-fuse"], ["--compare", "--no-fuse"]),
        (["--resume"], ["runs/dcgan/checkpoint.pt", "no checkpoint there"]),
        (["--data", "nowhere"], ["--data", "nowhere", "hf:NAME"]),
        (["--data", ""], ["--data: '' names nothing", "hf:NAME"]),
        (["--data", "hf:"], ["--data: 'hf:' names nothing", "hf:NAME"]),
        (["--depth", 3], ["--depth"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_options_are_refused_before_anything_is_written(args, parts):
    assert_refused(dcgan(*args), *parts)
    assert os.listdir() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_cuda_is_named():
    assert_refused(dcgan("--device", "cuda"), "--device: cuda", "cpu")


def test_bad_folders_are_refused_before_anything_is_written():
    Path("empty").mkdir()
    images("few", 3)
    images("broken", 3)
    Path("broken/1.png").write_bytes(Path("broken/1.png").read_bytes()[:40])
    before = sorted(map(str, Path().rglob("*")))
    assert_refused(dcgan("--data", "empty"), "--data", "empty")
    assert_refused(dcgan("--data", "few", "--batch-size", 4), "--batch-size", "3 images")
    assert_refused(dcgan("--data", "broken", "--batch-size", 2), "--data", "broken/1.png")
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("foo", "it must be auto, cpp, triton or reference"),
        ("triton", "the Triton kernels serve CUDA tensors, not cpu"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_before_anything_is_written(use_backend, monkeypatch, name, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    use_backend(name)
    assert_refused(dcgan(*TINY, "--steps", 1), f"FASTGAN_BACKEND={name}: {reason}")
    assert os.listdir() == []
    assert dcgan(*TINY, "--steps", 1, "--no-fuse").exit_code == 0, "an unfused run asks no backend"


def test_outputs_that_cannot_be_written_are_refused():
    Path("file").write_text("mine")
    assert_refused(dcgan(*TINY, "--out", "file"), "--out", "file")
    assert_refused(dcgan(*TINY, "--out", "file/below/it"), "--out", "file/below/it")
    assert Path("file").read_text() == "mine" and os.listdir() == ["file"]


@pytest.mark.parametrize("args", [["generate", "it.pt"], ["train", "dcgan", "--resume", "--out", "."]])
def test_what_is_no_checkpoint_is_refused(args):
    name = "it.pt" if args[0] == "generate" else "checkpoint.pt"
    Path(name).write_text("no checkpoint")
    assert_refused(fastgan(*args), name, "not a fastgan checkpoint")
    assert os.listdir() == [name]


def without(*keys):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def with_setting(**settings):
    return lambda state: state["settings"].update(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((without(key), f"entry {key} is missing") for key in {**KEPT, **DCGAN.kept} if key != "system"),
        (without("system"), "a checkpoint of no system, expected one of dcgan"),
        (lambda state: state.update(ema={}), "entry ema is unknown"),
        (lambda state: state.update(step="4"), "entry step is of type str, not int"),
        (without("settings", "lr"), "setting lr is missing"),
        (with_setting(gamma=10), "setting gamma is unknown"),
        (with_setting(batch_size="many"), "setting batch_size is of type str, not int"),
        (with_setting(image_size=12), "--image-size: image_size must be a power of two"),
        (with_setting(features=8), "its state does not fit (Error(s) in loading state_dict for Generator:)"),
        (without("networks", "generator"), "its state does not fit ('generator')"),
        (without("networks", "generator", "main.0.weight"), "its state does not fit (Error(s) in loading"),
        (without("optimizers", "generator", "param_groups"), "its state does not fit ('param_groups')"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(change, message):
    assert dcgan(*TINY, "--steps", 1, "--no-fuse").exit_code == 0
    path = Path("runs/dcgan/checkpoint.pt")
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(path, state)
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    for args in (["generate", "runs/dcgan"], ["train", "dcgan", "--resume", "--steps", 2]):
        assert_refused(fastgan(*args), f"runs/dcgan/checkpoint.pt: {message}")
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


def test_divergence_is_one_line_and_status_1():
    result = dcgan(*TINY, "--lr", 1e30, "--steps", 9, "--no-fuse")
    assert result.exit_code == 1
    message, kept = r"step 1: loss_g is nan \(grad_norm_d \S+, grad_norm_g nan\)", "none, it came too early"
    assert re.fullmatch(rf"fastgan: {message}; the last good checkpoint: {kept}\n", result.stderr), result.stderr


def assert_out_of_memory(result, reason):
    assert result.exit_code == 1
    assert result.stderr.startswith("fastgan: out of memory: ") and result.stderr.count("\n") == 1, result.stderr
    assert reason in result.stderr


def test_more_memory_than_there_is_is_one_line(monkeypatch):
    dcgan(*TINY, "--steps", 1, "--no-fuse")
    assert_out_of_memory(fastgan("generate", "runs/dcgan", "--num", 2**31 - 1), "you tried to allocate")

    def train(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf which")

    monkeypatch.setattr(run, "train", train)
    assert_out_of_memory(dcgan(), "Tried to allocate 2 GiB.")


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(run, "train", lambda *_, **__: torch.zeros(2).view(3))
    assert isinstance(dcgan().exception, RuntimeError)


@pytest.fixture
def start():
    """start(*args) is a process of its own; with `full_at`, one whose files cannot grow past that many bytes, as if the disk
    were full. It ends with the test."""
    started = []

    def start(*args, full_at=None, **environment):
        def prepare():
            if full_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))

        command = [sys.executable, "-m", "fastgan.cli", *map(str, args)]
        environment = {**os.environ, **environment}
        started.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=prepare)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_disk_that_fills_is_one_line_and_the_last_checkpoint_stays(start):
    dcgan(*TINY, "--steps", 2, "--no-fuse")
    process = start("train", "dcgan", "--resume", "--steps", 4, "--device", "cpu", full_at=100_000)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    kept = "the last good checkpoint: runs/dcgan/checkpoint.pt (step 2)"
    assert error == f"fastgan: cannot write runs/dcgan/checkpoint.pt (File too large); {kept}\n"
    assert dcgan("--resume", "--steps", 4).exit_code == 0
    assert checkpoint.load(Path("runs/dcgan/checkpoint.pt"))["step"] == 4


def test_a_disk_that_is_full_already_is_noticed_before_the_earlier_run_is_moved(start):
    dcgan(*TINY, "--steps", 1, "--no-fuse")
    process = start("train", "dcgan", *TINY, "--steps", 1, "--no-fuse", full_at=1000)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error == "fastgan: --out: cannot write to runs/dcgan (File too large)\n"
    assert not Path("runs/dcgan/previous-1").exists()


def test_generate_names_a_disk_that_fills(start):
    dcgan(*TINY, "--steps", 1, "--no-fuse")
    process = start("generate", "runs/dcgan", "--num", 10_000, full_at=70_000)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error == "fastgan: cannot write runs/dcgan/generated/samples.png (File too large)\n"


def test_a_hub_set_that_cannot_be_reached_is_named(tmp_path, start):
    process = start("train", "dcgan", "--data", "hf:nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert error.startswith("fastgan: --data: cannot load hf:nobody/nothing (") and error.count("\n") == 1, error
    assert not Path("runs").exists()


def test_sigterm_outside_the_loop_still_cleans_up(monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "save_grid", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = dcgan(*TINY, "--dry-run", "--no-fuse")
    assert (result.exit_code, result.stderr) == (143, "fastgan: terminated\n")
    assert os.listdir() == []
    assert signal.getsignal(signal.SIGTERM) is handler


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_run_resumes_with_each_step_once_in_its_curves(start):
    process = start("train", "dcgan", *TINY, "--steps", 100_000, "--no-fuse", "--checkpoint-every", 25)
    curves, saved = Path("runs/dcgan/curves.csv"), Path("runs/dcgan/checkpoint.pt")
    wait_for(process, lambda: saved.exists() and curves.read_text().count("\n") > 40)
    process.kill()
    process.communicate(timeout=60)
    step = checkpoint.load(saved)["step"]
    assert dcgan("--resume", "--steps", step + 3, "--device", "cpu").exit_code == 0
    steps = [int(row.partition(",")[0]) for row in curves.read_text().splitlines()[1:]]
    assert steps == list(range(1, step + 4))
    events = EventAccumulator("runs/dcgan/tensorboard").Reload()
    shown = [event.step for event in events.Scalars("loss_g")]
    assert shown == sorted(set(shown)) and {10, 20, step, step + 3} <= set(shown) and shown[-1] == step + 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_says_so_in_one_line(number, status, start):
    process = start("train", "dcgan", *TINY, "--steps", 100_000, "--no-fuse")
    curves = Path("runs/dcgan/curves.csv")
    wait_for(process, lambda: curves.exists() and curves.stat().st_size)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    step = checkpoint.load(Path("runs/dcgan/checkpoint.pt"))["step"]
    assert process.returncode == status
    assert error == f"fastgan: stopped after step {step}; --resume continues runs/dcgan/checkpoint.pt\n"
    assert int(curves.read_text().splitlines()[-1].partition(",")[0]) == step
