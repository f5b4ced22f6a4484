# Everything a newcomer needs: `make demo`, `make test`. Each makes its own .venv with what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo f-learning test lint types bench fuzz clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart/run.py
	$(BIN)/python examples/f_learning/run.py --demo --out demo-out/f-learning

# The paper's experiment, five seeds: ten to twenty minutes.
f-learning: $(VENV)/.installed
	$(BIN)/python examples/f_learning/run.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto -q

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py --size 110m --rounds 3

# Every fuzz target for FUZZ_SECONDS; what is found lies in fuzz-corpus, and is where the next run begins.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.installed
	for target in header index adapter_config single_file pattern; do \
		mkdir -p fuzz-corpus/$$target && \
		$(BIN)/python -m tests.fuzz.run $$target -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=fuzz-corpus/ \
			fuzz-corpus/$$target || exit 1; \
	done

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py taskvec/run/native.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,plot]'
	touch $@

clean:
	rm -rf $(VENV) demo-out f-learning-out fuzz-corpus
