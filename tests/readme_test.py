"""What the README shows runs, and what it names exists."""

import pathlib
import re

import trained_run

from xlformer import config as config_lib

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_ten_lines_of_python_run(tmp_path, tmp_path_factory, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    # The tiny run knows the characters of its own text only.
    text = "the na"
    code = re.sub(r'encode\(".*?" \* 40\)', f'encode("{text}" * 40)', code)
    assert text in code
    trained_run.copy(tmp_path_factory.getbasetemp(), tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("positions remembered" in line for line in lines)


def test_the_configs_and_fields_that_it_names_exist():
    for name in ("enwik8_base", "wt103_large_nvidia", "lm1b_base_paper"):
        assert name in README
    named = set(re.findall(r"`(?:[a-z]+\d*|[a-z]+\d*_[a-z_]+)`", README))
    known = {f"`{name}`" for name in config_lib.names()}
    published = {n for n in named if n.strip("`").split("_")[0] in ("enwik8", "wt103")}
    assert published and published <= known
    config = config_lib.default_config()
    for section, field in re.findall(r"`config\.(\w+)\.(\w+)`", README):
        assert field in config[section], f"config.{section}.{field}"


def test_the_map_of_the_tree_is_the_tree():
    root = pathlib.Path(__file__).parent.parent
    for name in re.findall(r"^      (\w+(?:\.py|/))", README, flags=re.MULTILINE):
        assert (root / "xlformer" / name).exists(), name
