"""The kernels one by one: what each has to do, what the compiler made of it, how fast it is."""
