# make demo   the trained pilot flies, from checkpoint to landing, about a minute after the set-up
# make test   ruff and all tests
# make venv   the set-up alone: virtual environment in .venv, dependencies, this project
# make bench  slow figures: the demo model's flying and speed (minutes), conversion at the 3B's true shape (25 GB of disk)
# make soak   the long form of the fault tests
#
# A GPU build of llama.cpp and onnxruntime-gpu are taken where an NVIDIA GPU and its compiler are visible.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: venv demo test bench soak clean

demo: venv
	@$(RUN)/python -m models.pad_pilot.demo

test: venv
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/python -m pytest -m "not soak"

soak: venv
	$(RUN)/python -m pytest -m soak

bench: venv
	$(RUN)/python benchmarks/flight.py
	mkdir -p build
	$(RUN)/edge-quantize build models/pad_pilot/checkpoint build/pilot --force
	$(RUN)/python benchmarks/bench.py --bundle build/pilot --max-tokens 25 --instruction "Land on the red disc." --compare
	$(RUN)/python benchmarks/convert.py

venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: expected Python 3.10 or newer, found $$($(PYTHON) -V); set PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: this Python has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@command -v cmake >/dev/null || { echo "make: no cmake; llama.cpp is compiled here: apt install cmake" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "make: no C++ compiler; llama.cpp is compiled here: apt install g++" >&2; exit 1; }
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install -q --upgrade pip
	@echo "== dependencies and this project. The first time this compiles llama.cpp, 5 to 15 minutes"
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	   echo "== NVIDIA GPU: onnxruntime-gpu"; extra=gpu; \
	   if command -v nvcc >/dev/null; then echo "== nvcc: llama.cpp with CUDA"; \
	     export CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON"; fi; \
	 else extra=cpu; fi; \
	 $(RUN)/python -m pip install --progress-bar off -e ".[$$extra,quantize,terminal,dev]"
	@$(RUN)/python -c 'import cv2' 2>/dev/null || { \
	   echo "== no libGL on this machine: the same OpenCV without windows (opencv-python-headless)"; \
	   version=$$($(RUN)/python -c 'from importlib.metadata import version; print(version("opencv-python"))'); \
	   $(RUN)/python -m pip uninstall -q -y opencv-python && \
	   $(RUN)/python -m pip install -q --progress-bar off "opencv-python-headless==$$version"; }
	@$(RUN)/python -c 'import cv2, onnxruntime, llama_cpp'
	@touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
