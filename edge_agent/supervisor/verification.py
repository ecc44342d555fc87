"""The bundle is verified in a thread: hashing takes seconds, and a pause has to be answered meanwhile."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import Bundle
from edge_agent.bundle.store import hold_folder
from edge_agent.bundle.verify import verify_bundle
from edge_agent.config import Config


class Verification:
    """One verification of the bundle and the adapters. The thread ends with the process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._share = 0.0
        self._bundle: Bundle | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._verify, name="verify", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def result(self) -> Bundle | None:
        """The verified bundle; None: not yet. Raises what verify_bundle() and verify_adapters() raise."""
        if self._error is not None:
            raise self._error
        return self._bundle

    @property
    def progress(self) -> str:
        """For status and log, for example "verifying the bundle, 40%"."""
        return f"verifying the bundle, {self._share:.0%}"

    def _verify(self) -> None:
        config = self._config
        folder = Path(config.bundle)
        # The folder stays until this process ends, and the link `current` may lead to another one meanwhile.
        with contextlib.suppress(OSError):  # no such folder: verify_bundle() says what is there
            folder, _descriptor = hold_folder(folder)
        try:
            bundle = verify_bundle(folder, config.trusted_keys, self._report)
            self._bundle = verify_adapters(config.language.adapters, bundle, config.trusted_keys)
        except Exception as error:  # raised in the main thread by result()
            self._error = error

    def _report(self, n_done: int, n_total: int) -> None:
        self._share = n_done / max(1, n_total)
