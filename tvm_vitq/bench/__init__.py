"""Side by side with other runtimes, and kernel by kernel; see :mod:`tvm_vitq.bench.compare`."""
