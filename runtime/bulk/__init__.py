"""One-sided transfers of large memory between processes: remote buffers, and large arguments between hosts."""
