# make run        a demonstration on the embedded tiny model
# make test       everything that CI checks
# make notebooks  execute the notebooks and save their outputs
# make docs       the documentation site, in _docs (with Quarto, if it is installed; else plain pages)
# make readme     README.md from nbs/index.ipynb
# make bench      speed and memory against other libraries
# make lock       renew the versions that all of these install, in requirements/
# make clean      remove the environment and everything built
# Each makes what it needs in .venv, from the committed locks. PYTHON=... picks the interpreter.

PYTHON ?=
BIN    := .venv/bin

.PHONY: run test notebooks docs readme bench lock clean env env-dev env-bench env-newest env-lowest
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
	for b in "train_step.py --only per_tensor per_token" "train_step.py --dtype bfloat16 --only per_tensor per_token" "generate.py --rounds 3" "store.py" "ratios.py"; do $(BIN)/python benchmarks/$$b --out results/benchmarks || exit 1; done

# All locks at once, for every Python and system that is supported. Run the tests and commit the files together.
lock: env-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python scripts/lock.py

clean:
	rm -rf .venv _docs _proc build dist .pytest_cache *.egg-info

env:       .venv/installed-run
env-dev:   .venv/installed-dev
env-bench: .venv/installed-bench

# A stamp per lock: a second `make` installs nothing; a changed lock, pyproject.toml or kernel installs again.
.venv/installed-%: requirements/%.lock requirements/torch.txt scripts/install.py pyproject.toml setup.py $(wildcard csrc/*)
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh
	$(BIN)/python scripts/install.py $*
	@touch $@

# The ends of the range that pyproject.toml allows, as the weekly job runs them; nothing else uses these.
env-newest env-lowest:
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh
	rm -f .venv/installed-*
	$(BIN)/python scripts/install.py $(@:env-%=%)
