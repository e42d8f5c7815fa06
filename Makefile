# make demo     the whole path on real data
# make test     the tests, without the slow ones
# make test-slow     the slow tests; docs/testing.md lists them
# make test-long     tests of half a minute and more each
# make test-random   property-based tests, on a thousand new inputs each
# make test-avx2     tests of engines, compression and training on a processor without AVX-512 (docs/machines.md)
# make check    lint, types, architecture
# make bench-serve   our server and its peers, 26 minutes on an idle machine (`apt-get install wrk` first)
# make bench-regression   CPU per request against an earlier commit (BEFORE=...), 5 minutes on a quiet machine
# make bench-noise   tuning and verdicts on a disturbed host, 3 hours; parts by `--only`
# make bench-tune    gain and cost of tuning, replayed searches, shipped plans; hours on a quiet machine; parts by `--only`
# make bench-simulator  policies a minute of the capacity simulator, seconds
# make bench-soak    memory growth of a server under mixed load, 10 minutes (SOAK_SECONDS)
# make bench-hostile  delay of other clients and memory kept by hostile inputs, 6 minutes
# make fuzz          coverage-guided fuzzing of the protocol, 10 minutes (FUZZ_SECONDS); keeps failing inputs
# make bench-load    correctness of verdict, search and generator, 25 minutes on an idle machine
# make bench-compress  gain and cost of compression, an hour and a half; resumes
# make bench-train  training by parallel plans: exactness, bytes, memory, speed; resumes
# make bench-train-options  accuracy of compressed gradients, local SGD and DiLoCo; resumes
# make bench-machines  accuracy and speed of int8, with and without VNNI, 20 minutes
# make bench-zoo    500 random networks under a checked heap, and a gallery of networks in every step, 25 minutes
# make bench-doors  one model of each kind that people bring: import, equality, int8, pruning, serving; 15 minutes; the article's Keras service against its Plan, imports against torch; 40 more on a quiet machine; resumes
# make bench-cluster  replicas on Ray: what they carry and what failures lose; size, start and memory of an exported container, `rushhour plan` against capacities, a model beside a flooded one, a training on two network namespaces, a tuning run on a Ray cluster that loses a node; an hour on a quiet machine
# make bench-adapt  ladders, cascades, texts in buckets, tiles: each against the best without it; two hours on a quiet machine; parts by `--only`
# make bench-fields  every example from its data to its report: minutes, accuracy, capacity; parts by `--only`; resumes
# make example-NAME  one of them, into runs/NAME (examples/README.md lists them)
# make docs     docs/benchmarks.md, from benchmarks/results
# make picture  docs/demo.svg, the README's picture, from runs/demo
# Everything lives in .venv; nothing is installed outside it.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
AVX2_ENGINES := tests/engines/test_engines.py tests/models/test_imported.py $(addprefix tests/compress/test_,compress.py speed.py)
AVX2_TRAINING := tests/compress/test_recipe.py tests/models/test_models.py \
	$(addprefix tests/train/test_,train.py train_loop.py train_workers.py parallel.py)

.PHONY: setup demo picture test test-slow test-long test-random test-avx2 check clean bench-machines bench-serve bench-load bench-noise bench-regression bench-simulator bench-tune bench-soak bench-hostile bench-compress bench-train bench-train-options bench-zoo bench-doors bench-cluster bench-adapt bench-fields fuzz docs

setup: .venv/.ready

# torch first and pinned: any other order lets another package pull in a build of several gigabytes.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[all]'
	@touch $@

.venv/.dev: .venv/.ready
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# Apart: installing Ray takes two minutes, and only tests of half a minute and more use it.
.venv/.cluster: .venv/.dev
	$(BIN)/pip install --quiet --editable '.[dev,cluster]'
	@touch $@

.venv/.examples: .venv/.ready
	$(BIN)/pip install --quiet --editable '.[examples]'
	@touch $@

demo: setup
	$(BIN)/rushhour demo

test: .venv/.dev
	$(BIN)/pytest

test-slow: .venv/.dev
	$(BIN)/pytest -m "slow and not long"

# Half a minute each and more: every environment, every place of a kill, whole rows of the matrix.
# A tuning run measures rates under load, so no other tests run beside it.
test-long: .venv/.cluster
	$(BIN)/pytest -m "long and not alone"
	$(BIN)/pytest -n 0 -m alone

# Property-based tests, on 1,000 new inputs each: 20 minutes.
test-random: .venv/.dev
	$(BIN)/pytest -m hypothesis --hypothesis-profile random

# Engines, compression and training on a processor with AVX2 and nothing newer.
test-avx2: .venv/.dev
	$(BIN)/python -m rushhour.testing.processor $(BIN)/pytest -n 2 $(AVX2_ENGINES) $(AVX2_TRAINING)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py benchmarks/bench/*.py
	$(BIN)/lint-imports

bench-serve: setup
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/render.py

BEFORE ?= 6cebe48
bench-regression: setup
	$(BIN)/python benchmarks/regression.py --before $(BEFORE)
	$(BIN)/python benchmarks/render.py

bench-noise: .venv/.dev
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/render.py

bench-simulator: .venv/.dev
	$(BIN)/python benchmarks/simulator.py
	$(BIN)/python benchmarks/render.py

bench-tune: .venv/.dev
	$(BIN)/pip install --quiet --editable '.[elpv,text]'
	$(BIN)/python benchmarks/tune.py
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

bench-doors: .venv/.dev
	$(BIN)/python benchmarks/doors.py
	$(BIN)/python benchmarks/render.py

bench-cluster: .venv/.cluster
	$(BIN)/python benchmarks/cluster.py
	$(BIN)/python benchmarks/render.py

bench-adapt: .venv/.dev
	$(BIN)/python benchmarks/adapt.py
	$(BIN)/python benchmarks/render.py

bench-fields: .venv/.examples
	$(BIN)/python benchmarks/fields.py
	$(BIN)/python benchmarks/render.py

example-%: .venv/.examples
	$(BIN)/python examples/run.py $*

picture: setup
	$(BIN)/python benchmarks/picture.py

docs: setup
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
