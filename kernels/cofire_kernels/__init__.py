# SPDX-License-Identifier: Apache-2.0
"""GPU kernels of cofire: one package per family, imported with the first launch.

Importing this package imports neither triton nor a driver; its families import triton. Nothing here imports cofire.
"""
