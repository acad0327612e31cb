"""What people install: a wheel of what the Dockerfile copies, in a bare environment."""

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
import yaml

from xlformer import __version__

ROOT = pathlib.Path(__file__).parent.parent
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
# Run where no checkout is: all comes from the wheel, and an installed config loads.
PROGRAM = """
import pathlib, sys
import xlformer
from xlformer import config, train
import xlformer.configs
for package in xlformer, xlformer.configs:
    print(pathlib.Path(package.__file__).parent)
print(config.load("wt103_base").model.n_layer, len(config.names()))
sys.exit(train.main(["--help"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by setuptools alone: no index, no network."""
    source = tmp_path_factory.mktemp("image")
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        *names, target = line.split()
        for name in names:
            if (ROOT / name).is_dir():
                made = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, source / target, ignore=made)
            else:
                shutil.copy(ROOT / name, source / target)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    run([sys.executable, "-c", build], cwd=source)
    (path,) = (source / "dist").iterdir()
    return path


def run(command, cwd):
    # Where tests run, the checkout may be on the path by name.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {n for n in file.namelist() if ".dist-info/" not in n}
        (metadata,) = [n for n in file.namelist() if n.endswith("/METADATA")]
        fields = email.message_from_bytes(file.read(metadata))
    package = [*ROOT.glob("xlformer/**/*.py"), ROOT / "xlformer" / "py.typed"]
    expected = {str(path.relative_to(ROOT)) for path in package}
    expected |= {f"xlformer/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/*.py")}
    assert names == expected
    assert (fields["Name"], fields["Version"]) == ("xlformer", __version__)
    assert "Apache-2.0" in (fields["License-Expression"], fields["License"])
    assert fields["License-File"] == "LICENSE"
    assert fields["Requires-Python"] == ">=3.11"
    assert fields.get_payload() == (ROOT / "README.md").read_text()


def test_it_works_in_a_bare_environment(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home)
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--quiet", wheel]
    run(
        [sys.executable, "-m", "pip", f"--python={home}/bin/python", *install], tmp_path
    )
    (packages,) = home.glob("lib/*/site-packages")
    # Jax and the others are those of this Python; a .pth in a .pth's directory is not
    # read, so that its editable xlformer, if it has one, stays unseen.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    said = run([home / "bin" / "xlformer", "--version"], tmp_path)
    assert f"xlformer {__version__}" in said
    here, configs, loaded, usage, *_ = run(
        [home / "bin" / "python", "-c", PROGRAM], tmp_path
    ).splitlines()
    assert here == str(packages / "xlformer")
    assert configs == str(packages / "xlformer" / "configs")
    layers, count = map(int, loaded.split())
    assert layers == 16 and count == len(list(ROOT.glob("configs/[!_]*.py")))
    assert usage.startswith("usage: ")


def test_the_image_is_sent_what_it_copies():
    """And nothing else: beside it lie environments of gigabytes."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert sent == set(" ".join(copied).split())


def test_the_image_installs_an_extra_that_there_is():
    extras = re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.M)
    (default,) = re.findall(r"^ARG ACCELERATOR=(\w+)$", DOCKERFILE, re.MULTILINE)
    (installed,) = re.findall(r'pip install .*"\.\[(.+)\]"', DOCKERFILE)
    accelerator, gcs = installed.split(",")
    assert accelerator == "${ACCELERATOR}" and gcs in extras
    said = " ".join(DOCKERFILE[: DOCKERFILE.index("docker build")].split())
    for name in (default, "tpu", "cuda12", "cuda13", "cpu"):
        assert name in extras and name in said


def test_a_commit_is_checked_as_ci_does_it():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    commands = (ROOT / ".ci" / "run").read_text()
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert len(entries) == commands.count(".venv/bin/python -m ") == 3
    assert all(entry in commands for entry in entries)
    # Only the environment says which versions: nothing is pinned a second time.
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
