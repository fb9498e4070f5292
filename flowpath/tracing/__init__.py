"""Functions as graphs of ATen ops, their backward passes included: run without autograd, or compiled."""

from flowpath.tracing.traced import Constant, Traced, TracingError, trace

__all__ = ["Constant", "Traced", "TracingError", "trace"]
