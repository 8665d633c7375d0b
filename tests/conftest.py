"""What every test shares: no network, one thread, a fixed seed, and the real models and images if they are there."""

import os
from pathlib import Path

# Before any Hugging Face import: a test that reaches for the Hub must fail in seconds, not wait for retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread per worker: two xdist workers with two OpenMP threads each are slower than either alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the source tree, where recipes/ and model_cards/ live."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real checkpoints and images, which are not ours to ship; the test is skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} does not exist: the real models and images are no part of the project")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's global generator before every test, so that no test depends on which ran before it."""
    torch.manual_seed(0)
    return 0
