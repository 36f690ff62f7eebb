"""Every measure that a result row may carry: its unit, which way is better, what it means.

These names are the CSV's vocabulary; a row with any other name is refused. Adding a measure is
one line here.
"""

from typing import Literal, NamedTuple


class Measure(NamedTuple):
    """unit as printed; better: which direction wins, None if neither does.

    share: a part of a whole, from 0 to 1. signed: a difference, which may be negative.
    """

    unit: str
    better: Literal["lower", "higher"] | None
    meaning: str
    share: bool = False
    signed: bool = False


MEASURES: dict[str, Measure] = {
    # quality
    "bits_per_byte": Measure("bit/byte", "lower", "-Σ log2 p over bytes of held-out text"),
    "document_bits_per_byte": Measure("bit/byte", "lower", "one held-out document; n: its bytes"),
    "loss_at_position": Measure("nat", "lower", "mean loss of held-out tokens, by position"),
    "accuracy": Measure(
        "", "higher", "what was answered right of what a task asks, test sequences", share=True
    ),
    "accuracy_beyond": Measure(
        "", "higher", "accuracy on longer sequences, past the trained length", share=True
    ),
    "steps_to_99": Measure("step", "lower", "training steps until 99 % of it are right"),
    # training
    "train_loss": Measure("nat", "lower", "smoothed training loss at the end"),
    "train_tok_per_s": Measure("token/s", "higher", "training rate, evaluation apart"),
    "train_steps": Measure("step", None, "optimiser updates made"),
    "train_s": Measure("s", "lower", "training time"),
    "learning_rate": Measure("", None, "peak learning rate in use"),
    "sweep_score": Measure("bit/byte", "lower", "dev score of one learning rate of the sweep"),
    "mlp_hidden": Measure("", None, "MLP width that equalises parameters"),
    # serving
    "ttft_ms": Measure("ms", "lower", "median: request in to first token out (prefill, sample)"),
    "tpot_ms": Measure("ms", "lower", "mean time per output token after the first"),
    "tpot_p50_ms": Measure("ms", "lower", "median over decode steps; of a server over requests"),
    "tpot_p90_ms": Measure("ms", "lower", "90th percentile of the same"),
    "tpot_p99_ms": Measure("ms", "lower", "99th percentile of the same"),
    "itl_ms": Measure("ms", "lower", "gap between two streamed chunks"),
    "output_tok_per_s": Measure(
        "token/s",
        "higher",
        "of a batch, from tpot_ms; of a server, from first arrival to last token",
    ),
    "output_tok_per_s_per_user": Measure("token/s", "higher", "per sequence, 1000 / tpot_ms; mean"),
    "ttft_p50_ms": Measure("ms", "lower", "arrival to first token, queueing included: median"),
    "ttft_p90_ms": Measure("ms", "lower", "90th percentile over requests"),
    "ttft_p99_ms": Measure("ms", "lower", "99th percentile over requests"),
    "itl_p50_ms": Measure("ms", "lower", "gap between two tokens of an answer: median over tokens"),
    "itl_p90_ms": Measure("ms", "lower", "90th percentile over tokens"),
    "itl_p99_ms": Measure("ms", "lower", "99th percentile over tokens"),
    "e2e_p50_ms": Measure("ms", "lower", "arrival to last token: median over requests"),
    "e2e_p90_ms": Measure("ms", "lower", "90th percentile over requests"),
    "e2e_p99_ms": Measure("ms", "lower", "99th percentile over requests"),
    "queue_p50_ms": Measure("ms", "lower", "arrival to admission: median over requests"),
    "queue_p90_ms": Measure("ms", "lower", "90th percentile over requests"),
    "queue_p99_ms": Measure("ms", "lower", "99th percentile over requests"),
    "request_per_s": Measure("request/s", "higher", "answered, from first arrival to last token"),
    "goodput_req_per_s": Measure(
        "request/s", "higher", "answered within the limits of ttft and tpot"
    ),
    "served_requests": Measure("request", "higher", "answered in full"),
    "refused_requests": Measure("request", "lower", "could never fit in the memory"),
    "running_sequences": Measure("", "higher", "in a step, on average over time"),
    "held_tokens": Measure("token", "higher", "in the state of all running sequences, on average"),
    "page_waste": Measure(
        "", "lower", "share of the rows set aside that hold no token, over time", share=True
    ),
    "page_waste_contiguous": Measure(
        "", "lower", "the same, were the longest context set aside for each", share=True
    ),
    "hit_rate": Measure(
        "", "higher", "share of the tokens of prompts that were found computed", share=True
    ),
    "cached_state_bytes": Measure(
        "byte", "lower", "kept of prefixes that nobody uses, on average over time"
    ),
    "shared_state": Measure(
        "", "higher", "share of the bytes of copies that sharing saves those that run", share=True
    ),
    "preemptions": Measure("", "lower", "answers that lost their state to others, and came back"),
    "recomputed_tokens": Measure(
        "token", "lower", "that answers lost with their state and computed anew"
    ),
    "host_share": Measure(
        "", "lower", "share of a server's steps in neither model nor sampling", share=True
    ),
    "batching_gain": Measure("", "higher", "output tokens/s of continuous over static batching"),
    "batching_gain_equal_steps": Measure(
        "", None, "E[max of B lengths] / E[length]: the gain if all steps took the same time"
    ),
    "output_tok_per_s_pred": Measure("token/s", "higher", "of a server, on the predicted clock"),
    "ttft_p50_pred_ms": Measure("ms", "lower", "of a server, on the predicted clock"),
    "tpot_p50_pred_ms": Measure("ms", "lower", "of a server, on the predicted clock"),
    "output_tok_per_s_sim": Measure("token/s", "higher", "of a server, on its engine's clock"),
    "ttft_p50_sim_ms": Measure("ms", "lower", "of a server, on its engine's clock"),
    "tpot_p50_sim_ms": Measure("ms", "lower", "of a server, on its engine's clock"),
    "nocache_tpot_ms": Measure("ms", "lower", "median time per token recomputing every prefix"),
    "cached_tpot_ms": Measure("ms", "lower", "the same tokens with state kept"),
    "compile_s": Measure("s", "lower", "warm-up and compilation, kept out of every latency"),
    "prefill_compile_s": Measure("s", "lower", "the same of a prefill, kept out of ttft_ms"),
    "agreement_error": Measure("", "lower", "extend against float32 forward, gates latencies"),
    "agreement_limit": Measure("", None, "agreement_error from which on latencies are withheld"),
    # speculation
    "speedup": Measure("", "higher", "median of plain over speculative time per token"),
    "speedup_pred": Measure("", "higher", "the same by the cost model, at the tokens measured"),
    "acceptance": Measure(
        "", "higher", "share of drafts that were right, of those behind no wrong one", share=True
    ),
    "acceptance_at_position": Measure(
        "", "higher", "share of drafts at a position that were right, with all before", share=True
    ),
    "tokens_per_verification": Measure("token", "higher", "new tokens of a sequence in a round"),
    "tokens_per_verification_pred": Measure(
        "token", "higher", "(1 - α^(K+1)) / (1 - α) at the acceptance α"
    ),
    "drafts_per_verification": Measure("token", None, "drafted tokens of a sequence in a round"),
    "plain_tpot_ms": Measure("ms", "lower", "time per token without drafts, in the same process"),
    "speculative_tpot_ms": Measure("ms", "lower", "time per token, drafts and verification"),
    "draft_ms": Measure("ms", "lower", "median time to draft in a round"),
    "verify_ms": Measure("ms", "lower", "median time to verify, choose and roll back in a round"),
    "lossless": Measure(
        "",
        "higher",
        "share of sequences with plain decode's tokens; others part at a tie",
        share=True,
    ),
    # memory
    "rollback_bytes": Measure(
        "byte", "lower", "state that a sequence holds so that K tokens can be taken back"
    ),
    "draft_state_bytes": Measure("byte", "lower", "state of a sequence that its draft holds"),
    "state_bytes_per_token": Measure("byte", "lower", "slope of the state in the context"),
    "state_bytes_fixed": Measure("byte", "lower", "fixed tensors of one sequence"),
    "state_bytes": Measure("byte", "lower", "allocated state of one sequence at the context"),
    "held_bytes": Measure("byte", "lower", "pages and slots that a sequence holds in the store"),
    "peak_state_bytes": Measure("byte", "lower", "largest allocated state, whole batch"),
    "scanned_bytes": Measure("byte", "lower", "rows one sequence reads through in a decode step"),
    "gathered_bytes": Measure("byte", "lower", "rows it reads because its mixer picked them"),
    # cost of a step
    "weight_bytes": Measure("byte", "lower", "weights read in one step"),
    "compressed_bits_per_byte": Measure(
        "bit/byte",
        "lower",
        "bits per byte of a model whose weights, or whose state, are stored as its row says",
    ),
    "compressed_accuracy": Measure(
        "",
        "higher",
        "accuracy on a task of a model whose weights, or whose state, are so stored",
        share=True,
    ),
    "bits_per_byte_ratio": Measure(
        "", "lower", "bits of held-out text over those of the same model in float32, by document"
    ),
    "loss_gap_at_position": Measure(
        "nat",
        "lower",
        "loss of held-out tokens over that of the same model with its state as it "
        "is computed, by position",
        signed=True,
    ),
    "bits_per_state_number": Measure(
        "bit", "lower", "bits of memory a number of the state, scales included, at the context"
    ),
    "bits_per_weight": Measure(
        "bit", "lower", "bits of memory a weight, of all weights and their scales"
    ),
    "held_weight_bytes": Measure("byte", "lower", "all weights in memory, scales included"),
    "step_bytes": Measure("byte", "lower", "weights and state read, state written, in one step"),
    "step_flops": Measure("FLOP", "lower", "work of one step"),
    "step_calls": Measure("call", "lower", "torch operations dispatched in one step as written"),
    "arith_intensity_pred": Measure("FLOP/byte", "higher", "step_flops / step_bytes, predicted"),
    "step_bytes_meas": Measure("byte", "lower", "device memory traffic of one step, by counters"),
    "step_flops_meas": Measure("FLOP", "lower", "executed in one step, by counters, with padding"),
    "arith_intensity_meas": Measure("FLOP/byte", "higher", "step_flops_meas / step_bytes_meas"),
    "prefill_intensity_pred": Measure("FLOP/byte", "higher", "the same for one prefill"),
    "tpot_pred_ms": Measure("ms", "lower", "bytes or FLOPs, and a launch, of each op"),
    "mbu": Measure("", "higher", "step_bytes / (tpot_p50 · measured copy or read bandwidth)"),
    "mfu": Measure("", "higher", "step_flops / (tpot_p50 · measured matrix rate)"),
    # machine
    "copy_bytes_per_s": Measure("byte/s", "higher", "measured copy bandwidth, read + write"),
    "read_bytes_per_s": Measure("byte/s", "higher", "measured bandwidth of reading alone"),
    "other_load": Measure(
        "", "lower", "share of the cores that other programs took while it was timed", share=True
    ),
    "product_bytes_per_s": Measure("byte/s", "higher", "measured, product of `batch` rows, matrix"),
    "product_launch_us": Measure("µs", "lower", "measured: what such a product costs beside"),
    "call_us": Measure("µs", "lower", "measured: what any other operation costs beside its work"),
    "matrix_flops_per_s": Measure("FLOP/s", "higher", "measured matrix rate"),
    "ridge_flop_per_byte": Measure("FLOP/byte", None, "matrix rate / copy or read bandwidth"),
}


def on_clock(measure: str, clock: Literal["pred", "sim"]) -> str:
    """The name of what a clock says of a measure: its unit stays last."""
    return f"{measure[:-3]}_{clock}_ms" if measure.endswith("_ms") else f"{measure}_{clock}"
