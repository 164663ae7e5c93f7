"""How tests run the TPU kernels on a CPU."""

from collections.abc import Iterator

import pytest
from jaxdistill.kernels import on_tpu


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels run on the CPU; by default in the interpreter that knows nothing of memory."""
    token = on_tpu.INTERPRET.set(getattr(request, "param", True))
    yield
    on_tpu.INTERPRET.reset(token)


@pytest.fixture
def no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The simulation of a TPU's memories says when two of its threads raced for one."""
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
