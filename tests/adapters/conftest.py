"""The configuration of the method that a test is parametrised with."""

import pytest

from tests.adapters.minimal import make_config


@pytest.fixture
def config(case, tiny_llava, tmp_path):
    """The method's smallest configuration."""
    return make_config(case, tmp_path / "files", tiny_llava)
