"""The fused ghost norm; one function picks the kernel."""
