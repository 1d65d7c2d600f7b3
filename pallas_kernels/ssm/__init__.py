"""Mamba-3's op: rotation, chunked scan and decoding step, one folder a backend. NOTES.md says what was tried."""
