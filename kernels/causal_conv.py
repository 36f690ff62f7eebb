import torch
from torch.nn import functional as F
def causal_conv(x, weight, bias=None, tail=None, *, silu=True):
    B,T,C=x.shape; W=weight.shape[1]
    t = x.new_zeros(B,W-1,C) if tail is None else tail
    p = torch.cat((t,x),1)
    y = sum(p[:,i:i+T]*weight[:,i] for i in range(W))
    if bias is not None: y=y+bias
    return F.silu(y) if silu else y
def conv_tail(x, tail, width, *, new=None):
    p=torch.cat((tail,x),1)
    if new is None: return p[:,p.shape[1]-(width-1):]
    return p[torch.arange(len(x))[:,None], new[:,None]+torch.arange(width-1)]
def conv_tails(x, tail, width):
    p=torch.cat((tail,x),1)
    return p[:,1:].unfold(1,width-1,1).transpose(2,3)
