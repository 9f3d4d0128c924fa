"""What several test files need made once."""

import pytest

from tests.runs import finish


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A checkpoint of pretraining, with a decoder."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    finish(folder, "--epochs", "1")
    return folder / "checkpoints" / "last.pth"
