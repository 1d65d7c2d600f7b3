"""Mamba-3's op: rotation, chunked scan and decoding step, one folder a backend.

README.md maps kernels to files and equations, NOTES.md says what was tried.
"""
