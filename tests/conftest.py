"""Tiny teachers and shards, made here; the scripts under test, loaded by path."""

import importlib.util
import inspect
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from pathlib import Path

for _package in ("xformers", "bitsandbytes"):
    logging.getLogger(_package).setLevel(logging.ERROR)  # on import they warn of kernels not used here
# Read on import. Nothing may ask the Hub (test_hub.py has its own): a network that swallows packets would hold the
# tests up for minutes.
os.environ["HF_HUB_OFFLINE"] = os.environ.get("LCM_TESTS_OFFLINE", "1")

import numpy as np
import psutil
import pytest
import torch
import tqdm.auto
import webdataset as wds
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

# A child's first call renews torch's thread pool; two of its threads at once (transformers loads weights in several)
# can find none: "Invalid thread pool!". So each child makes this call before it has threads.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py"]
FAMILIES = ["sd15", "sdxl"]  # as the tests are named
# For whole runs of what both families share and nothing of the model touches; all other tests run on both.
one_family = pytest.mark.parametrize("script", SCRIPTS[:1], ids=FAMILIES[:1], indirect=True)
DEADLINE_S = 600  # for a run that hangs; a busy machine can take minutes for one of seconds
SIDE = 32  # px of the test pictures; latents are half of it
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
sys.path.insert(0, str(ROOT / "scripts" / "demo"))
torch.set_num_threads(1)


def load_script(path):
    """Return a script as a module, loaded by path as a user's copy would be."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def cases(names, values, ids=None):
    """Like pytest.mark.parametrize, as one item: each case is a subtest with a folder and patches of its own."""
    names, values = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)], list(values)
    labels = [ids(value) for value in values] if callable(ids) else list(ids or range(len(values)))

    def decorate(test):
        fixtures = [name for name in inspect.signature(test).parameters if name not in names]

        def run_cases(subtests, **given):
            for number, (label, value) in enumerate(zip(labels, values, strict=True)):
                if hasattr(value, "marks"):  # a pytest.param
                    label, value = value.id or label, value.values
                elif len(names) == 1:
                    value = (value,)
                with subtests.test(str(label)), pytest.MonkeyPatch.context() as patch:
                    own = {"monkeypatch": patch}
                    if "tmp_path" in given:
                        own["tmp_path"] = given["tmp_path"] / str(number)
                        own["tmp_path"].mkdir()
                    own = {name: each for name, each in own.items() if name in given}
                    test(**given | own | dict(zip(names, value, strict=True)))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        run_cases.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in ["subtests", *fixtures]])
        run_cases.__name__, run_cases.__doc__, run_cases.__module__ = test.__name__, test.__doc__, test.__module__
        return run_cases

    return decorate


@pytest.fixture(scope="session")
def trainer():
    return load_script(SCRIPTS[0])


@pytest.fixture(scope="module", params=SCRIPTS, ids=FAMILIES)
def script(request):
    """Each training script in turn, as a module."""
    return load_script(request.param)


def tiny_text(tokenizer, kind=CLIPTextModel, width=16, layers=1, **changes):
    """Return a random CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **changes,
    )  # fmt: skip
    return kind(config)


