"""Other people's reference code, installed by `make peers`: where it is and what it needs.

mamba-ssm's package asks for its compiled CUDA module on import, and is built without it here. Its
`*_ref` functions are plain torch and never call into it: an empty module satisfies the import.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

#: Where `make peers` installs; nothing else looks there.
sys.path.append(str(Path(sys.prefix) / "peers"))
PACKAGES = {"mamba_ssm": "mamba-ssm", "fla": "fla-core"}
COMPILED = "selective_scan_cuda"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse the run, once, when a test of these is about to run without the packages."""
    here = Path(__file__).parent
    absent = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if absent and any(here in item.path.parents for item in session.items):
        raise pytest.UsageError(
            f"tests/peers compares with {' and '.join(absent)}, not installed here: "
            'run `make peers`, or leave these tests out with -m "not peers"'
        )


@pytest.fixture(scope="session", autouse=True)
def empty_compiled_module() -> Iterator[None]:
    """Stand in for mamba-ssm's compiled module until the session ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, COMPILED, ModuleType(COMPILED))
        yield
