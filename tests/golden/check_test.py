"""Numbers of the predecessors' own programs, and the tool that compares ours."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from golden import check
from golden.comparison import Comparison, absolute, judge

GOLDEN = pathlib.Path(__file__).parent
ATTENTION = sorted(p.stem for p in GOLDEN.glob("attn*.npz"))
TENSORFLOW = sorted(p.parent.name for p in GOLDEN.glob("tf_*/*.index"))
HUGGING_FACE = sorted(p.name for p in GOLDEN.glob("hf_*"))
NT_ASGD = GOLDEN / "nt_asgd.npz"


def agrees(name, **options):
    result = check.check(GOLDEN / name, **options)
    assert result.ok, result.problems
    return result


def test_the_golden_cases_are_all_here():
    assert len(ATTENTION) == 11 and len(HUGGING_FACE) == 2 and len(TENSORFLOW) == 5


# One of each form of attention: what the options compute is told in float64.
@pytest.mark.parametrize(
    "name",
    [
        "attn0_adaptive_div4",
        "attn0_pre_ln_same_length_clamp",
        "attn1_learned_relative",
        "attn2_sinusoid_absolute_no_memory",
        "attn3_learned_absolute_no_memory",
    ],
)
def test_transformer_xl_equals_the_original_in_float32(name):
    agrees(f"{name}.npz", float32=True)


@pytest.mark.parametrize("name", ATTENTION)
def test_transformer_xl_equals_the_original_in_float64(name):
    """The nll, the memory and the gradients, which are stored in float32."""
    found = agrees(f"{name}.npz")
    assert found.values < 1e-14 and 0 < found.gradients < 6e-8


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformer_xl_equals_hugging_faces_in_float32(name):
    assert agrees(name, float32=True).compared == 8


@pytest.mark.parametrize("name", TENSORFLOW)
def test_transformer_xl_equals_the_tensorflow_original(name):
    """Attended zeros, mem_len + 1 keys, its epsilon, projections of every kind."""
    found = agrees(name)
    assert found.compared >= 7 and found.values < 1e-13


def test_transformer_xl_equals_the_tensorflow_original_in_float32():
    agrees("tf_unprojected_bin", float32=True)


def test_nt_asgd_equals_torchs():
    """Iterates, averages and rates of both cases, and the evaluation that switches."""
    assert agrees("nt_asgd.npz").compared == 12
    agrees("nt_asgd.npz", float32=True)


@pytest.mark.parametrize("name", ["lamb_min_trust.npz", "lamb_no_floor.npz"])
def test_sha_rnns_lamb_equals_its_authors(name):
    assert agrees(name).compared == 30


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("performer_formulas", 31),
        ("performer_google", 51),
        ("performer_google_renormaliser", 12),
        ("performer_lucidrains", 19),
    ],
)
def test_performers_attention_equals_both_programs_and_the_formulas(name, arrays):
    found = agrees(f"{name}.npz")
    assert found.compared == arrays and max(found.values, found.gradients) < 1e-12


# The tool -----------------------------------------------------------------------------


def changed(target, change, source=NT_ASGD):
    """A copy of a file in which `change` has altered the arrays."""
    with np.load(source) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(target, **arrays)
    return str(target)


def run(capsys, *arguments):
    code = check.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.fixture(scope="module")
def one_case(tmp_path_factory):
    """A file with half of its arrays, which is compared in half the time."""

    def drop(arrays):
        for name in [n for n in arrays if n.startswith("length_scaled")]:
            del arrays[name]
        del arrays["lens"]

    path = tmp_path_factory.mktemp("check") / "any_name.npz"
    changed(path, drop)
    return path


def test_a_file_that_agrees_is_one_line(one_case, capsys):
    code, (line,), err = run(capsys, one_case)
    path, values, gradients, arrays, verdict = line.split()
    assert (code, path, arrays, verdict) == (0, str(one_case), "arrays=6/6", "ok")
    assert float(values.removeprefix("values=")) < 1e-14
    assert float(gradients.removeprefix("gradients=")) < 1e-14
    assert not err


def put(name, index, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value(arrays[name][index])

    return change


def extra(arrays):
    arrays["constant/momentum"] = np.zeros(3)


def shorter(arrays):
    arrays["constant/average"] = arrays["constant/average"][:, :-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("constant/param", (9, 2), lambda x: x + 1e-8), "constant/param differs"),
        (put("constant/grad", (9, 2), lambda x: x + 1e-8), "constant/grad differs"),
        (put("constant/average", (0, 0), lambda x: np.nan), "average differs by inf"),
        (put("trigger/switch_index", 3, lambda x: x + 1), "switch_index differs"),
        (put("x0", 0, lambda x: x + 1e-7), "constant/param differs"),
        (extra, "constant/momentum was not compared"),
        (shorter, r"constant/average has the shape (20, 5), found (20, 6)"),
    ],
    ids=["value", "gradient", "nan", "whole number", "input", "coverage", "shape"],
)
def test_whatever_does_not_agree_fails(one_case, tmp_path, capsys, change, said):
    bad = changed(tmp_path / "bad.npz", change, one_case)
    code, (line,), err = run(capsys, bad)
    assert code == 1 and line.startswith(f"{bad} values=") and line.endswith(" FAIL")
    assert any(said in problem for problem in err), err
    assert f"arrays=6/{6 + (change is extra)} " in line


def test_what_cannot_be_compared_ends_with_2_and_the_others_are(
    one_case, tmp_path, capsys
):
    unknown, other = tmp_path / "unknown.npz", tmp_path / "no_numbers"
    np.savez(unknown, x=np.zeros(3))
    other.mkdir()
    pickled, text = tmp_path / "pickled.npz", tmp_path / "text.npz"
    np.savez(pickled, x=np.array([{}], dtype=object))
    text.write_text("no numbers")
    bad = changed(tmp_path / "bad.npz", extra, one_case)

    def other_start(arrays):
        config = json.loads(arrays["config"].tobytes()) | {"t0": 7}
        arrays["config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)

    def lacking(arrays):
        arrays["config"] = np.frombuffer(b"{}", np.uint8)

    refused = changed(tmp_path / "refused.npz", other_start, one_case)
    broken = changed(tmp_path / "broken.npz", lacking, one_case)
    missing = tmp_path / "missing.npz"
    code, out, err = run(
        capsys, missing, unknown, other, pickled, text, refused, broken, bad, one_case
    )
    assert code == 2
    assert [line.split()[0] for line in out] == [bad, str(one_case)]
    for path, said in (
        (missing, "no such file"),
        (unknown, "of no known kind ("),
        (other, "no file of numbers"),
        (pickled, "unreadable (Object arrays cannot be loaded"),
        (text, "unreadable (not an .npz file)"),
        (refused, "t0=7"),
        (broken, "KeyError: 'weight_decay'"),
    ):
        (line,) = [line for line in err if line.startswith(f"{path}: ")]
        assert said in line


def test_a_folder_is_searched_for_files_and_folders(tmp_path, capsys, monkeypatch):
    inner = tmp_path / "b" / "hf"
    shutil.copytree(GOLDEN / HUGGING_FACE[0], inner)
    shutil.copy(NT_ASGD, tmp_path / "a.npz")
    (tmp_path / "readme.txt").write_text("not a file of numbers")
    seen = []
    monkeypatch.setattr(check, "_report", lambda path, float32: seen.append(path) or 0)
    assert run(capsys, tmp_path, inner)[0] == 0
    assert seen == [tmp_path / "a.npz", inner, inner]


# What a kind can say ------------------------------------------------------------------


def judged(arrays, dtype=np.float64, **comparison):
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    return judge("FILE", arrays, Comparison(**comparison), dtype)


def test_of_two_alternatives_one_counts():
    arrays = {"a/grad": np.ones(3), "a/grad_constant": np.full(3, 2.0), "b": 1.0}
    groups = [("a/grad", "a/grad_constant"), ("c/grad", "c/grad_constant")]
    fits, not_given = np.full(3, 2.0), np.full(3, 7.0)
    for gradients in (
        {"a/grad_constant": fits},
        {"a/grad_constant": fits, "a/grad": not_given},
    ):
        found = judged(
            arrays, values={"b": 1.0}, gradients=gradients, alternatives=groups
        )
        assert found.ok and (found.compared, found.total) == (2, 2)
        assert found.gradients == 0
    found = judged(arrays, values={"b": 1.0}, alternatives=groups)
    assert found.problems == ("a/grad or a/grad_constant was not compared",)
    gradients = {"a/grad": not_given}
    found = judged(arrays, values={"b": 1.0}, gradients=gradients, alternatives=groups)
    assert not found.ok and found.gradients == pytest.approx(6)


def test_what_is_random_is_compared_by_its_properties():
    arrays = {"matrices/rows": np.eye(3)}
    assert judged(arrays, values={}, properties={"matrices/rows": 1e-12}).ok
    for bad in (1e-8, np.nan):
        found = judged(arrays, values={}, properties={"matrices/rows": bad})
        assert not found.ok and (found.compared, found.total) == (1, 1)


@pytest.mark.parametrize(
    ("expected", "found", "ok"),
    [
        # Of the greatest number, which does not shrink with a neighbour.
        ([1e3, 1e-3], [1e3, 1e-3 + 5e-7], True),
        ([1e3, 1e-3], [1e3, 1e-3 + 5e-6], False),
        # Rounding alone: one array is zero, of the other nothing is left but that.
        ([0.0, 0.0], [1e-16, 0.0], True),
        ([1e-17, 0.0], [-1e-17, 0.0], True),
        ([0.0, 0.0], [1e-12, 0.0], False),
        (np.float32([0.1, 0.3]), [0.1, 0.3], True),
        (np.float32([0.1, 0.3]), [0.1, 0.3000001], False),
        ([3, 4], [3, 5], False),
        ([True, False], [True, True], False),
    ],
)
def test_what_a_tolerance_is_of(expected, found, ok):
    assert judged({"x": expected}, values={"x": np.array(found)}).ok == ok


def test_a_gradient_is_held_to_its_norm_and_a_zero_one_to_the_others():
    arrays = {"a": np.full(100, 2.0), "b": np.zeros(3), "c": np.ones(2)}
    fits = {"a": arrays["a"] + 1.9e-9, "b": np.full(3, 1e-15), "c": arrays["c"]}
    assert judged(arrays, values={}, gradients=fits).ok
    for name, wrong in (("a", 2.1e-9), ("b", 2e-14), ("c", 1.1e-9)):
        found = fits | {name: arrays[name] + wrong}
        (problem,) = judged(arrays, values={}, gradients=found).problems
        assert problem.startswith(f"{name} differs")


def test_a_kind_may_set_tolerances_of_its_own():
    arrays = {"x": np.array([5.0, 1.0]), "y": np.array([0.5])}
    values = {"x": arrays["x"] + 2e-9, "y": arrays["y"] + 4e-10}
    assert judged(arrays, values=values).ok
    strict = absolute(1e-9, arrays, ["x", "y", "z"])
    (problem,) = judged(arrays, values=values, tolerances=strict).problems
    assert problem.startswith("x differs")
    assert judged(arrays, values=values, tolerances=absolute(3e-9, arrays, "xy")).ok


def test_float32_is_given_its_own_tolerances():
    arrays = {"x": np.ones(2), "g": np.ones(2)}
    for x, g, dtype, problems in (
        (1.00009, 1.0009, np.float32, 0),
        (1.0002, 1.002, np.float32, 2),
        (1.00009, 1.0009, np.float64, 2),
    ):
        values, gradients = {"x": np.full(2, x)}, {"g": np.full(2, g)}
        found = judged(arrays, dtype, values=values, gradients=gradients)
        assert len(found.problems) == problems


def test_inputs_need_no_comparing_and_more_may_be_found_than_is_asked():
    arrays = {"x": np.ones(2), "params/w": np.ones(2)}
    values = {"x": np.ones(2), "not in the file": np.ones(2)}
    found = judged(arrays, values=values, given=["params/w", "targets"])
    assert found.ok and (found.compared, found.total) == (1, 1)


def test_a_file_of_inputs_alone_is_not_ok():
    found = judged({"x": np.ones(2)}, values={"y": np.ones(2)}, given=["x"])
    assert not found.ok and (found.compared, found.total) == (0, 0)
    assert "nothing in this file can be compared" in found.problems[0]
