"""Sliding-window attention (Mistral 7B, arXiv 2310.06825): `mha` that sees the newest W tokens.

W counts the token itself, so L layers reach L·(W - 1) tokens back. State and decode cost stop
growing at W rows. Sinks, the first few tokens kept beside the window (arXiv 2309.17453), are
off by default. The KV heads are those of `mha`: the window is the only difference. Equals
`transformers`' Mistral up to the channel order of the rotary pairs.
"""

from typing import TYPE_CHECKING, Any

from archs.gqa import AttentionConfig

if TYPE_CHECKING:
    from archs.sizes import Scale


class WindowConfig(AttentionConfig):
    """Full multi-head attention within the scale's window."""

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """All KV heads; the window of the scale."""
        return {**AttentionConfig.defaults(scale), "window": scale.window}
