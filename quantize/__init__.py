"""edge-quantize: a released Ministral 3 checkpoint becomes a 4-bit bundle, without torch, in bounded memory."""