def tiny_unet(**changes):
    """Return a random UNet that has every module a LoRA targets."""
    config = {
        "sample_size": SIDE // 2, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes)


def tiny_vae(**changes):
    """Return a random VAE that halves each side."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=SIDE,
        scaling_factor=0.5, **changes,
    )  # fmt: skip


def build_teacher(folder, prediction_type="epsilon", **schedule):
    """Write a random StableDiffusionPipeline that has every module a LoRA targets."""
    from architectures import demo_tokenizer

    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    scheduler = DDIMScheduler(
        **NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type, **schedule
    )
    pipe = StableDiffusionPipeline(
        text_encoder=tiny_text(tokenizer), unet=tiny_unet(), vae=tiny_vae(), tokenizer=tokenizer,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def build_teacher_xl(
    folder, prediction_type="epsilon", force_zeros=True, unet_changes=None, vae_changes=None, **schedule
):
    """Write a random StableDiffusionXLPipeline: two text encoders of unlike widths, size and crop told."""
    from architectures import demo_tokenizer

    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    unet = {
        "cross_attention_dim": 16 + 24, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        text_encoder=tiny_text(tokenizer, layers=2),
        text_encoder_2=tiny_text(tokenizer, CLIPTextModelWithProjection, 24, 2, projection_dim=12),
        unet=tiny_unet(**unet | (unet_changes or {})), vae=tiny_vae(**vae_changes or {}),
        tokenizer=tokenizer, tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(
            **NOISE, timestep_spacing="leading", prediction_type=prediction_type, **schedule
        ),
        force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


BUILDERS = {"train_lcm_lora_sd15": build_teacher, "train_lcm_lora_sdxl": build_teacher_xl}


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Return the folders of each script's tiny teacher, by the script's name."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: build(folder / name) for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def teacher(script, teachers):
    """Return the folder of a tiny teacher of the script's family."""
    return teachers[script.__name__]


def picture_bytes(index, side=SIDE, suffix="PNG"):
    """Return an encoded picture of smooth noise, a function of its index."""
    coarse = np.random.default_rng(index).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(data, suffix)
    return data.getvalue()


def write_shard(path, samples):
    """Write samples, dicts of suffix -> bytes, str or json record, as one tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            encoded = {
                name: json.dumps(value).encode() if isinstance(value, dict) else
                value.encode() if isinstance(value, str) else value
                for name, value in sample.items()
            }  # fmt: skip
            writer.write({"__key__": f"{path.stem}-{number:05d}", **encoded})
    return path


def write_tar(path, files, **options):
    """Write (name, bytes) pairs as one tar, in their order, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder, num_shards=2, samples_per_shard=12, side=SIDE):
    """Write numbered shards whose captions are the samples' numbers, and return their paths."""
    return [
        write_shard(
            folder / f"{shard:05d}.tar",
            [
                {"png": picture_bytes(i, side), "txt": f"sea {i}", "json": {"width": side, "height": side}}
                for i in range(shard * samples_per_shard, (shard + 1) * samples_per_shard)
            ],
        )
        for shard in range(num_shards)
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return str(folder)


def flags(teacher, shards, output_dir, **changes):
    """Return the trainer's command line for a small run; True is a bare flag, None leaves a flag out."""
    values = {
        "pretrained_teacher_model": teacher, "train_shards_path_or_url": shards, "output_dir": output_dir,
        "resolution": SIDE, "train_batch_size": 2, "max_train_steps": 4, "lora_rank": 4, "lora_alpha": 8,
        "report_to": "none", "validation_steps": -1, "checkpointing_steps": 2, "logging_steps": 1,
        "validation_prompts": "sea at dawn", "mixed_precision": "no", "learning_rate": 1e-3,
    } | changes  # fmt: skip
    line = []
    for name, value in values.items():
        if value is None:
            continue
        line += [f"--{name}"] + (
            [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
        )
    return line


ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


class Windows:
    """The module `os` as a script sees it on Windows, as far as its names tell."""

    name, sep = "nt", "\\"

    def __getattr__(self, name):
        return getattr(os, name)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(arguments, script=SCRIPTS[0], processes=1, timeout=240, **kwargs):
    """Run a script as a user would and return the finished process, its output as text."""
    launcher = [sys.executable]
    if processes > 1:  # not port 0: torch hands it to the workers as it is
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT | kwargs.pop("env", {}), **kwargs,
    )  # fmt: skip


def read_log(output_dir):
    """Return the lines of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


class Run:
    """A script's run in forked processes: as its own command, without the seconds that imports take."""

    def __init__(self, script, arguments, said, processes=1, hook=None):
        """Start it; `said` is the file for its output, `hook` is called with the script in each process."""
        self.said = said
        self.pids = []
        port = free_port()
        for rank in range(processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            environment = ENVIRONMENT | {name: str(value) for name, value in world.items() if processes > 1}
            self.pids.append(os.fork())
            if not self.pids[-1]:
                self.become(script, [*map(str, arguments)], environment, hook)

    def become(self, script, arguments, environment, hook):
        """Run the script in this process and leave with its exit code."""
        code = 1
        try:
            os.setsid()
            os.environ.update(environment)
            os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(2, 1)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            for state in (AcceleratorState, GradientState, PartialState):
                state._shared_state.clear()
            for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):  # the lock of all forks may be held by one that was killed
                kind.set_lock(threading.RLock())
            if hook:
                hook(script)
            code = script.run(script.parse_args(arguments))
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number):
        """Send a signal to the first process and everything it started, as a scheduler does."""
        os.killpg(self.pids[0], number)

    def wait(self):
        """Return the exit code of each process, that of a signal negative."""
        codes, ends = {}, time.monotonic() + DEADLINE_S
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > ends:
                    os.killpg(pid, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[pid] for pid in self.pids]

    def lines(self):
        """Return what it said, but for the progress bar, which has to be on lines of its own."""
        lines = re.split(r"[\r\n]+", self.said.read_text())
        return [line for line in lines if line and not line.startswith("distilling")]


def finish(script, arguments, said, expected=0, **kwargs):
    """Run a script to its end and return the lines that it said."""
    run = Run(script, arguments, said, **kwargs)
    codes = run.wait()
    assert set(codes) == {expected}, (codes, run.said.read_text()[-3000:])
    return run.lines()


def at_call(name, when, act):
    """Return a hook that acts at the n-th call of one of the script's functions, or where when(*args)."""

    def hook(script):
        function = getattr(script, name)
        calls = []

        def acting(*args, **kwargs):
            calls.append(1)
            if len(calls) == when if isinstance(when, int) else when(*args):
                act()
            return function(*args, **kwargs)

        setattr(script, name, acting)

    return hook


def send(number):
    return lambda: os.kill(os.getpid(), number)


def pytest_collection_modifyitems(items):
    """Begin with the slow files, so that the two processes end together."""
    slow = "launch checkpoint cache evaluate hub cluster export drawing benchmark sdxl files".split()
    rank = {f"test_{name}": number for number, name in enumerate(slow)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(slow)))


def pytest_sessionfinish(session):
    """Leave no process behind: one that a failed test forked would keep pytest from ending."""
    if session.config.getoption("numprocesses", None):  # the children are the workers, each clears up its own
        return
    for child in psutil.Process().children(recursive=True):
        child.kill()
