"""Builds validate their files in this process. A process of its own takes most of a second to import everything.

A test of validation itself does not use this: native code may abort on damaged numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def validated_here() -> Iterator[None]:
    from edge_agent.model.llama import LlamaError
    from edge_agent.model.vision_encoder import VisionError
    from quantize.validate import ValidationFailed, ValidationRequest, validate_files

    def validate(request: ValidationRequest) -> dict[str, float]:
        try:
            return validate_files(request)
        except (LlamaError, VisionError) as error:
            raise ValidationFailed(str(error)) from None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.build.validate_in_subprocess", validate)
        yield
