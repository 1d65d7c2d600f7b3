"""The op for TPUs in Pallas Mosaic: the fused chunked scan (`op`, `scan`, `scan_back`)."""
