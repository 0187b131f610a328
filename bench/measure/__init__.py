"""How things are measured: bytes, seconds, the machine, and the files of results."""
