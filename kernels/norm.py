import torch
from torch.nn import functional as F
def rms_norm(x, w, eps): return F.rms_norm(x, w.shape, w, eps)
def swiglu(gu):
    g, u = gu.chunk(2, -1)
    return F.silu(g) * u
