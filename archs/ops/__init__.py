"""Operations of mixers over their state, each a table of forms by backend (`archs.backends`).

The torch form is the reference; the Triton form hands the store's own tensors to a kernel. Kernels
are imported where they are called: Triton exists on Linux only.
"""
