"""DataTables, which sorts and pages the table of all trials, from the bundle that itables ships."""

from importlib.util import find_spec
from pathlib import Path


def datatables_js() -> str:
    """An ES module that exports jQuery with DataTables in it."""
    return _read("dt_bundle.js")


def datatables_css() -> str:
    return _read("dt_bundle.css")


def _read(name: str) -> str:
    # Not imported, which would bring IPython where that is installed.
    spec = find_spec("itables")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "html", name).read_text(encoding="utf-8")
