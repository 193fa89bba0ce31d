"""All metadata of the project; requirements.lock holds the one tested set of versions."""

import pathlib

from setuptools import find_packages, setup

GYM = ["gymnasium>=1.1"]
GATEWAY = [
    "aiohttp>=3.12",
    "flatbuffers>=24.3",
    "httptools>=0.6.3",
    "prometheus-client>=0.22",
    "starlette>=0.50",
    "tomlkit>=0.13",
    "uvicorn>=0.38",
]
DOCS = ["latex2mathml>=3.77", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]
NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", "nbconvert>=7.16", "nbformat>=5.10"]

setup(
    name="qos_jax",
    version="0.2.0",
    description="Simulates LLM serving at the edge in JAX, and learns to route requests for quality of service",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["qos_jax", "qos_jax.*"]),
    package_data={
        "qos_jax": ["py.typed"],
        "qos_jax.fleet": ["data/*.csv", "measured/*.json"],
        "qos_jax.gateway": ["page.html"],
        "qos_jax.report": ["*.html"],
        "qos_jax.training": ["pretrained/**/*"],
        "qos_jax.worlds": ["fleets/*.toml"],
    },
    entry_points={"console_scripts": ["qos-jax = qos_jax.programs.main:main"]},
    install_requires=[
        "absl-py>=2.3.1",
        "chex>=0.1.91",
        "flax>=0.12.0",
        "jax>=0.8.0",
        "jraph>=0.0.6.dev0",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.28",
        "safetensors>=0.4.3",
        "scipy>=1.14",
        "tensorboardX>=2.6.4",
        "tokenizers>=0.20.3",
        "tqdm>=4.66",
    ],
    extras_require={
        "gym": GYM,
        "gateway": GATEWAY,
        "notebooks": NOTEBOOKS,
        "docs": DOCS,
        "dev": [
            *GYM,
            *GATEWAY,
            *NOTEBOOKS,
            "httpx>=0.28",
            "hypothesis>=6.100",
            "mypy>=1.18.1",
            "nbqa>=1.9.1",
            "numba>=0.61",
            "packaging>=24.0",
            "pytest>=8.3",
            "pytest-cov>=6.0",
            "pytest-xdist>=3.6.1",
            "pyyaml>=6.0",
            "ruff>=0.14",
        ],
        "sb3": [*GYM, "stable-baselines3>=2.7", "torch>=2.8"],
        "cuda": ["jax[cuda12]"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
