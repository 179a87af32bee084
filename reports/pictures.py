"""The report's figures, by name and as PNG files for a paper."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from harness.errors import HarnessError
from harness.store import RunStore
from reports.frames import trials_frame
from reports.sections import sections_of

WIDTH_PX, HEIGHT_PX = 900, 470
# Pixels of the file for each of the figure's, so that text stays sharp in print.
SCALE = 2


def report_figures(store: RunStore) -> dict[str, go.Figure]:
    """The figures of the run's report, in its order, by the anchor that each has there; those without data left out."""
    sections = sections_of(store, trials_frame(store))
    views = [view for section in sections for view in section.views]
    return {view.anchor: view.figure for view in views if view.figure is not None}


def find_browser() -> str:
    """The browser that pictures are drawn with. Raises HarnessError where it or kaleido is missing."""
    if importlib.util.find_spec("kaleido") is None:
        raise HarnessError(
            "PNG files: kaleido, which draws them, is not installed. Install it with: pip install 'revnet-harness[png]'"
        )
    from choreographer.browsers.chromium import (  # pyright: ignore[reportMissingImports]
        Chromium,
        chromium_based_browsers,
    )

    browser: str | None = Chromium.find_browser(skip_local=False)
    if browser and Path(browser).is_file():
        return browser
    if browser:
        raise HarnessError(f"PNG files: BROWSER_PATH is {browser}, which is no file. Correct it, or unset it.")
    names = [name for kind in chromium_based_browsers.values() for name in kind.exe_names if name == name.lower()]
    raise HarnessError(
        f"PNG files: there is no browser, and kaleido draws with one; looked for {', '.join(names)}. Install one of "
        "them, or let `kaleido_get_chrome` download one, or set BROWSER_PATH to where one lies."
    )


def write_pictures(drawn: Mapping[str, go.Figure], directory: Path, browser: str) -> list[Path]:
    """Write DIRECTORY/NAME.png of each figure, over what is there. Returns the paths.

    Raises HarnessError for a directory that cannot be written and a browser that does not draw.
    """
    import kaleido  # pyright: ignore[reportMissingImports]
    from kaleido.errors import BrowserClosedError, BrowserFailedError, JavascriptError, KaleidoError  # pyright: ignore

    paths = {name: directory / f"{name}.png" for name in drawn}
    wanted = [
        {
            "fig": figure,
            "path": paths[name],
            "opts": {
                "format": "png",
                "width": WIDTH_PX,
                "height": figure.layout["height"] or HEIGHT_PX,
                "scale": SCALE,
            },
        }
        for name, figure in drawn.items()
    ]
    if not wanted:
        return []
    # No figure has a formula, and MathJax would be fetched from the network.
    options = {"path": browser, "mathjax": False}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        kaleido.write_fig_from_object_sync(wanted, kopts=options, cancel_on_error=True)
    except (BrowserClosedError, BrowserFailedError, JavascriptError, KaleidoError, TimeoutError) as error:
        reason = (str(next(iter(error.args), "")) or type(error).__name__).splitlines()[0].rstrip(".")
        raise HarnessError(
            f"{browser}: did not draw the figures: {reason}. Set BROWSER_PATH to another browser."
        ) from None
    except OSError as error:
        raise HarnessError(f"{directory}: cannot be written ({error.strerror or error}). Give another one.") from None
    return list(paths.values())
