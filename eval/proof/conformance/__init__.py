"""The conformance kit: what every mixer must obey, checked on any registry name or file."""

from eval.proof.conformance.kit import LAWS, judge, run_checks
from eval.proof.conformance.subject import CHECK_SCALE, Subject
from eval.proof.conformance.verdict import Check, error_of

__all__ = ["CHECK_SCALE", "LAWS", "Check", "Subject", "error_of", "judge", "run_checks"]
