"""Shared by all tests: one thread (the machines that run them are small), no figure windows."""

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
