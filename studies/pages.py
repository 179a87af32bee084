"""What a report of thousands of trials weighs and costs: built, opened and filtered. `python -m studies.pages`

The records are made up: every metric of each is another number, so that nothing is easy to compress. Each step is done
ROUNDS times and its median shown; the limits are those of two cores without a GPU, where WebGL is computed too.
"""

import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from harness.record import Attempt, Record, TraceRow
from harness.store import RunStore
from harness.trials import TrialSpec

ROUNDS = 3
STRATEGIES = (("stored", "fp32"), ("checkpointed", "fp32"), ("offloaded", "fp32"), ("reconstructed", "fp32"))
STRATEGIES += (("reconstructed", "bf16"), ("reconstructed", "exact"))
BYTES_PER_BLOCK = {"stored": 300_000, "checkpointed": 50_000, "offloaded": 10_000, "reconstructed": 100}
# Figures in sight when a batch size is chosen.
LOOKED_AT = ("memory", "time", "predicted", "drift", "trials")
MEASURED = ("allocated_peak_bytes", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "flops_forward")
MEASURED += ("flops_backward", "samples_per_s", "loss_last", "step_q1_s", "step_q3_s", "drift_max_abs", "gradient_rel")
CLOCK = """
window.marks = {};
new MutationObserver(() => {
  if (!marks.first && document.querySelector(".view[data-drawn]")) marks.first = performance.now();
}).observe(document, { subtree: true, attributes: true, childList: true });
"""
CHOOSE = """async () => {
  const done = () => Number(document.documentElement.dataset.filtered ?? 0), before = done(), start = performance.now();
  document.querySelector("[data-facet=batch_size] input").click();
  while (done() === before) await new Promise((next) => setTimeout(next, 1));
  await new Promise((next) => requestAnimationFrame(() => setTimeout(next, 0)));
  return performance.now() - start;
}"""


def made_up(count: int) -> Iterator[Record]:
    """Records of as many trials; one in fifty ran out of memory."""
    draw = random.Random(0)
    cells = itertools.product(range(count), (26, 38, 50, 62, 74, 98, 110), (16, 32, 64, 128), STRATEGIES)
    for seed, depth, batch, (activations, reconstruction) in itertools.islice(cells, count):
        spec = TrialSpec.model_validate(
            {
                "model": "revnet",
                "depth": depth,
                "batch_size": batch,
                "activations": activations,
                "reconstruction": reconstruction,
                "seed": seed,
            }
        )
        blocks = (depth - 2) // 4
        peak_bytes = batch * (1_000_000 + BYTES_PER_BLOCK[activations] * blocks)
        step_s = batch * blocks * 1e-4 * draw.uniform(0.9, 1.2) * (1 if activations == "stored" else 1.4)
        metrics: dict[str, Any] = {
            "blocks": blocks,
            "activation_peak_bytes": peak_bytes,
            "predicted_activation_peak_bytes": peak_bytes + draw.randint(-5000, 5000),
            "activation_saved_bytes": peak_bytes * 9 // 10,
            "predicted_activation_saved_bytes": peak_bytes * 9 // 10,
            "step_median_s": step_s,
            "step_median_low_s": step_s * draw.uniform(0.95, 1),
            "step_median_high_s": step_s * draw.uniform(1, 1.05),
            "drift_max_rel": 10 ** draw.uniform(-7, -5),
            "gradient_angle_deg": 10 ** draw.uniform(-4, -2),
            **{name: draw.randint(10**6, 10**9) if name.endswith("bytes") else draw.random() for name in MEASURED},
        }
        status = "oom" if draw.random() < 0.02 else "ok"
        reason = None if status == "ok" else "made up: out of memory"
        last = Attempt(status=status, reason=reason, started_at="2026-01-01T00:00:00+00:00", wall_s=5, node="made-up")
        yield Record(
            id=spec.id,
            spec=spec.model_dump(mode="json"),
            status=status,
            reason=reason,
            metrics=metrics if status == "ok" else {},
            attempts=[last],
        )


def trace_of(record: Record) -> list[TraceRow]:
    rel = record.metrics.get("drift_max_rel", 0)
    is_drawn = record.spec["activations"] == "reconstructed" and record.spec["seed"] == 0
    return [TraceRow("drift", block, "rel", rel) for block in range(int(record.metrics.get("blocks", 0)) * is_drawn)]


def built(folder: Path) -> tuple[float, int]:
    """Seconds that the command takes, and bytes of the page."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "harness.cli", "report", str(folder)], check=True, capture_output=True)
    return time.perf_counter() - start, (folder / "report.html").stat().st_size


def opened(page_path: Path, browser_path: str) -> tuple[float, dict[str, float]]:
    """Seconds until the first figure stands, and until a filter is seen where the reader is."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1800})
        page.add_init_script(CLOCK)
        page.goto(page_path.resolve().as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        page.wait_for_selector(".view[data-drawn]", state="attached")
        first_s = page.evaluate("marks.first") / 1e3
        page.set_viewport_size({"width": 1280, "height": 900})
        filtered_s = {}
        for section in LOOKED_AT:
            page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
            # What comes into sight is drawn; this is not what is measured.
            page.wait_for_timeout(2000)
            filtered_s[section] = page.evaluate(CHOOSE) / 1e3
        browser.close()
    return first_s, filtered_s


def main(trials: int = 5000, browser: str = "/usr/bin/chromium") -> None:
    """Print sizes and medians beside their limits."""
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        for record in made_up(trials):
            store.write_trial(record, trace_of(record), b"")
        builds = [built(Path(folder)) for _ in range(ROUNDS)]
        looks = [opened(Path(folder, "report.html"), browser) for _ in range(ROUNDS)]
    table = Table("", "median", "limit", title=f"report of {trials:,} trials, {ROUNDS} rounds")
    table.add_row("page (MB)", f"{builds[0][1] / 1e6:.2f}", "8")
    table.add_row("built in (s)", f"{statistics.median(seconds for seconds, _ in builds):.1f}", "15")
    table.add_row("first figure drawn (s)", f"{statistics.median(first for first, _ in looks):.2f}", "3")
    for section in LOOKED_AT:
        seconds = statistics.median(filtered[section] for _, filtered in looks)
        table.add_row(f"filtered, {section} in sight (s)", f"{seconds:.2f}", "0.5")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
