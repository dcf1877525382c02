# make run        a demonstration on the embedded tiny model
# make test       everything that CI checks
# make notebooks  execute the notebooks and save their outputs
# make docs       the documentation site, in _docs (with Quarto, if it is installed; else plain pages)
# make readme     README.md from nbs/index.ipynb
# make bench      speed and memory against other libraries
# make clean      remove the environment and everything built
# Each makes what it needs in .venv. PYTHON=... picks the interpreter, TORCH=... the build of PyTorch.

TORCH  ?= torch==2.13.0
PYTHON ?=
BIN    := .venv/bin

.PHONY: run test notebooks docs readme bench clean env env-dev env-bench
.DEFAULT_GOAL := run

run: env
	$(BIN)/switchable-llm run --preset tiny

test: env-dev
	$(BIN)/python scripts/check.py

notebooks: env-dev
	$(BIN)/python scripts/execute_notebooks.py $(NB)

docs: env-dev
	$(BIN)/python scripts/build_docs.py

readme: env-dev
	$(BIN)/python scripts/build_docs.py --readme

bench: env-bench
	for b in "train_step.py" "train_step.py --dtype bfloat16" "train_step.py --growth" "generate.py" "store.py"; do $(BIN)/python benchmarks/$$b --out results/benchmarks || exit 1; done

clean:
	rm -rf .venv _docs _proc build dist .pytest_cache *.egg-info

env:       .venv/installed
env-dev:   .venv/installed-dev
env-bench: .venv/installed-bench

# A stamp per set of extras: a second `make` installs nothing, a change of pyproject.toml or of the kernels installs again.
.venv/installed:       EXTRAS =
.venv/installed-dev:   EXTRAS = [dev]
.venv/installed-bench: EXTRAS = [bench]
.venv/installed .venv/installed-dev .venv/installed-bench: pyproject.toml setup.py $(wildcard csrc/*.cpp)
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".$(EXTRAS)"
	@touch $@
