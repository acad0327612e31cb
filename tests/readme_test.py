"""What the README and its fellows show runs, and what they name exists."""

import pathlib
import re

import jax
import numpy as np
import pytest
import trained_run

from xlformer import __main__, models
from xlformer import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("[a-z]*/README.md"),
    )
}
every_page = pytest.mark.parametrize("page", PAGES)


def test_the_ten_lines_of_python_run(base, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    # The tiny run knows the characters of its own text only.
    text = "the na"
    code = re.sub(r'encode\(".*?" \* 40\)', f'encode("{text}" * 40)', code)
    assert text in code
    trained_run.copy(base, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("positions remembered" in line for line in lines)


def test_the_model_that_is_worked_out_keeps_the_contract(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["CONTRIBUTING.md"], re.DOTALL)
    found = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), found)
    monkeypatch.setitem(models.MODELS, "leaky", found["Leaky"])
    config = config_lib.default_config("leaky", d_model=8)
    # check_model passes on it, in 9 seconds; here only what tells that it still would.
    model = models.build(config.model, vocab_size=11)
    tokens_BT = jax.ShapeDtypeStruct((3, 7), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda: model.init_state(3))
    nll_BT, after, aux = jax.eval_shape(
        model.apply, params, tokens_BT, tokens_BT, state
    )
    assert nll_BT.shape == (3, 7) and aux.loss.shape == ()
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)


def test_the_configs_that_it_names_exist():
    for name in ("enwik8_base", "wt103_large_nvidia", "lm1b_base_paper"):
        assert name in README
    named = set(re.findall(r"`(?:[a-z]+\d*|[a-z]+\d*_[a-z_]+)`", README))
    known = {f"`{name}`" for name in config_lib.names()}
    published = {n for n in named if n.strip("`").split("_")[0] in ("enwik8", "wt103")}
    assert published and published <= known


@every_page
def test_options_and_commands_that_a_page_names_exist(page):
    found = [config_lib.default_config(name) for name in models.MODELS]
    for section, field in re.findall(r"config\.([a-z]+)\.(\w+)", PAGES[page]):
        if section in found[0]:
            assert any(field in config[section] for config in found), field
    for command in re.findall(r"python -m xlformer[. ]([a-z]+)", PAGES[page]):
        assert command in __main__.COMMANDS, command


@every_page
def test_files_and_pages_that_a_page_names_exist(page):
    """Links by their own place; in backticks from the root. NAME stands for any."""
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^):#]+)\)", PAGES[page]):
        assert (here / link).exists(), link
    written = "|".join(("configs", "docs", "launch", "tests", "xlformer"))
    for name in re.findall(rf"`((?:{written})/[\w/.]+)`", PAGES[page]):
        invented = "NAME" in name or "leaky" in name
        assert invented or (ROOT / name).exists(), name


def test_every_page_is_in_the_index():
    for page in PAGES:
        assert f"]({page})" in README or page == "README.md" or "tests" in page, page


def test_the_map_of_the_tree_is_the_tree():
    (tree,) = re.findall(r"\n    xlformer/\n((?:      .*\n)+)", README)
    entry = re.compile(r"^      ((?:\w+\.py ?)+|\w+/)", re.MULTILINE)
    names = [name for words in entry.findall(tree) for name in words.split()]
    assert len(names) > 15
    for name in names:
        assert (ROOT / "xlformer" / name).exists(), name
    packages = {p.parent.name for p in ROOT.glob("xlformer/*/__init__.py")}
    assert {f"{name}/" for name in packages} <= set(names)
