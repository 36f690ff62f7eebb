"""A stand-in for a GPU: torch on fake tensors, Triton's own compiler, recorded launches.

No values and no times: it shows what is compiled, launched, copied, allocated and captured. It
finds faults of the way to the device before a device is at hand, and compiles ahead what will run
there. It lives in a process of its own (`eval.proof.gpu.standin.run`), since torch must believe in
its device from the start.
"""
