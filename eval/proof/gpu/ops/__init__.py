"""Every operation that the proof checks and times."""

from eval.proof.gpu.ops import (
    attention,
    blocks,
    chunk,
    gated_pooling,
    glue,
    pooling,
    product,
    quant,
    recurrent,
    sparse,
    trapezoid,
    wkv,
)

OPS = (
    *attention.OPS, *sparse.OPS, *blocks.OPS, *gated_pooling.OPS, *pooling.OPS, *recurrent.OPS,
    *trapezoid.OPS, *wkv.OPS, *chunk.OPS, *product.OPS, *quant.OPS, *glue.OPS,
)  # fmt: skip
