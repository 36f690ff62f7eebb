"""What a state in few bits costs where no kernel reads it as it is kept: torch makes a copy first.

Rates are measured, for each format and count of numbers that are kept together: how often torch's
operations pass over memory, convert and shift follows from no datasheet.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial

import torch

from archs.formats import Format
from archs.spec import StateSpec
from eval.predict.machine import CodingRate, Roofline, each_s
from infer.coding import Coding

#: Numbers that are coded at once when rates are measured: those of a layer's rows, which no core's
#: own cache holds.
NUMBERS = 1 << 22


def with_codings(known: Roofline, device: torch.device, specs: Iterable[StateSpec]) -> Roofline:
    """These rates with those of coding all tensors that `specs` keep otherwise than they are
    computed with, each measured once in a process.
    """
    tensors = (t for spec in specs for t in (*spec.owned, *spec.fixed) if t.is_coded)
    wanted = {(t.format, t.shape[-1], t.given_dtype): None for t in tensors}
    have = {(r.format, r.run, r.given) for r in known.codings}
    made = (_measured(*key, device) for key in wanted if key not in have)
    return replace(known, codings=(*known.codings, *made))


@cache
def _measured(kept: Format, run: int, given: torch.dtype, device: torch.device) -> CodingRate:
    coding, count = Coding(kept, given, run), max(1, NUMBERS // run)
    with torch.inference_mode():
        x = torch.randn(count, run, device=device).to(given)
        tokens = torch.arange(count, device=device)
        held = coding.encode(x, tokens)
        decode_s = each_s([partial(coding.decode, held)], device)
        encode_s = each_s([partial(coding.encode, x, tokens, held)], device)
    return CodingRate(kept, run, given, decode_s / x.numel(), encode_s / x.numel())
