"""What every test shares: how hypothesis runs, and where the shared data sets are."""

from __future__ import annotations

import os
from pathlib import Path

# One thread a process, before numpy is imported: small matrices on several threads of a busy machine mostly wait.
for _library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import pytest  # noqa: E402 - numpy reads the variables above when it is imported
from hypothesis import HealthCheck, settings  # noqa: E402

# No deadline and no complaint about slow generation: a busy machine must not fail a law. In CI the examples are the
# same on each run, so that a red build is about the change; elsewhere they are new, so that the search goes on.
settings.register_profile(
    "walras",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("walras")

NO_DATA = "WALRAS_DATA is not set: it names the folder of the shared data sets"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `data` are skipped, with the reason, where nobody says where the data is."""
    if os.environ.get("WALRAS_DATA"):
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=NO_DATA))


class DataDir:
    """The folder of shared data sets. `data_dir / "routing/x.parquet"` is that file; a missing one fails the test.

    Saying where the data is and not having it is a mistake, not a reason to skip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        file = self.path / name
        if not file.exists():
            pytest.fail(f"WALRAS_DATA is {self.path}, but {name} is not in it")
        return file


@pytest.fixture(scope="session")
def data_dir() -> DataDir:
    named = os.environ.get("WALRAS_DATA")
    if not named:
        pytest.skip(NO_DATA)
    path = Path(named)
    if not path.is_dir():
        pytest.fail(f"WALRAS_DATA is {path}, which is not a folder")
    return DataDir(path)
