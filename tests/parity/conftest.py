import pytest


@pytest.fixture
def folder(tmp_path):
    """Where states on nvme are."""
    (tmp_path / "nvme").mkdir()
    return str(tmp_path / "nvme")
