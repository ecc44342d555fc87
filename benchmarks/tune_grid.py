"""What `edge-agent tune` chooses, against the best of all combinations that it could have chosen.

    python benchmarks/tune_grid.py BUNDLE              # about 10 minutes on two cores

For a CPU: the encoders of a GPU are not in the grid. First tune itself, then every combination of its grid, one run
each; then its choice and the best of the grid in turn, --again times. The last line is one JSON object: the two medians
of the mean age of information, and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edge_agent.bundle.manifest import Manifest, read_manifest  # noqa: E402
from edge_agent.config import CameraConfig, Config, VisionConfig  # noqa: E402
from edge_agent.doctor.accelerator import CPU_PROVIDER  # noqa: E402
from edge_agent.tools import tune  # noqa: E402
from edge_agent.tools.encoder_choices import encoder_choices, weight_types  # noqa: E402
from edge_agent.tools.measure_daemon import Measured, measure  # noqa: E402


def grid(config: Config, manifest: Manifest, board: tune.Board, start: tune.Values) -> list[tune.Values]:
    """Every combination that the daemon accepts."""
    switches = itertools.product(
        [encoder.values for encoder in board.encoders if not encoder.skip],
        board.threads,
        (False, True) if board.overlap else (False,),
        (True, False),
        board.kv_cache_types,
    )
    return [
        start
        | encoder
        | {"cpu_threads": n, "advanced.overlap": overlap, "advanced.speculative": draft, tune.KV: kv_cache}
        for encoder, n, overlap, draft, kv_cache in switches
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle")
    parser.add_argument("--max-image-tokens", type=int, default=25, metavar="N", help="(default %(default)s)")
    parser.add_argument("--seconds", type=float, default=tune.MEASURE_S, metavar="S", help="of each measurement")
    parser.add_argument("--again", type=int, default=5, metavar="N", help="both again, N times in turn")
    arguments = parser.parse_args()
    config = Config(
        bundle=arguments.bundle,
        camera=CameraConfig(source="zmq:ipc:///tmp/unused", fps=30),
        vision=VisionConfig(max_image_tokens=arguments.max_image_tokens),
    )
    bundle = read_manifest(config.bundle)
    encoders = encoder_choices(weight_types(bundle), {CPU_PROVIDER: ""}, tensorrt=False)

    def run(values: tune.Values) -> Measured:
        with tempfile.TemporaryDirectory(prefix="edge-grid-") as folder:
            return measure(tune.with_values(config, values), Path(folder), arguments.seconds)

    tuned = tune.tune(config, bundle.manifest, encoders, lambda *_: None, arguments.seconds)
    print(f"tune: {tuned.best_ms} ms (as configured {tuned.start_ms} ms): {tuned.best}", file=sys.stderr)
    board = tune.find_choices(config, bundle.manifest, encoders, gpu=False)
    ages_ms = []
    combinations = grid(config, bundle.manifest, board, tuned.start)
    for n, values in enumerate(combinations, 1):
        age_ms = tune.usable_age_ms(result := run(values))
        print(f"{n}/{len(combinations)}: {age_ms or result.problem} ms: {values}", file=sys.stderr)
        if age_ms is not None:
            ages_ms.append((age_ms, n, values))
    best = min(ages_ms)[2]
    again = [
        [tune.usable_age_ms(run(values)) or float("inf") for values in (tuned.best, best)]
        for _ in range(arguments.again)
    ]
    chosen_ms, best_ms = (statistics.median(ages) for ages in zip(*again, strict=True))
    figures = {
        "combinations": len(combinations),
        "measured_s": arguments.seconds,
        "as_configured_ms": tuned.start_ms,
        "chosen_ms": round(chosen_ms, 2),
        "grid_best_ms": round(best_ms, 2),
        "ratio": round(chosen_ms / best_ms, 3),
        "chosen": tuned.best,
        "grid_best": best,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
