"""Shared fixtures: the Hub is out of reach, and the real data sets are optional."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported

import pytest
from hub_server import HubServer
from stage_processes import forget_processes

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $BITRANS_SHARED/data, or ../shared/data beside the repository."""
    shared = Path(os.environ.get("BITRANS_SHARED", REPOSITORY.parent / "shared"))
    if not (shared / "data").is_dir():
        pytest.skip(f"no real data at {shared / 'data'}; set BITRANS_SHARED to the folder that holds data/")
    return shared / "data"


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Stages of one test share a process group, as in run_all; tests do not."""
    yield
    forget_processes()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub on 127.0.0.1; its clients are processes with `env={**os.environ, **hub.env}`."""
    server = HubServer(tmp_path / "hf_home")
    yield server
    server.stop()
