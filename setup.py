"""Package metadata; the build backend and the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "depass_fast/version.py").read_text(encoding="utf-8"))[0]

setup(
    name="depass-fast",
    version=VERSION,
    description="Exact decomposed forward passes (DePass) for Hugging Face language models, fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels has no __init__.py: through the link at the top it would hide the package `kernels` of transformers
    packages=[*find_packages(include=["depass_fast", "depass_fast.*"]), "depass_fast.kernels"],
    package_data={
        "depass_fast": ["py.typed"],
        "depass_fast.demo": ["model/*"],
        "depass_fast.kernels": ["README.md", "*.json"],
        "depass_fast.report": ["page/*"],
    },
    install_requires=[
        "torch>=2.8",
        "transformers>=4.51,!=4.51.0,<6",  # 4.51.0 loads no model without accelerate, by mistake
        "triton>=3.4,<4; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "rich>=13",
    ],
    extras_require={
        "pandas": ["pandas>=2"],  # Attribution.to_dataframe
        "report": ["vl-convert-python>=1.7", "jinja2>=3"],  # pages: Vega's scripts, and what escapes text in HTML
        "browser": ["playwright>=1.45", "axe-playwright-python>=0.1.4"],  # what pages are tested with, beside Chromium
        "sweep": ["pyarrow>=14.0.1", "pandas>=2"],  # sweeps into folders; `datasets` beside it for data sets
        "ray": ["ray[data]>=2.40", "pyarrow>=14.0.1", "pandas>=2"],  # sweeps over a cluster
        "device-map": ["accelerate>=1"],  # models spread over several devices
        "gguf": ["gguf>=0.10", "accelerate>=1.1"],  # models from GGUF files; transformers loads none without the two
        # what tests/interop runs against; inseq cannot share an environment with TransformerLens (typeguard)
        "nnsight": ["nnsight>=0.8,<0.9"],
        "transformer-lens": ["transformer-lens>=3.9,<5"],
        "sae-lens": ["sae-lens>=6.54,<7"],
        "circuitsvis": ["circuitsvis>=1.40,<2"],
        "peft": ["peft>=0.15"],
        "quantised": ["bitsandbytes>=0.46", "torchao>=0.12", "optimum-quanto>=0.2.7", "peft>=0.15"],
        "inseq": ["inseq>=0.7,<0.8"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "jsonschema>=4.18",
            "pandas>=2",
            "pyarrow>=14.0.1",
            "matplotlib>=3.8",
        ],
        "plot": ["matplotlib>=3.8"],  # result.plot(), depass_fast.plots and --plot
        "bench": ["matplotlib>=3.8"],  # the plots of bench/
        "evaluate": ["matplotlib>=3.8", "captum>=0.9"],  # its plots; what its baselines are compared with in tests
        # the site (docs/site.md), and what its notebooks draw and write with
        "docs": [
            "sphinx>=8.1",
            "furo>=2025.7",
            "myst-nb>=1.3",
            "sphinx-copybutton>=0.5.2",
            "ipykernel>=6",
            "matplotlib>=3.8",
            "pandas>=2",
            "pyarrow>=14",
            "vl-convert-python>=1.7",
        ],
        "lint": ["ruff>=0.12", "pyright[nodejs]>=1.1.400"],
    },
    entry_points={"console_scripts": ["depass-fast = depass_fast.cli.main:main"]},
)
