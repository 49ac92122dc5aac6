"""What all tests share: the root on the path, one thread, small twins of the released models."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

arrow = tempfile.TemporaryDirectory()  # where `datasets` keeps what it makes of Parquet
os.environ["HF_DATASETS_CACHE"] = arrow.name

import make_twins  # noqa: E402  (needs the path above)

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return make_twins.tiny_tokenizer()


def twin(make):
    """A fixture of the session: the folder that `make(folder)` fills, never written to again."""

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory):
        path = tmp_path_factory.mktemp(make.__name__)
        make(path)
        return path

    return folder


sensevoice_folder = twin(make_twins.sensevoice_folder)
official_folder = twin(make_twins.official_folder)
whisper_folder = twin(make_twins.whisper_folder)
parakeet_folder = twin(make_twins.parakeet_folder)
qwen3_folder = twin(make_twins.qwen3_folder)
