# Two commands do all the set-up: `make demo` and `make test`. Both build .venv with what constraints.txt pins.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Python that may not keep what it compiled compiles ten thousand files of torch and its kin at each start: ten seconds
# where three will do.
unexport PYTHONDONTWRITEBYTECODE
# uv installs in seconds what pip installs in minutes; it looks for local wheels where pip was told to.
UV = UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(BIN)/uv pip install --quiet --python $(BIN)/python

# What `make bench-data` runs, one JSON line a measurement.
BENCH_DATA :=
BENCH_DATA += benchmarks/bench_plan.py
BENCH_DATA += benchmarks/bench_tags.py
BENCH_DATA += benchmarks/bench_decode.py
BENCH_DATA += benchmarks/bench_latents.py
BENCH_DATA += benchmarks/bench_prepare.py
BENCH_DATA += benchmarks/bench_ingest.py

# What `make bench-train` runs, in the same form.
BENCH_TRAIN :=
BENCH_TRAIN += benchmarks/bench_train.py
BENCH_TRAIN += benchmarks/bench_checkpoint.py
BENCH_TRAIN += benchmarks/bench_load.py

.PHONY: demo test test-faults test-slow fuzz lint emoji vae studies results
.PHONY: bench-data bench-formats bench-sample bench-train clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       draw a tagged set, train a tiny SDXL on it, sample, export: 10 minutes on 2 cores"
	@echo "make test       install what tests need, check style and types, run the tests"
	@echo "make test-slow  tests at SDXL's real size and long fault tests"
	@echo "make test-faults  kill, stop, damage and starve runs; writes docs/faults.md (half an hour on 2 cores)"
	@echo "make bench-data  measure the work on data beside its peers (a quiet machine: minutes)"
	@echo "make bench-formats  inspect on a file of 7 GB beside a bare look at its header: seconds"
	@echo "make bench-train  measure the training loop, saving and resuming beside their peers (a quiet machine: minutes)"
	@echo "make fuzz       manifests, tags, tables and tars mangled tens of thousands of times: ten minutes or so"
	@echo "make bench-sample  sampling beside bare U-Net calls and diffusers' pipeline: a minute or two"
	@echo "make studies    five studies on tiny models, an hour on 2 cores; goes on where it was stopped"
	@echo "make results    docs/results.md, from the studies' and the evaluation's numbers"
	@echo "make emoji      the same path on real pictures: the Noto emoji font (runs/emoji.sh)"
	@echo "make vae        a VAE decoder finetuned, measured and put into a model: 5 minutes on 2 cores (runs/vae_tiny.sh)"

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/uv
	$(UV) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/uv
	$(UV) --constraint constraints.txt --editable '.[test]'
	# Its sampling functions are a reference for ours; its own dependencies are neither needed nor wanted.
	$(UV) --constraint constraints.txt --no-deps k-diffusion
	touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	$(BIN)/python demo/run.py

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow"

test-faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/test_executors.py tests/test_prepare.py tests/test_prepare_update.py tests/test_leases.py
	$(BIN)/python tests/faults/run_matrix.py --out docs/faults.md

fuzz: $(VENV)/.installed-test
	SUMIZOME_FUZZ_CASES=20000 $(BIN)/python -m pytest tests/data/test_fuzzed_parsers.py tests/data/test_tar_reader.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

emoji: $(VENV)/.installed
	$(UV) --constraint constraints.txt fonttools
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/emoji.sh

vae: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/vae_tiny.sh

bench-data: $(VENV)/.installed
	$(UV) --constraint constraints.txt --editable '.[bench]'
	@for script in $(BENCH_DATA); do PYTHONPATH=. $(BIN)/python $$script || exit 1; done

bench-formats: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/bench_inspect.py

bench-train: $(VENV)/.installed
	$(UV) --constraint constraints.txt --editable '.[bench]'
	@for script in $(BENCH_TRAIN); do PYTHONPATH=. $(BIN)/python $$script || exit 1; done

bench-sample: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/bench_sample.py

studies: $(VENV)/.installed
	$(UV) --constraint constraints.txt --editable '.[studies]'
	$(BIN)/python -m studies --processes 2

results: $(VENV)/.installed
	$(UV) --constraint constraints.txt --editable '.[studies]'
	@test ! -f work/demo/summary.json || test -f work/demo/figures/figures.json || \
		$(BIN)/sumizome figures --model work/demo/run --latents work/demo/latents --out work/demo/figures
	@test ! -f work/demo/summary.json || test -f work/demo/evaluation.json || \
		$(BIN)/sumizome evaluate --model work/demo/run --latents work/demo/latents --out work/demo/evaluation.html
	$(BIN)/python -m studies.results

clean:
	rm -rf $(VENV) work build dist
