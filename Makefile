# Each target sets up .venv by itself, so a fresh clone needs only `make demo` or `make test`.
# Another interpreter: make PYTHON=python3.12 test. More pip options: make PIP_ARGS="--index-url ...".

# Idle threads sleep: if other processes use the cores, spinning threads delay the threads that they
# wait for.
export OMP_WAIT_POLICY ?= PASSIVE

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Example distributions, such as a third-party policy, which the tests find by their entry points.
EXAMPLES := $(wildcard examples/*/pyproject.toml)
EDITABLE_EXAMPLES := $(foreach example,$(EXAMPLES),-e ./$(dir $(example)))

.PHONY: demo test lint newest docs newcomer browser frontier fuzz mutants sglang vllm vllm-next \
	interface soak filters clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(BIN)/l2pd compare --demo

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

# Test the transformers adapter on the newest release in the declared range. Only what is newer is
# installed, into a small environment on top of .venv: make newest NEWEST_TESTS=tests/FILE.py
NEWEST_VENV := .venv-newest
NEWEST_TESTS ?= tests/adapters/huggingface tests/tools/cli/test_export_generate.py
newest: $(STAMP)
	$(BIN)/python -m tests.engines.overlay $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --upgrade \
		"$$($(BIN)/python -c 'from l2pd_adapters.engines import TRANSFORMERS as t; \
			print(t.name + t.supported_range)')"
	$(NEWEST_VENV)/bin/python -m pytest $(NEWEST_TESTS)

# Build the site of docs/ in site/; a broken link or a docstring that cannot be parsed is an error.
DOCS_STAMP := $(VENV)/.docs-installed
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Follow README.md and docs/ in a new environment with the built wheel, and make a newcomer's mistakes.
newcomer: $(STAMP)
	$(BIN)/python -m tests.newcomer

# Test the pages of compare --html and l2pd demo in the system's browser.
BROWSER_STAMP := $(VENV)/.browser-installed
browser: $(BROWSER_STAMP)
	@command -v chromium || command -v google-chrome || { \
		echo "No browser is installed. On Debian: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest tests/tools/viewing/test_browser.py tests/tools/cli/test_demo.py

# Measure the accuracy-speed frontier of every policy; write the page docs/which_policy.md.
frontier: $(STAMP)
	$(BIN)/python benchmarks/frontier.py --out benchmarks/results/frontier
	$(BIN)/python benchmarks/which_policy.py

# Random batches, calls, files and plugins: make fuzz MINUTES=30 (minutes for each part).
MINUTES := 5
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

# List changes that no test detects: make mutants MODULES="slots selection". All take an hour.
MODULES :=
MUTANTS_STAMP := $(VENV)/.mutants-installed
mutants: $(MUTANTS_STAMP)
	$(BIN)/python -m tests.mutants $(if $(MODULES),--modules $(MODULES)) --out runs/mutants

# Real SGLang and real vLLM on a CPU, each in its own environment (tests/engines/README.md).
RIGS := tests/engines
# Local distributions that both environments contain.
RIG_SHARED := $(RIGS)/policies $(RIGS)/torchvision
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
sglang: $(SGLANG_STAMP)
	$(SGLANG_VENV)/bin/python -m pytest $(RIGS)/sglang

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest $(RIGS)/vllm

# The same suite on the Python files of another release, by default the newest, and the compiled
# operators of .venv-vllm: make vllm-next VERSION=0.33.0 NEXT_TESTS=tests/engines/vllm/test_engine.py
VLLM_NEXT_VENV := .venv-vllm-next
VERSION :=
NEXT_TESTS := $(RIGS)/vllm
vllm-next: $(VLLM_STAMP)
	rm -rf build/vllm-next
	$(VLLM_VENV)/bin/python -m pip download --disable-pip-version-check $(PIP_ARGS) --no-deps \
		--only-binary :all: --dest build/vllm-next "vllm$(addprefix ==,$(VERSION))"
	$(VLLM_VENV)/bin/python -m tests.engines.vllm.next_release build/vllm-next/vllm-*.whl \
		$(VLLM_NEXT_VENV)
	rm -r build/vllm-next
	$(VLLM_NEXT_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
		-r $(RIGS)/vllm/requirements-next.txt
	L2PD_ANY_VLLM=1 $(VLLM_NEXT_VENV)/bin/python -m pytest $(NEXT_TESTS)

# Whether a release has what an adapter uses, without installing it, by default the newest:
# make interface ENGINE=vllm VERSION=0.33.0
interface: $(STAMP)
	@failed=0; for engine in $(ENGINE); do \
		$(BIN)/python -m tests.engines.interface $$engine $(addprefix --version ,$(VERSION)) \
			|| failed=1; \
	done; exit $$failed

# Mixed load on live servers, each answer compared: make soak MINUTES=20 ENGINE=sglang SEED=1
ENGINE := sglang vllm
SEED := 0
soak: $(foreach engine,$(ENGINE),.venv-$(engine)/.installed)
	@failed=0; for engine in $(ENGINE); do \
		.venv-$$engine/bin/python -m tests.engines.soak --engine $$engine \
			--minutes $(MINUTES) --seed $(SEED) || failed=1; \
	done; exit $$failed

# install-rig,VENV,FOLDER,LOCAL DISTRIBUTIONS
define install-rig
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r $(2)/requirements.txt
$(1)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps \
	-r $(2)/requirements-no-deps.txt -e . $(addprefix ./,$(RIG_SHARED) $(3)) $(EDITABLE_EXAMPLES)
@touch $(1)/.installed
endef

RIG_SHARED_FILES := $(wildcard $(foreach shared,$(RIG_SHARED),$(shared)/*.* $(shared)/*/*.py))
RIG_FILES = $(wildcard $(1)/*.txt $(1)/*/pyproject.toml $(1)/rig/* $(1)/rig/*/*)
$(SGLANG_STAMP): pyproject.toml $(EXAMPLES) $(RIG_SHARED_FILES) $(call RIG_FILES,$(RIGS)/sglang)
	$(call install-rig,$(SGLANG_VENV),$(RIGS)/sglang,$(RIGS)/sglang/rig)

