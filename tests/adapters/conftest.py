"""The configuration of the method that a test is parametrised with."""

import pytest

from tests.adapters.minimal import make_config, sorting_pays


@pytest.fixture
def config(case, tiny_llava, tmp_path):
    """The method's smallest configuration."""
    with sorting_pays():
        yield make_config(case, tmp_path / "files", tiny_llava)
