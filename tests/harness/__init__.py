"""What several tests share: toy checkpoints, a daemon to start, a model that is none."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
