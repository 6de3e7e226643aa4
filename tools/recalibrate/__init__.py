"""Recalibration of a pretrained rotary model, with its rotation nulled or in place, by a low-rank adapter."""
