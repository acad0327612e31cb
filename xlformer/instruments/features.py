"""The error of FAVOR+ against exact softmax attention.

The ratio of the squared errors of trigonometric and positive features over angle and
length, by formula and by drawing xlformer's own features; orthogonal and independent
rows; and how the error of attention falls with the number of features.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from xlformer.errors import Argument, UserError
from xlformer.instruments import estimators, features_picture
from xlformer.instruments.estimators import FORMULAS, MAPS, POSITIVE, Rows
from xlformer.instruments.instrument import Request, Result, Table
from xlformer.instruments.length import slope
from xlformer.layers.favor import REGULARISED

RUNS, SEEDS = False, {}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of what is drawn.

    Attributes:
      maps: of the features.
      draws: of the kernel's estimates, with as many rows as vectors are wide.
      length: of the attention, whose width is the same.
      counts: of its features' rows.
      attention_draws: of each of them.
      scales: of its queries and keys.
    """

    maps: tuple[str, ...]
    draws: int
    length: int
    counts: tuple[int, ...]
    attention_draws: int
    scales: tuple[float, ...]


SIZES = {
    "small": Sizes(
        MAPS, 20_000, 512, (16, 32, 64, 128, 256, 512, 1024), 15, (0.25, 0.5, 1.0)
    ),
    "tiny": Sizes(MAPS[:2], 200, 32, (8, 16, 32), 5, (0.25, 1.0)),
}
# The paper's: attention of width 16.
WIDTH = 16
ANGLES = np.pi * np.arange(1, 12) / 12  # at 0 and at pi one of two does not err
LENGTHS = features_picture.LENGTHS
SLICE = features_picture.SLICE
MOST = {"draws": 10_000_000, "width": 1024}
TRUSTED = 0.2  # relative standard error of what is shown as sampled


def add_flags(parser) -> None:
    parser.add_argument("--draws", type=int, help="of the kernel's estimates")
    parser.add_argument(
        "--width", type=int, default=WIDTH, help="of the vectors, and rows of a draw"
    )


def measure(request: Request) -> Result:
    request = request.with_flags(add_flags)
    sizes, width = SIZES[request.size], request.args.width
    draws = sizes.draws if request.args.draws is None else request.args.draws
    for name, value in (("draws", draws), ("width", width)):
        if not 2 <= value <= MOST[name]:
            line = f" must be at least 2 and at most {MOST[name]:,}"
            raise UserError(Argument(name, value), line)
    kernel = _kernel(sizes.maps, width, draws)
    attention = _attention(sizes, width)
    facts = {
        "width": width,
        "m": width,
        "draws": draws,
        "lengths_where_positive_is_better": {
            str(n): estimators.least_angle(n) for n in LENGTHS
        },
        "kernel": kernel,
        "attention": {**dataclasses.asdict(sizes), "errors": attention},
    }
    tables = [_slice_table(kernel, width), _attention_table(attention, sizes)]
    return Result(
        tables,
        facts,
        lambda figure: features_picture.draw(figure, facts),
        _notes(facts),
    )


# What is measured ---------------------------------------------------------------------


def _kernel(maps, width: int, draws: int) -> list[dict]:
    """Formula and draws of each map, kind of rows, length and angle."""
    angle_P, length_P = (x.ravel() for x in np.meshgrid(ANGLES, LENGTHS))
    found = []
    for name in maps:
        for orthogonal in (False, True):
            rows = Rows(name, orthogonal, width, width)
            drawn = estimators.sampled(rows, angle_P, length_P, draws)
            for i, pair in enumerate(zip(angle_P, length_P, strict=True)):
                one = {
                    "features": name,
                    "rows": _rows_name(orthogonal),
                    "angle": float(pair[0]),
                    "length": float(pair[1]),
                    "kernel": float(estimators.kernel(*pair)),
                    **{key: float(x[i]) for key, x in drawn.items()},
                }
                if name in FORMULAS and not orthogonal:
                    one["formula"] = float(estimators.squared_error(name, *pair, width))
                if name == POSITIVE and orthogonal:
                    one["bound"] = float(
                        estimators.orthogonal_bound(*pair, width, width)
                    )
                spread = estimators.spread(name, *pair, width, draws)
                found.append({**one, "trusted": bool(spread < TRUSTED)})
    return found


def _attention(sizes: Sizes, width: int) -> list[dict]:
    """The error of attention with each map and kind of rows, at each scale."""
    found = []
    for scale in sizes.scales:
        for name in sizes.maps:
            for orthogonal in (False, True):
                rows = Rows(name, orthogonal, max(sizes.counts), width)
                errors_NC = estimators.attention_errors(
                    rows, scale, sizes.length, sizes.counts, sizes.attention_draws
                )
                mean_C = errors_NC.mean(0)
                found.append(
                    {
                        "scale": scale,
                        "features": name,
                        "rows": _rows_name(orthogonal),
                        "rms_error": mean_C.tolist(),
                        "standard_deviation": errors_NC.std(0, ddof=1).tolist(),
                        # -1/2 is the law of 1/sqrt(m).
                        "slope": slope(sizes.counts, mean_C),
                    }
                )
    return found


def _rows_name(orthogonal: bool) -> str:
    return "orthogonal" if orthogonal else "iid"


# What is shown ------------------------------------------------------------------------


def _slice_table(kernel: list[dict], width: int) -> Table:
    lines = []
    for one in kernel:
        if one["length"] != SLICE or round(one["angle"] / np.pi * 12) % 3:
            continue
        law = one.get("formula", one.get("bound"))
        lines.append(
            (
                one["features"],
                one["rows"],
                f"{one['angle'] / np.pi:.2f} pi",
                one["kernel"],
                one["mean"],
                law,
                one["squared_error"],
                one["squared_error_se"],
            )
        )
    columns = ("", "rows", "angle", "exp(x.y)", "mean estimate")
    columns += ("formula", "mean square", "its s.e.")
    title = f"squared error of the kernel, |x| = |y| = {SLICE:g}, m = K = {width}"
    return Table(title, columns, lines, left=3)


def _attention_table(attention: list[dict], sizes: Sizes) -> Table:
    lines = [
        (one["features"], one["rows"], one["scale"], *one["rms_error"], one["slope"])
        for one in attention
    ]
    columns = ("", "rows", "norms", *(f"m={m}" for m in sizes.counts), "slope")
    return Table("RMS error of causal attention", columns, lines, left=2)


def _notes(facts: dict) -> list[str]:
    angle = facts["lengths_where_positive_is_better"][str(SLICE)]
    m = facts["m"]
    notes = [
        f"by formula positive features err less than trigonometric ones, at length "
        f"{SLICE:g}, from an angle of {angle / np.pi:.3f} pi on",
        "trigonometric and hyperbolic features are two for each of the m rows",
        "for orthogonal rows of positive features the formula is the paper's bound; "
        f"{REGULARISED} rows estimate a kernel that is less",
        "norms: queries and keys are that times N(0, I) / K^(1/4)",
    ]
    hidden = sum(not one["trusted"] for one in facts["kernel"])
    if hidden:
        notes.append(
            f"{hidden} of {len(facts['kernel'])} sampled errors are not in the "
            f"picture: {facts['draws']} draws of {m} rows know them to {TRUSTED:.0%} "
            "at best, as exp(w.x) is log-normal; they come out too small"
        )
    return notes
