# make demo     the whole path on real data
# make test     the tests, without the slow ones
# make test-slow     the slow ones; docs/testing.md lists them
# make test-long     those that take half a minute and more each
# make test-random   those that make up their inputs, on a thousand new ones each
# make test-avx2     those of engines, compression and training on a processor without AVX-512 (docs/machines.md)
# make check    lint, types, architecture
# make bench-serve   our server against its peers, 26 minutes on a quiet machine (`apt-get install wrk` first)
# make bench-noise   the main job on a host that is disturbed on purpose, 3 hours; parts by `--only`
# make bench-soak    a real server under everything at once, 10 minutes (SOAK_SECONDS); does it grow?
# make bench-hostile  how long hostile inputs keep a server from others, and what memory they leave, 6 minutes
# make fuzz          the protocol's bytes under a fuzzer, 10 minutes (FUZZ_SECONDS); keeps what it finds
# make bench-load    the verdict, the search and the generator put to the test, 25 minutes on a quiet machine
# make bench-compress  what compression buys and costs, an hour and a half; goes on where it was broken off
# make bench-train  training by parallel plans: exactness, bytes, memory, speed; goes on where it was broken off
# make bench-train-options  what compressed gradients and rare meetings cost; goes on where it was broken off
# make bench-machines  what int8 answers and how fast it is, with and without VNNI, 20 minutes
# make bench-zoo    500 random networks under a checked heap, and named ones of all kinds in every step, 25 minutes
# make docs     docs/benchmarks.md, from benchmarks/results
# make picture  docs/demo.svg, the README's picture, from runs/demo
# Everything lives in .venv; nothing is installed outside it.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
AVX2_ENGINES := tests/engines/test_engines.py tests/models/test_imported.py $(addprefix tests/compress/test_,compress.py speed.py)
AVX2_TRAINING := tests/compress/test_recipe.py tests/models/test_models.py \
	$(addprefix tests/train/test_,train.py train_loop.py train_workers.py parallel.py)

.PHONY: setup demo picture test test-slow test-long test-random test-avx2 check clean bench-machines bench-serve bench-load bench-noise bench-soak bench-hostile bench-compress bench-train bench-train-options bench-zoo fuzz docs

setup: .venv/.ready

# torch first and pinned: any other order lets another package pull in a build of several gigabytes.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/.dev: .venv/.ready
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/rushhour demo

test: .venv/.dev
	$(BIN)/pytest

# A whole tuning run proves rates under load, which other tests beside it would take from it.
test-slow: .venv/.dev
	$(BIN)/pytest -m "slow and not long" --ignore tests/tune/test_tune.py
	$(BIN)/pytest -m slow tests/tune/test_tune.py

# Half a minute each and more: every world, every place to be killed at, whole rows of the matrix.
test-long: .venv/.dev
	$(BIN)/pytest -m long

# The tests that make up their own inputs, on 1,000 that were never tried, each: 20 minutes.
test-random: .venv/.dev
	$(BIN)/pytest -m hypothesis --hypothesis-profile random

# The engines, compression and training once more, on a processor that has AVX2 and nothing newer.
test-avx2: .venv/.dev
	$(BIN)/python -m rushhour.testing.processor $(BIN)/pytest -n 2 $(AVX2_ENGINES) $(AVX2_TRAINING)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-serve: setup
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/render.py

bench-noise: .venv/.dev
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/render.py

bench-soak: setup
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/render.py

bench-hostile: setup
	$(BIN)/python benchmarks/hostile.py
	$(BIN)/python benchmarks/render.py

fuzz: .venv/.dev
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	$(BIN)/python fuzz/run.py

bench-load: setup
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/render.py

bench-compress: setup
	$(BIN)/pip install --quiet --editable '.[elpv,text]'
	$(BIN)/python benchmarks/compress.py
	$(BIN)/python benchmarks/render.py

bench-train: setup
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/render.py

bench-train-options: setup
	$(BIN)/python benchmarks/train_options.py
	$(BIN)/python benchmarks/render.py

bench-machines: .venv/.dev
	$(BIN)/python benchmarks/machines.py
	$(BIN)/python benchmarks/render.py

bench-zoo: setup
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/render.py

picture: setup
	$(BIN)/python benchmarks/picture.py

docs: setup
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
