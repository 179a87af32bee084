"""What the records say of rebuilt activations, in sentences: drift, gradient angle, and what guards found."""

from collections.abc import Iterator

import pandas as pd

from reports.largest import amount, at_most, largest
from reports.pairs import answer_first

DRIFT, ANGLE, FLOOR = "drift_max_rel", "gradient_angle_deg", "stored_reference_angle_deg"
EXACT = "0: every rebuilt input equals the original bit for bit"


def drift_sentences(frame: pd.DataFrame) -> list[str]:
    """The largest drift and gradient angle of reconstructed activations, by strategy, beside the floor."""
    sentences = []
    for name, reconstruction, rows in _rebuilt(frame):
        drift = largest(rows, DRIFT)
        if not drift.of:
            continue
        sentence = f"{name}: the relative drift is {at_most(drift, zero=EXACT)}"
        angle = largest(rows, ANGLE)
        if angle.of:
            sentence += f"; {_angle(rows, at_most(angle, ' degrees'), reconstruction)}"
        sentences.append(sentence + ".")
    return sentences


def error_sentences(frame: pd.DataFrame, traces: pd.DataFrame) -> list[str]:
    """The largest error of a rebuilt input, by strategy, and in which block of which network it is."""
    sentences = []
    for name, _, rows in _rebuilt(frame):
        drift = largest(rows, DRIFT)
        if not drift.of:
            continue
        where = "" if drift.row is None else _block(rows.loc[[drift.row]].iloc[0], traces)
        sentences.append(f"{name}: the relative error of a rebuilt input is {at_most(drift, zero=EXACT, where=where)}.")
    return sentences


def angle_sentences(frame: pd.DataFrame) -> list[str]:
    """The largest gradient angle of each strategy that does not store, those that rebuild first, and at which depth it
    is; beside it how far the stored gradient is from float64."""
    if not len(frame):
        return []
    sentences = []
    rows = frame[(frame["status"] == "ok") & (frame["activations"] != "stored")].dropna(subset=["depth"])
    for strategy, own in answer_first(rows).groupby("strategy", sort=False):
        angle = largest(own, ANGLE)
        if not angle.of:
            continue
        where = "" if angle.row is None else f"depth {own.loc[angle.row, 'depth']:.0f}"
        exact = "exact" if "reconstruction" in own and (own["reconstruction"] == "exact").all() else ""
        sentences.append(f"{strategy}: {_angle(own, at_most(angle, ' degrees', where=where), exact)}.")
    return sentences


def guard_sentences(frame: pd.DataFrame) -> list[str]:
    """What guards compared in training, by strategy, and what followed; none where no guard compared anything."""
    if "guard_checks" not in frame:
        return []
    sentences = []
    for strategy, rows in frame[frame["guard_checks"] > 0].groupby("strategy", sort=False):
        checks = int(rows["guard_checks"].sum())
        compared = "1 rebuilt input" if checks == 1 else f"{checks} rebuilt inputs"
        # A guard that compared and has no largest error found one that is not finite.
        finite = rows["guard_rel_max"].dropna() if "guard_rel_max" in rows else pd.Series(dtype=float)
        lost = len(rows) - len(finite)
        parts = [f"a relative error of at most {amount(finite.max())}"] if len(finite) else []
        if lost:
            of = f" in {lost} of {len(rows)} trials" if len(rows) > 1 else ""
            parts.append(f"an error that is not finite{of}")
        sentence = f"{strategy}: in training a guard compared {compared} and found {' and '.join(parts)}"
        if stopped := int((rows["status"] == "diverged").sum()):
            sentence += f"; {stopped} of {len(rows)} trials diverged"
        stored = rows.get("guard_stored_step", pd.Series(dtype=float)).dropna()
        if len(stored):
            sentence += f"; {len(stored)} of {len(rows)} trials stored activations after step {stored.min():.0f}"
        sentences.append(sentence + ".")
    return sentences


def _rebuilt(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Name, reconstruction and rows of each strategy that rebuilds."""
    if not len(frame):
        return
    rebuilt = frame[(frame["status"] == "ok") & (frame["activations"] == "reconstructed")]
    keys = ["strategy", "compute", "reconstruction"]
    for (strategy, compute, reconstruction), rows in rebuilt.groupby(keys, sort=False):
        yield f"{strategy} (compute {compute}, reconstruction {reconstruction})", str(reconstruction), rows


def _angle(rows: pd.DataFrame, angle: str, reconstruction: str) -> str:
    floor = at_most(largest(rows, FLOOR), " degrees")
    grid = ", rounding to the grid included" if reconstruction == "exact" else ""
    return f"the gradient's angle to the stored one is {angle}" + (
        f", that one's to float64 {floor}{grid}" * bool(floor)
    )


def _block(trial: pd.Series, traces: pd.DataFrame) -> str:
    """`depth 26, block 0 of 6, counted from 0`, as far as that is known."""
    known = [] if pd.isna(trial["depth"]) else [f"depth {trial['depth']:.0f}"]
    errors = traces[(traces["id"] == trial["id"]) & (traces["name"] == "rel")] if len(traces) else traces
    values = errors["value"].astype(float).dropna() if len(errors) else []
    if len(values):
        index = errors.set_index("index")["value"].astype(float).idxmax()
        known.append(f"block {index} of {errors['index'].nunique()}, counted from 0")
    return ", ".join(known)
