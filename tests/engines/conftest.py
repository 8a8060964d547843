import pytest
from running import Project
from runs import planned


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The plan of `runs.planned`, done by engine local."""
    project = planned(tmp_path_factory.mktemp("engines") / "undisturbed")
    project.pnp("run")
    return project
