# SPDX-License-Identifier: Apache-2.0
"""Benchmark cases of the family: powers of two as weights, binary attention, mixtures of experts."""

from __future__ import annotations

from cofire.bench import shift_add_attention, shift_add_linear, shift_add_mixture, shift_add_softmax

CASES = [*shift_add_linear.CASES, *shift_add_attention.CASES, *shift_add_softmax.CASES, *shift_add_mixture.CASES]
