"""Messages about missing packages name the command that installs them here."""

from __future__ import annotations

import pytest

from satchel.runtime.util import requirements

LISTED = [
    "numpy>=1.26",
    'torch<3,>=2.13; extra == "export"',
    'onnx-ir>=1.0; extra == "export"',
    'matplotlib; extra == "plot"',
    'pytest>=8; extra == "dev"',
]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A satchel that asks for these packages, none of which is installed but numpy."""

    def version(name: str) -> str:
        if name != "numpy":
            raise requirements.metadata.PackageNotFoundError(name)
        return "2.0"

    monkeypatch.setattr(requirements.metadata, "requires", lambda name: LISTED)
    monkeypatch.setattr(requirements.metadata, "version", version)
    requirements.requirements.cache_clear()
    yield
    requirements.requirements.cache_clear()


def test_a_missing_module_is_named_with_all_that_its_extra_lacks(listed: None) -> None:
    expected = "onnx_ir is not installed: pip install 'onnx-ir>=1.0' 'torch<3,>=2.13'"
    assert requirements.not_installed("onnx_ir.passes") == expected
    assert requirements.not_installed("numpy") == "numpy is not installed: pip install 'numpy>=1.26'"
    for module in ("pytest", "no_such_module"):  # no user is asked to install it
        assert requirements.not_installed(module) is None


def test_the_extras_are_those_of_the_installed_satchel() -> None:
    found = {each.extra for each in requirements.requirements()}
    assert {None, *requirements.EXTRAS} <= found