$(VLLM_STAMP): pyproject.toml $(EXAMPLES) $(RIG_SHARED_FILES) $(call RIG_FILES,$(RIGS)/vllm)
	$(call install-rig,$(VLLM_VENV),$(RIGS)/vllm,$(RIGS)/vllm/rig $(RIGS)/vllm/version)

# Train the filters that come with a small model from scratch: decode, record, train.
# For the other model: make filters SMALL=tiny-sdar
SMALL := tiny-llada
POLICIES = adapters/l2pd_adapters/tiny_models/$(SMALL)/policies
RUNS = runs/filters/$(SMALL)
filters: $(STAMP)
	$(BIN)/l2pd learn2pd collect --model $(SMALL) --policy oracle --limit 800 --out $(RUNS)/oracle
	$(BIN)/l2pd learn2pd train --policy learn2pd --data $(RUNS)/oracle --out $(POLICIES)/learn2pd \
		--force
	$(BIN)/l2pd learn2pd train --model $(SMALL) --policy settled --rounds 3 --limit 1000 \
		--labels consistent --data $(RUNS)/settled --out $(POLICIES)/settled --force
	$(BIN)/l2pd learn2pd collect --model $(SMALL) --limit 320 --labels consistent \
		--policy oracle --policy confidence_threshold,threshold=0.7 --policy confidence_threshold \
		--policy settled,threshold=0.98,risk=0.05,fallback=none \
		--policy settled,threshold=0.9,risk=0.2,fallback=none --out $(RUNS)/monotone
	$(BIN)/l2pd learn2pd train --policy learn2pd,variant=monotone --data $(RUNS)/monotone \
		--out $(POLICIES)/learn2pd_monotone --force

clean:
	rm -rf site $(VENV) $(NEWEST_VENV) $(SGLANG_VENV) $(VLLM_VENV) $(VLLM_NEXT_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt $(EXAMPLES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
		-e ".[dev]" $(EDITABLE_EXAMPLES)
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[docs]"
	@touch $@

$(MUTANTS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
		-e ".[mutants]"
	@touch $@

$(BROWSER_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
		-e ".[demo,browser]"
	@touch $@
