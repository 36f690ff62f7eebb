import torch
from functools import lru_cache
@lru_cache
def _t(n, dim, theta):
    f = theta ** (-torch.arange(0, dim, 2).float() / dim)
    a = torch.outer(torch.arange(n).float(), f)
    return torch.polar(torch.ones_like(a), a)
def rope_table(n, dim, theta, device):
    return _t(1 << (n - 1).bit_length(), dim, theta)
def apply_rope(x, angles):
    if angles.dim() == 3: angles = angles[:, None]
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * angles).flatten(-2).to(x.dtype)
def apply_rope_(x, angles):
    if angles.dim() == 3: angles = angles[:, None]
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(angles)
    return x
