"""Trajectories of i-PI to numbers and figures. Reads files only; never imports torch."""

from voltpi.analysis.registry import ANALYSES, Analysis, Option

__all__ = ["ANALYSES", "Analysis", "Option"]
