"""Selective state-space scan: one public function, several backends."""

from .api import CHOICES, check_backend, choose_backend, selective_scan

__all__ = ["CHOICES", "check_backend", "choose_backend", "selective_scan"]
