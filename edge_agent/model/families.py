"""Whether a loaded model can be served: llama.cpp's own answers, where the bundle's header check asked the file."""

from __future__ import annotations

import llama_cpp.llama_cpp as ll


def not_served(model: int) -> str:
    """Why a model cannot work with a cache that is cut back to the frame before; "": it can. model: llama.cpp's
    handle."""
    if ll.llama_model_is_recurrent(model) or ll.llama_model_is_hybrid(model):
        return "recurrent layers, whose state cannot be cut back; use a model without them"
    if ll.llama_model_has_encoder(model) or ll.llama_model_is_diffusion(model):
        return "expected a decoder that writes from left to right"
    if ll.llama_model_rope_type(model) in (ll.LLAMA_ROPE_TYPE_MROPE, ll.LLAMA_ROPE_TYPE_IMROPE):
        return "positions of three dimensions (M-RoPE), which edge-agent does not write"
    return ""
