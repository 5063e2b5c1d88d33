"""Multiplier: the seam to what multiplies in a graph's place. It is handed in; models know no kernel."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Multiplier(ABC):
    """Computes a graph's products and look-ups of packed matrices, which nodes name by their numbers.

    The operators are of the attender's library and domain; a node's attribute `products` is `number`.
    """

    product_operator: str
    look_up_operator: str
    number: int

    @abstractmethod
    def begin(self) -> None:
        """Say that a pass begins."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; closing twice is allowed."""
