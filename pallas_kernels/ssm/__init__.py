"""Kernels of Mamba-3's op: rotation, chunked scan and decoding step, in one folder for each backend.

README.md maps kernels to files and equations, NOTES.md says what was tried.
"""
