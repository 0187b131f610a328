"""SpIEL's host: see `s2kernels.peft`, which exports what users need."""
