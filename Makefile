# Each target sets up what it needs: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
BIN := .venv/bin
# With bytecode kept, because tests start many processes.
RUN := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python
# Half of the tests run in one process, the others in up to four of one thread that often wait: two cores are enough.
BY_TWO := -n 2 --dist loadfile

.PHONY: demo test test-whole campaign lint published coverage coverage-sample operators mutants quality benchmark gpu compat clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(RUN) -m pytest tests $(BY_TWO)

test-whole: .venv/ready
	$(RUN) -m pytest tests $(BY_TWO) --whole

# Seeded and long: random models and specs, random edits between calls, faults of ranks, spoiled artifacts.
campaign: .venv/ready
	$(RUN) tests/campaigns/models.py --count 2000 --seed 0
	$(RUN) tests/campaigns/edits.py --count 2000 --seed 0
	$(RUN) tests/campaigns/faults.py --count 300 --seed 0
	$(RUN) tests/campaigns/artifacts.py --count 20000 --seed 0

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

published: .venv/ready
	$(RUN) benchmarks/published.py --output docs/published.md

coverage: .venv/ready
	$(RUN) benchmarks/coverage.py --output docs/coverage.md

# A plain case, a mode with a cache, research style, attention over time alone, nothing to gain; and one full size.
coverage-sample: .venv/ready
	$(RUN) benchmarks/coverage.py --cases dit flux2_cached fused temporal minimax_depth --published dit_xl_512

operators: .venv/ready
	$(RUN) benchmarks/operators.py --output docs/operators.md

# Changes single lines of the core and says which of these changes no test sees.
mutants: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutants]'
	$(RUN) tests/campaigns/mutants.py --count 40 --seed 0

quality: .venv/ready
	$(RUN) benchmarks/pipefusion_quality.py --output docs/pipefusion.md

benchmark: .venv/ready
	$(RUN) benchmarks/forward.py

# On a machine with one GPU, in at most nine minutes. Not from .venv, whose PyTorch may be one for CPUs.
gpu:
	$(PYTHON) benchmarks/gpu.py --output gpu.json --write docs/performance.md

# An environment for each combination of versions, and an hour of tests in each.
compat: .venv/ready
	$(RUN) benchmarks/compat.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-output
